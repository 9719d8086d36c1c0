"""``memc::norm`` in Triton: a block of rows to a program, one read and one write of each."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def normalise(
    x,
    weight,
    bias,
    out,
    rows,
    size: tl.constexpr,
    eps: tl.constexpr,
    center: tl.constexpr,
    weighted: tl.constexpr,
    biased: tl.constexpr,
    block_rows: tl.constexpr,
    block_size: tl.constexpr,
):
    """Normalise rows of ``x [rows, size]``."""
    row = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    channel = tl.arange(0, block_size)
    inside = (row < rows)[:, None] & (channel < size)[None, :]
    place = row[:, None] * size + channel[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if center:
        value = tl.where(inside, value - (tl.sum(value, 1) / size)[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, 1) / size + eps)
    value = value * inverse[:, None]
    if weighted:
        value = value * tl.load(weight + channel, mask=channel < size, other=0.0).to(tl.float32)[None, :]
    if biased:
        value = value + tl.load(bias + channel, mask=channel < size, other=0.0).to(tl.float32)[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)
