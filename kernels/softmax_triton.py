"""What the softmax kernels share: who reads whom, scores, and the softmax over one block of keys after another.

Scores are kept times log2(e), since the hardware's exponential has base 2; log-sum-exps that leave kernels are natural.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4e38)


@triton.jit
def readable(p, j, same, window: tl.constexpr, chunk: tl.constexpr, prefix: tl.constexpr, sinks: tl.constexpr):
    """Return the mask of keys at positions ``j`` that queries at ``p`` read; -1 is padding, ``same`` one sequence."""
    seen = j <= p
    if window > 0:
        near = p - j < window
        if sinks > 0:
            near = near | (j < sinks)
        seen = seen & near
    if chunk > 0:
        seen = seen & (p // chunk == j // chunk)
    if prefix > 0:
        seen = seen | ((p < prefix) & (j < prefix))
    return seen & (j >= 0) & (p >= 0) & same


@triton.jit
def load_rows(base, index, valid, size: tl.constexpr, block: tl.constexpr):
    """Load rows ``index`` of a matrix ``[., size]`` as ``[., block]``, 0 beyond size and where not ``valid``."""
    columns = tl.arange(0, block)
    mask = valid[:, None]
    if size < block:
        mask = mask & (columns < size)[None, :]
    return tl.load(base + index[:, None] * size + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, index, rows, valid, size: tl.constexpr, block: tl.constexpr):
    """Store ``rows [., block]`` to rows ``index`` of a matrix ``[., size]`` where they are ``valid``."""
    columns = tl.arange(0, block)
    mask = valid[:, None]
    if size < block:
        mask = mask & (columns < size)[None, :]
    tl.store(base + index[:, None] * size + columns[None, :], rows.to(base.dtype.element_ty), mask=mask)


@triton.jit
def capped(products, scale: tl.constexpr, softcap: tl.constexpr):
    """Return softcap tanh(scale products / softcap), or scale products without a cap, times log2(e)."""
    if softcap > 0:
        # tanh x = 1 - 2 / (e^2x + 1): right at both ends, where e^2x is 0 or infinite.
        tanh = 1.0 - 2.0 / (tl.exp2(products * (2.0 * scale / softcap * LOG2E)) + 1.0)
        scores = tanh * (softcap * LOG2E)
    else:
        scores = products * (scale * LOG2E)
    return scores


@triton.jit
def slope_of_capped(scores, scale: tl.constexpr, softcap: tl.constexpr):
    """Return the derivative, by the products, of the natural scores that :func:`capped` made."""
    if softcap > 0:
        tanh = scores * (1.0 / (softcap * LOG2E))
        slope = scale * (1.0 - tanh * tanh)
    else:
        slope = tl.full(scores.shape, scale, tl.float32)
    return slope


@triton.jit
def extend(top, total, out, scores, value, precision: tl.constexpr):
    """Add a block of keys, ``scores [M,N]`` (-inf: not read) and ``value [N,E]``, to a softmax that is under way.

    ``top [M]`` is the highest score so far, ``total [M]`` and ``out [M,E]`` the sums of weights and of weighted values
    (Milakov & Gimelshein 2018, algorithm 3).
    """
    higher = tl.maximum(top, tl.max(scores, 1))
    # A row that has read nothing yet: -inf less -inf is no number.
    origin = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - origin[:, None])
    shrink = tl.exp2(top - origin)
    total = total * shrink + tl.sum(weights, 1)
    out = tl.dot(weights.to(value.dtype), value, out * shrink[:, None], input_precision=precision)
    return higher, total, out


@triton.jit
def log_sum_exp(top, total):
    """Return the logarithm, to base 2, of a softmax's denominator; -inf for a row that reads nothing."""
    return tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
