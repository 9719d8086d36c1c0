"""``memc::rotary`` in Triton: a block of tokens of one head to a program."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["heads", "tokens"])
def rotate(
    x,
    positions,
    inv_freq,
    out,
    heads,
    tokens,
    size: tl.constexpr,
    pairs: tl.constexpr,
    interleaved: tl.constexpr,
    scaling: tl.constexpr,
    block_tokens: tl.constexpr,
    block_pairs: tl.constexpr,
    block_rest: tl.constexpr,
):
    """Rotate ``x [B,H,T,size]`` by ``positions [B,T]`` times ``inv_freq [pairs]``; further channels pass through."""
    sequence = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)
    pair = tl.arange(0, block_pairs)
    present = token < tokens
    place = tl.load(positions + (sequence // heads) * tokens + token, mask=present, other=0).to(tl.float32)
    angle = place[:, None] * tl.load(inv_freq + pair, mask=pair < pairs, other=0.0).to(tl.float32)[None, :]
    cosine, sine = tl.cos(angle) * scaling, tl.sin(angle) * scaling
    row = (sequence * tokens + token)[:, None] * size
    first = row + (2 * pair if interleaved else pair)[None, :]
    second = first + (1 if interleaved else pairs)
    inside = present[:, None] & (pair < pairs)[None, :]
    a = tl.load(x + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + second, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + first, (a * cosine - b * sine).to(out.dtype.element_ty), mask=inside)
    tl.store(out + second, (b * cosine + a * sine).to(out.dtype.element_ty), mask=inside)
    if 2 * pairs < size:
        channel = 2 * pairs + tl.arange(0, block_rest)
        rest = row + channel[None, :]
        inside = present[:, None] & (channel < size)[None, :]
        tl.store(out + rest, tl.load(x + rest, mask=inside, other=0.0), mask=inside)
