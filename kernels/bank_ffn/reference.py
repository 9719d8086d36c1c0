"""``memc::bank_ffn`` in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from memc.dialect.bank_ffn import BankFeedForward
from memc.kernels.bank_ffn.activations import SLOPES, VALUES
from memc.kernels.common import accumulation_type


def _widened(x: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    kind = torch.promote_types(accumulation_type(x), block.dtype)
    return x.to(kind), block.to(kind)


def _projected(x: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """Return x Gᵀ and x Uᵀ ``[B,T,R]``, of one product."""
    gate, up = (x @ block[:, :2].flatten(1, 2).transpose(1, 2)).chunk(2, -1)
    return gate, up


def forward(args: BankFeedForward) -> Tensor:
    """Run ``memc::bank_ffn``; arguments and results as its dialect page has them."""
    wide, weights = _widened(args.x, args.block)
    gate, up = _projected(wide, weights)
    return ((VALUES[args.activation](gate) * up) @ weights[:, 2]).to(args.x.dtype).contiguous()


def backward(args: BankFeedForward, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of ``x`` and ``block``."""
    wide, weights = _widened(args.x, args.block)
    gate, up = _projected(wide, weights)
    active = VALUES[args.activation](gate)
    grad = grad.to(wide.dtype)
    grad_hidden = grad @ weights[:, 2].transpose(1, 2)
    grad_gate, grad_up = grad_hidden * up * SLOPES[args.activation](gate), grad_hidden * active
    grad_x = grad_gate @ weights[:, 0] + grad_up @ weights[:, 1]
    pairs = ((grad_gate, wide), (grad_up, wide), (active * up, grad))
    return grad_x, torch.stack([rows.transpose(1, 2) @ columns for rows, columns in pairs], 1)
