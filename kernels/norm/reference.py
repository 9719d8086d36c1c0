"""``memc::norm`` in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from memc.dialect.norm import Norm
from memc.kernels.common import accumulation_type


def normalised(x: Tensor, eps: float, center: bool) -> tuple[Tensor, Tensor]:
    """Return x / sqrt(mean(x^2) + eps) over the last axis, x centred first when asked, and the inverse root."""
    x = x.to(accumulation_type(x))
    if center:
        x = x - x.mean(-1, keepdim=True)
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * inverse, inverse


def forward(args: Norm) -> Tensor:
    """Run ``memc::norm``; arguments and results as its dialect page has them."""
    out, _ = normalised(args.x, args.eps, args.center)
    if args.weight is not None:
        out = out * args.weight.to(out.dtype)
    if args.bias is not None:
        out = out + args.bias.to(out.dtype)
    return out.to(args.x.dtype).contiguous()


def backward(args: Norm, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of ``x``, ``weight`` and ``bias`` (Ba et al. 2016; Zhang and Sennrich 2019)."""
    x, weight, bias = args.x, args.weight, args.bias
    hat, inverse = normalised(x, args.eps, args.center)
    grad = grad.to(hat.dtype)
    rows = tuple(range(x.dim() - 1))
    grad_weight = None if weight is None else (grad * hat).sum(rows).to(weight.dtype)
    grad_bias = None if bias is None else grad.sum(rows).to(bias.dtype)
    scaled = grad if weight is None else grad * weight.to(hat.dtype)
    grad_x = scaled - hat * (scaled * hat).mean(-1, keepdim=True)
    if args.center:
        grad_x = grad_x - scaled.mean(-1, keepdim=True)
    return (grad_x * inverse).to(x.dtype), grad_weight, grad_bias
