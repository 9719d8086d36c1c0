"""``memc::rotary`` in Triton: a block of tokens of one head to a program."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def turned(angle):
    """Return cosine and sine of angles of up to 2^22 quarters of a turn, as exact as an angle in float32 is.

    What is left beyond whole quarters goes into Cephes' polynomials (Moshier, ``sinf.c``). The vendors' functions keep
    a path for larger angles, whose table Triton before 3.9 leaves in memory: that is slow, and reads as a spill.
    """
    quarters = angle * 0.6366197723675814 + 12582912.0 - 12582912.0
    # Half of pi in three parts, so that the first products are exact.
    x = angle - quarters * 1.5703125 - quarters * 4.837512969970703125e-4 - quarters * 7.54978995489188216e-8
    y = x * x
    sine = x + x * y * (-1.6666654611e-1 + y * (8.3321608736e-3 - y * 1.9515295891e-4))
    cosine = 1.0 - 0.5 * y + y * y * (4.166664568298827e-2 + y * (-1.388731625493765e-3 + y * 2.443315711809948e-5))
    quadrant = quarters.to(tl.int32)
    odd = (quadrant & 1) == 1
    first, second = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where(((quadrant + 1) & 2) == 2, -first, first), tl.where((quadrant & 2) == 2, -second, second)


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
    cosine, sine = turned(angle)
    cosine, sine = cosine * scaling, sine * scaling
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
