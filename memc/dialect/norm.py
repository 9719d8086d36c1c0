"""``memc::norm``: root-mean-square and layer normalisation over the last axis."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from memc.dialect.base import Arguments, Cost, define


@dataclass(frozen=True)
class Norm(Arguments):
    """Normalise ``x [..., D]``: (x - mean) / sqrt(variance + eps) when ``center``, else x / sqrt(mean(x^2) + eps).

    Then times ``weight [D]`` plus ``bias [D]``. Computed in float32; the result has the type of ``x``.
    """

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    _: KW_ONLY
    eps: float
    center: bool = False

    def outputs(self) -> Tensor:
        """Return uninitialised tensors of the shapes and types of the results."""
        return self.x.new_empty(self.x.shape)

    def cost(self, context: int) -> Cost:
        """Return the work of one token."""
        x = self.x
        return Cost(5.0 * x.shape[-1], 0.0)


norm = define(
    "norm",
    Norm,
    grads_to=("x", "weight", "bias"),
    mixes_tokens=False,
)
