"""``memc::norm``: root-mean-square and layer normalisation over the last axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memc.dialect.base import Cost, define


def _cost(a: Mapping[str, Any], context: int) -> Cost:
    x = a["x"]
    return Cost(5.0 * x.shape[-1], 0.0)


@define(
    "norm",
    "(Tensor x, Tensor? weight=None, Tensor? bias=None, *, float eps, bool center=False) -> Tensor",
    mixes_tokens=False,
    cost=_cost,
)
def norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float, center: bool = False
) -> Tensor:
    """Normalise ``x [..., D]``: (x - mean) / sqrt(variance + eps) when ``center``, else x / sqrt(mean(x^2) + eps).

    Then times ``weight [D]`` plus ``bias [D]``. Computed in float32; the result has the type of ``x``.
    """
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
