"""Kernels of a gated feed-forward network whose weights differ from sequence to sequence, and of its gradients.

Sizes: T ``tokens``, R ``units``, C ``width``; ``x [B,T,C]`` and ``block [B,3,R,C]`` = gate G, up U and down D. What is
between the products, one number a token and unit, goes through memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    # Right at both ends, where e^2x is 0 or infinite.
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def activate(x, activation: tl.constexpr):
    """Return the activation of ``x`` in float32."""
    if activation == "silu":
        y = x * _sigmoid(x)
    elif activation == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif activation == "gelu_tanh":
        y = 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif activation == "quick_gelu":
        y = x * _sigmoid(1.702 * x)
    elif activation == "relu":
        y = tl.maximum(x, 0.0)
    elif activation == "relu2":
        y = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    elif activation == "sigmoid":
        y = _sigmoid(x)
    elif activation == "tanh":
        y = _tanh(x)
    elif activation == "softplus":
        y = _softplus(x)
    elif activation == "elu":
        y = tl.where(x > 0.0, x, tl.exp(tl.minimum(x, 0.0)) - 1.0)
    else:
        tl.static_assert(activation == "mish")
        y = x * _tanh(_softplus(x))
    return y


@triton.jit
def slope(x, activation: tl.constexpr):
    """Return the derivative of the activation at ``x`` in float32; that of ``relu`` at 0 is 0."""
    if activation == "silu":
        s = _sigmoid(x)
        y = s * (1.0 + x * (1.0 - s))
    elif activation == "gelu":
        density = tl.exp(-0.5 * x * x) * 0.3989422804014327
        y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif activation == "gelu_tanh":
        t = _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        y = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    elif activation == "quick_gelu":
        s = _sigmoid(1.702 * x)
        y = s * (1.0 + 1.702 * x * (1.0 - s))
    elif activation == "relu":
        y = tl.where(x > 0.0, 1.0, 0.0)
    elif activation == "relu2":
        y = 2.0 * tl.maximum(x, 0.0)
    elif activation == "sigmoid":
        s = _sigmoid(x)
        y = s * (1.0 - s)
    elif activation == "tanh":
        t = _tanh(x)
        y = 1.0 - t * t
    elif activation == "softplus":
        y = _sigmoid(x)
    elif activation == "elu":
        y = tl.exp(tl.minimum(x, 0.0))
    else:
        tl.static_assert(activation == "mish")
        t = _tanh(_softplus(x))
        y = t + x * (1.0 - t * t) * _sigmoid(x)
    return y


@triton.jit
def _tile(base, rows, columns, row_count, column_count):
    """Load rows and columns of a matrix ``[row_count, column_count]``, 0 outside it."""
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    return tl.load(base + rows[:, None] * column_count + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _put(base, tile, rows, columns, row_count, column_count):
    """Store what :func:`_tile` would load."""
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    place = base + rows[:, None] * column_count + columns[None, :]
    tl.store(place, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _product(a, b, total, precision: tl.constexpr):
    """Add ``a b`` to ``total``; matrices of different types are multiplied in float32."""
    if a.dtype != b.dtype:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=precision)


@triton.jit(do_not_specialize=["tokens"])
def hidden(
    out, x, block, tokens, units: tl.constexpr, width: tl.constexpr, activation: tl.constexpr, precision: tl.constexpr,
    block_tokens: tl.constexpr, block_units: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """Make ``out [B,T,R]`` = f(x Gᵀ) (x Uᵀ). Grid: (blocks of units, blocks of tokens, B)."""
    batch = tl.program_id(2).to(tl.int64)
    r = tl.program_id(0) * block_units + tl.arange(0, block_units)
    t = tl.program_id(1) * block_tokens + tl.arange(0, block_tokens)
    x += batch * tokens * width
    block += batch * 3 * units * width
    gate = tl.zeros([block_tokens, block_units], tl.float32)
    up = tl.zeros([block_tokens, block_units], tl.float32)
    for start in range(0, width, block_width):
        c = start + tl.arange(0, block_width)
        rows = _tile(x, t, c, tokens, width)
        gate = _product(rows, tl.trans(_tile(block, r, c, units, width)), gate, precision)
        up = _product(rows, tl.trans(_tile(block + units * width, r, c, units, width)), up, precision)
    _put(out + batch * tokens * units, activate(gate, activation) * up, t, r, tokens, units)


@triton.jit(do_not_specialize=["tokens"])
def spread(
    out, rows, block, tokens, units: tl.constexpr, width: tl.constexpr, parts: tl.constexpr, first: tl.constexpr,
    precision: tl.constexpr,
    block_tokens: tl.constexpr, block_units: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """Make ``out [B,T,C]``, the sum over ``parts`` of ``rows [B,.,T,R]`` times the block's matrices from ``first`` on.

    Grid: (blocks of width, blocks of tokens, B).
    """
    batch = tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) * block_width + tl.arange(0, block_width)
    t = tl.program_id(1) * block_tokens + tl.arange(0, block_tokens)
    # Gradients are three to a token: of the gate, of the up projection, and what the down projection has read.
    rows += batch * (3 if parts > 1 else 1) * tokens * units
    block += (batch * 3 + first) * units * width
    total = tl.zeros([block_tokens, block_width], tl.float32)
    for part in tl.static_range(parts):
        for start in range(0, units, block_units):
            r = start + tl.arange(0, block_units)
            left = _tile(rows + part * tokens * units, t, r, tokens, units)
            total = _product(left, _tile(block + part * units * width, r, c, units, width), total, precision)
    _put(out + batch * tokens * width, total, t, c, tokens, width)


@triton.jit(do_not_specialize=["tokens"])
def hidden_gradient(
    out, grad, x, block, tokens,
    units: tl.constexpr, width: tl.constexpr, activation: tl.constexpr, precision: tl.constexpr,
    block_tokens: tl.constexpr, block_units: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """Make ``out [B,3,T,R]``: d gate, d up, and f(gate) up once more. Grid: (blocks of units, blocks of tokens, B)."""
    batch = tl.program_id(2).to(tl.int64)
    r = tl.program_id(0) * block_units + tl.arange(0, block_units)
    t = tl.program_id(1) * block_tokens + tl.arange(0, block_tokens)
    x += batch * tokens * width
    grad += batch * tokens * width
    block += batch * 3 * units * width
    gate = tl.zeros([block_tokens, block_units], tl.float32)
    up = tl.zeros([block_tokens, block_units], tl.float32)
    back = tl.zeros([block_tokens, block_units], tl.float32)
    for start in range(0, width, block_width):
        c = start + tl.arange(0, block_width)
        rows, grads = _tile(x, t, c, tokens, width), _tile(grad, t, c, tokens, width)
        gate = _product(rows, tl.trans(_tile(block, r, c, units, width)), gate, precision)
        up = _product(rows, tl.trans(_tile(block + units * width, r, c, units, width)), up, precision)
        back = _product(grads, tl.trans(_tile(block + 2 * units * width, r, c, units, width)), back, precision)
    active = activate(gate, activation)
    size = tokens * units
    out += batch * 3 * size
    _put(out, back * up * slope(gate, activation), t, r, tokens, units)
    _put(out + size, back * active, t, r, tokens, units)
    _put(out + 2 * size, active * up, t, r, tokens, units)


@triton.jit(do_not_specialize=["tokens"])
def block_gradient(
    out, rows, x, grad, tokens, units: tl.constexpr, width: tl.constexpr, precision: tl.constexpr,
    block_tokens: tl.constexpr, block_units: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """Make ``out [B,3,R,C]`` of ``rows [B,3,T,R]``, sums over tokens. Grid: (blocks of width, blocks of units, 3 B)."""
    part, batch = tl.program_id(2) % 3, (tl.program_id(2) // 3).to(tl.int64)
    c = tl.program_id(0) * block_width + tl.arange(0, block_width)
    r = tl.program_id(1) * block_units + tl.arange(0, block_units)
    # Gate and up projection have read x; the down projection's result has the gradient itself.
    right = x
    if part == 2:
        right = grad
    right += batch * tokens * width
    rows += (batch * 3 + part) * tokens * units
    total = tl.zeros([block_units, block_width], tl.float32)
    for start in range(0, tokens, block_tokens):
        t = start + tl.arange(0, block_tokens)
        left = tl.trans(_tile(rows, t, r, tokens, units))
        total = _product(left, _tile(right, t, c, tokens, width), total, precision)
    _put(out + (batch * 3 + part) * units * width, total, r, c, units, width)
