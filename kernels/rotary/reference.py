"""``memc::rotary`` in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from memc.kernels.common import accumulation_type


def _angles(x: Tensor, positions: Tensor, inv_freq: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    kind = accumulation_type(x)
    angle = (positions.to(kind)[:, :, None] * inv_freq.to(kind))[:, None]
    return angle.cos() * scaling, angle.sin() * scaling


def _pairs(x: Tensor, rotated: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    x = x[..., :rotated].to(accumulation_type(x))
    return (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., : rotated // 2], x[..., rotated // 2 :])


def _join(first: Tensor, second: Tensor, x: Tensor, interleaved: bool) -> Tensor:
    both = torch.stack([first, second], -1).flatten(-2) if interleaved else torch.cat([first, second], -1)
    rotated = both.shape[-1]
    return torch.cat([both.to(x.dtype), x[..., rotated:]], -1)


def forward(
    x: Tensor, positions: Tensor, inv_freq: Tensor, *, interleaved: bool = False, scaling: float = 1.0
) -> Tensor:
    """Run ``memc::rotary``; arguments and results as its dialect page has them."""
    cos, sin = _angles(x, positions, inv_freq, scaling)
    first, second = _pairs(x, 2 * inv_freq.shape[0], interleaved)
    return _join(first * cos - second * sin, second * cos + first * sin, x, interleaved)


def backward(
    grad: Tensor,
    x: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    *,
    interleaved: bool = False,
    scaling: float = 1.0,
    needs_inv_freq: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of ``x``, which is ``grad`` rotated back, and of ``inv_freq``."""
    cos, sin = _angles(x, positions, inv_freq, scaling)
    rotated = 2 * inv_freq.shape[0]
    grad_first, grad_second = _pairs(grad, rotated, interleaved)
    grad_x = _join(grad_first * cos + grad_second * sin, grad_second * cos - grad_first * sin, grad, interleaved)
    if not needs_inv_freq:
        return grad_x.to(x.dtype), None
    first, second = _pairs(x, rotated, interleaved)
    # d out1 / d angle = -out2 and d out2 / d angle = out1.
    turned = grad_second * (first * cos - second * sin) - grad_first * (second * cos + first * sin)
    grad_freq = (turned.sum(1) * positions.to(turned.dtype)[:, :, None]).sum((0, 1))
    return grad_x.to(x.dtype), grad_freq.to(inv_freq.dtype)
