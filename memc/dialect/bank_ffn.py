"""``memc::bank_ffn``: a gated feed-forward network whose weights are fetched, another one for each sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memc.dialect.base import Cost, check, define

ACTIVATIONS = (
    "silu",
    "gelu",
    "gelu_tanh",
    "quick_gelu",
    "relu",
    "relu2",
    "sigmoid",
    "tanh",
    "softplus",
    "elu",
    "mish",
)
"""Names of the activations, those that raising gives to feed-forward blocks."""


def _cost(a: Mapping[str, Any], context: int) -> Cost:
    _, parts, units, width = a["block"].shape
    weights = parts * units * width
    return Cost(2.0 * weights, float(weights * a["block"].dtype.itemsize))


@define("bank_ffn", "(Tensor x, Tensor block, str activation) -> Tensor", mixes_tokens=False, cost=_cost)
def bank_ffn(x: Tensor, block: Tensor, activation: str) -> Tensor:
    """Run ``x [B,T,C]`` through each sequence's own block (hierarchical memories, arXiv 2510.02375, section 3.2).

    ``block [B,3,R,C]`` holds the gate G, the up projection U and the down projection D of R hidden units; row i of each
    is unit i. Returns ``[B,T,C]``, of the type of ``x``: (activation(x Gᵀ) * (x Uᵀ)) D. ``activation`` is one of
    ``ACTIVATIONS``. Where D is zero the result is zero, whatever G and U are, as long as they are finite.
    """
    check(x.dim() == 3 and block.dim() == 4, "x is [batch, tokens, width] and block [batch, 3, units, width]")
    check(block.shape[1] == 3, "a block has a gate, an up and a down projection")
    check(block.shape[3] == x.shape[2], "x and block have the same width")
    check(activation in ACTIVATIONS, f"activation is one of {', '.join(ACTIVATIONS)}")
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
