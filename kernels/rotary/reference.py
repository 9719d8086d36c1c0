"""``memc::rotary`` in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from memc.dialect.rotary import Rotary
from memc.kernels.common import accumulation_type


def _angles(args: Rotary) -> tuple[Tensor, Tensor]:
    kind = accumulation_type(args.x)
    angle = (args.positions.to(kind)[:, :, None] * args.inv_freq.to(kind))[:, None]
    return angle.cos() * args.scaling, angle.sin() * args.scaling


def _pairs(x: Tensor, args: Rotary) -> tuple[Tensor, Tensor]:
    pairs = args.inv_freq.shape[0]
    x = x[..., : 2 * pairs].to(accumulation_type(x))
    return (x[..., 0::2], x[..., 1::2]) if args.interleaved else (x[..., :pairs], x[..., pairs:])


def _join(first: Tensor, second: Tensor, x: Tensor, args: Rotary) -> Tensor:
    both = torch.stack([first, second], -1).flatten(-2) if args.interleaved else torch.cat([first, second], -1)
    return torch.cat([both.to(x.dtype), x[..., both.shape[-1] :]], -1)


def forward(args: Rotary) -> Tensor:
    """Run ``memc::rotary``; arguments and results as its dialect page has them."""
    cos, sin = _angles(args)
    first, second = _pairs(args.x, args)
    return _join(first * cos - second * sin, second * cos + first * sin, args.x, args)


def backward(args: Rotary, grad: Tensor, *, needs_inv_freq: bool = True) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of ``x``, which is ``grad`` rotated back, and of ``inv_freq``."""
    cos, sin = _angles(args)
    grad_first, grad_second = _pairs(grad, args)
    back = _join(grad_first * cos + grad_second * sin, grad_second * cos - grad_first * sin, grad, args)
    grad_x = back.to(args.x.dtype)
    if not needs_inv_freq:
        return grad_x, None
    first, second = _pairs(args.x, args)
    # d out1 / d angle = -out2 and d out2 / d angle = out1.
    turned = grad_second * (first * cos - second * sin) - grad_first * (second * cos + first * sin)
    grad_freq = (turned.sum(1) * args.positions.to(turned.dtype)[:, :, None]).sum((0, 1))
    return grad_x, grad_freq.to(args.inv_freq.dtype)
