"""What the kernels share: rows of tensors, decays between rows, products of rows under a decay.

Cumulative log gates are kept to base 2 and in two parts, ``whole`` numbers, whose sums are exact, and the ``part``
left over, at most a half a token: an exponent is the sum of the two differences, so that strong gates cancel exactly.
Gates are [rows, 1] with one gate per head and [rows, channels] with one per channel, and broadcast alike.
"""

from __future__ import annotations

import triton
import triton.language as tl

# 2 to this is 0 in float32: it stands for every stronger gate and for the start of a sequence.
NOTHING = tl.constexpr(-160.0)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(base, rows, columns, taken, WIDTH: tl.constexpr):
    """Load ``rows`` of a tensor of WIDTH columns, 0 for rows that are not ``taken``, which are not read."""
    inside = taken[:, None] & (columns < WIDTH)[None, :]
    return tl.load(base + rows[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(base, x, rows, columns, taken, WIDTH: tl.constexpr):
    """Store ``rows`` of a tensor of WIDTH columns in its type."""
    inside = taken[:, None] & (columns < WIDTH)[None, :]
    tl.store(base + rows[:, None] * WIDTH + columns[None, :], x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def present(positions, rows, T):
    """Return which rows are tokens, neither padding nor beyond the call."""
    return tl.load(positions + rows, mask=rows < T, other=-1) >= 0


@triton.jit
def writes(added, beta, rows, columns, taken, V: tl.constexpr, DELTA: tl.constexpr, DOT: tl.constexpr):
    """Load what tokens add along their keys: values, or errors times the strength of writing."""
    x = load_rows(added, rows, columns, taken, V)
    if DELTA:
        x = x * tl.load(beta + rows, mask=taken, other=0.0).to(tl.float32)[:, None]
    return x.to(DOT)


@triton.jit
def sums(whole, part, rows, channels, T, CHANNELS: tl.constexpr):
    """Load cumulative log gates in their two parts; rows beyond the call have those of the last."""
    at = tl.minimum(rows, T - 1)[:, None] * CHANNELS
    if CHANNELS == 1:
        w, p = tl.load(whole + at), tl.load(part + at)
    else:
        at = at + channels[None, :]
        inside = (channels < CHANNELS)[None, :]
        w, p = tl.load(whole + at, mask=inside, other=0.0), tl.load(part + at, mask=inside, other=0.0)
    return w, p


@triton.jit
def since_start(whole, part, rows, channels, T, CHANNELS: tl.constexpr):
    """Return the decay from the start of the rows' chunk to each row."""
    w, p = sums(whole, part, rows, channels, T, CHANNELS)
    return tl.exp2(w + p)


@triton.jit
def offsets(whole, part, rows, mark, channels, T, CHANNELS: tl.constexpr):
    """Return the log decay from row ``mark`` to each row, minus that from the row to ``mark`` for rows before it."""
    w, p = sums(whole, part, rows, channels, T, CHANNELS)
    if CHANNELS == 1:
        offset = (w - tl.load(whole + mark)) + (p - tl.load(part + mark))
    else:
        at, inside = mark * CHANNELS + channels, channels < CHANNELS
        mark_w, mark_p = tl.load(whole + at, mask=inside, other=0.0), tl.load(part + at, mask=inside, other=0.0)
        offset = (w - mark_w[None, :]) + (p - mark_p[None, :])
    return offset


@triton.jit
def through(whole, part, end, channels, CHANNELS: tl.constexpr):
    """Return the decay ``[channels]`` over a whole chunk, whose last row is ``end``."""
    at = end * CHANNELS + tl.minimum(channels, CHANNELS - 1)
    return tl.exp2(tl.load(whole + at) + tl.load(part + at))


@triton.jit
def between(whole, part, rows, columns, channels, T, CHANNELS: tl.constexpr):
    """Return the decay from column to row ``[rows, columns]``, with a third axis for gates per channel; 0 above.

    The exponent is masked, not the result: above the diagonal it would overflow.
    """
    w, p = sums(whole, part, rows, channels, T, CHANNELS)
    column_w, column_p = sums(whole, part, columns, channels, T, CHANNELS)
    lower = rows[:, None] >= columns[None, :]
    if CHANNELS == 1:
        exponent = (w - tl.trans(column_w)) + (p - tl.trans(column_p))
    else:
        exponent = (w[:, None, :] - column_w[None, :, :]) + (p[:, None, :] - column_p[None, :, :])
        lower = lower[:, :, None]
    return tl.exp2(tl.where(lower, exponent, NOTHING))


@triton.jit
def scores(
    x,
    y,
    whole,
    part,
    rows,
    columns,
    row_taken,
    column_taken,
    mark,
    T,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return sum_c x[i,c] y[j,c] decay[i,j,c] of a block of rows i and one of columns j, 0 above the diagonal.

    ``mark`` is the first of the rows. Off the diagonal it stands between columns and rows, and a decay is the product
    of that before it and that after it; on the diagonal gates per channel are applied term by term.
    """
    # Terms of eight channels at a time fit the registers, products take sixteen at least.
    STEP: tl.constexpr = 8 if CHANNELS > 1 and DIAGONAL else BK
    total = tl.zeros([ROWS, ROWS], tl.float32)
    for first in range(0, K, STEP):
        channels = first + tl.arange(0, STEP)
        a = load_rows(x, rows, channels, row_taken, K)
        b = load_rows(y, columns, channels, column_taken, K)
        if CHANNELS == 1:
            total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
        elif DIAGONAL:
            decay = between(whole, part, rows, columns, channels, T, CHANNELS)
            total += tl.sum(a.to(tl.float32)[:, None, :] * b.to(tl.float32)[None, :, :] * decay, 2)
        else:
            after = (a * tl.exp2(offsets(whole, part, rows, mark, channels, T, CHANNELS))).to(x.dtype.element_ty)
            before = (b * tl.exp2(-offsets(whole, part, columns, mark, channels, T, CHANNELS))).to(x.dtype.element_ty)
            total = tl.dot(after, tl.trans(before), total, input_precision=PRECISION)
    if CHANNELS == 1:
        total = total * between(whole, part, rows, columns, rows, T, CHANNELS)
    return total


@triton.jit
def to_rows(
    grad,
    y,
    whole,
    part,
    rows,
    columns,
    taken,
    mark,
    channels,
    T,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the gradient ``[rows, channels]`` of the rows x of :func:`scores`; ``taken`` are the columns."""
    b = load_rows(y, columns, channels, taken, K)
    if CHANNELS == 1:
        decayed = (grad * between(whole, part, rows, columns, rows, T, CHANNELS)).to(b.dtype)
        result = tl.dot(decayed, b, input_precision=PRECISION)
    elif DIAGONAL:
        decay = between(whole, part, rows, columns, channels, T, CHANNELS)
        result = tl.sum(grad[:, :, None] * decay * b.to(tl.float32)[None, :, :], 1)
    else:
        before = (b * tl.exp2(-offsets(whole, part, columns, mark, channels, T, CHANNELS))).to(b.dtype)
        after = tl.exp2(offsets(whole, part, rows, mark, channels, T, CHANNELS))
        result = after * tl.dot(grad.to(b.dtype), before, input_precision=PRECISION)
    return result


@triton.jit
def to_columns(
    grad,
    x,
    whole,
    part,
    rows,
    columns,
    taken,
    mark,
    channels,
    T,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the gradient ``[columns, channels]`` of the columns y of :func:`scores`; ``taken`` are the rows."""
    a = load_rows(x, rows, channels, taken, K)
    if CHANNELS == 1:
        decayed = (grad * between(whole, part, rows, columns, rows, T, CHANNELS)).to(a.dtype)
        result = tl.dot(tl.trans(decayed), a, input_precision=PRECISION)
    elif DIAGONAL:
        decay = between(whole, part, rows, columns, channels, T, CHANNELS)
        result = tl.sum(grad[:, :, None] * decay * a.to(tl.float32)[:, None, :], 0)
    else:
        after = (a * tl.exp2(offsets(whole, part, rows, mark, channels, T, CHANNELS))).to(a.dtype)
        before = tl.exp2(-offsets(whole, part, columns, mark, channels, T, CHANNELS))
        result = before * tl.dot(tl.trans(grad.to(a.dtype)), after, input_precision=PRECISION)
    return result
