"""``memc::rotary``: rotary position embedding."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from memc.dialect.base import Arguments, Cost, check, define


@dataclass(frozen=True)
class Rotary(Arguments):
    """Rotate pairs of channels by an angle that grows with the position (RoFormer, Su et al. 2021, eq. 34).

    ``x [B,H,T,D]``, ``positions [B,T]``, ``inv_freq [R/2]`` radians per token with R <= D; channels from R on pass
    through. Pair i is channels (i, i + R/2), or (2i, 2i + 1) when ``interleaved``. ``scaling`` multiplies cosine and
    sine (YaRN's attention factor). Angles are computed in float32 and the result has the type of ``x``.
    """

    x: Tensor
    positions: Tensor
    inv_freq: Tensor
    _: KW_ONLY
    interleaved: bool = False
    scaling: float = 1.0

    def outputs(self) -> Tensor:
        """Return uninitialised tensors of the shapes and types of the results."""
        check(self.x.dim() == 4, "x is [batch, heads, tokens, channels]")
        check(2 * self.inv_freq.shape[0] <= self.x.shape[3], "no more channels are rotated than there are")
        return self.x.new_empty(self.x.shape)

    def cost(self, context: int) -> Cost:
        """Return the work of one token."""
        x = self.x
        return Cost(6.0 * x.shape[1] * x.shape[3], 0.0)


rotary = define(
    "rotary",
    Rotary,
    grads_to=("x", "inv_freq"),
    mixes_tokens=False,
)
