"""Numbers in 8 or 4 bits: the nearest of evenly spaced levels between the ends of a range, and back."""

from __future__ import annotations

import torch
from torch import Tensor


def encode(x: Tensor, top: Tensor, low: Tensor, bits: int) -> Tensor:
    """Return the codes ``[..., ceil(C bits/8)]`` of ``x [..., C]`` between ``low`` and ``top``, which broadcast to it.

    With 4 bits a byte holds channel i in its low half and channel i + ceil(C/2) in its high half.
    """
    step = _step(top, low, bits)
    level = ((x - low) / torch.where(step > 0, step, 1)).round().clamp(0, levels(bits))
    if bits == 8:
        return level.to(torch.uint8)
    half = (level.shape[-1] + 1) // 2
    first, second = level[..., :half], level[..., half:]
    return (first + 16 * torch.nn.functional.pad(second, (0, half - second.shape[-1]))).to(torch.uint8)


def decode(codes: Tensor, top: Tensor, low: Tensor, bits: int, channels: int) -> Tensor:
    """Return the ``[..., channels]`` that codes stand for; see :func:`encode`."""
    level = codes if bits == 8 else torch.cat([codes & 15, codes >> 4], -1)[..., :channels]
    return low + level.to(low.dtype) * _step(top, low, bits)


def levels(bits: int) -> int:
    """Return the number of the highest level."""
    return (1 << bits) - 1


def _step(top: Tensor, low: Tensor, bits: int) -> Tensor:
    return (top - low) / levels(bits)
