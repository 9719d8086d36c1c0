"""``memc::bank_ffn``: a gated feed-forward network whose weights are fetched, another one for each sequence."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from memc.dialect.base import Arguments, Cost, check, define

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


@dataclass(frozen=True)
class BankFeedForward(Arguments):
    """Run ``x [B,T,C]`` through each sequence's own block (hierarchical memories, arXiv 2510.02375, section 3.2).

    ``block [B,3,R,C]`` holds the gate G, the up projection U and the down projection D of R hidden units; row i of each
    is unit i. Returns ``[B,T,C]``, of the type of ``x``: (activation(x Gᵀ) * (x Uᵀ)) D. ``activation`` is one of
    ``ACTIVATIONS``. Where D is zero the result is zero, whatever G and U are, as long as they are finite.
    """

    x: Tensor
    block: Tensor
    _: KW_ONLY
    activation: str

    def outputs(self) -> Tensor:
        """Return uninitialised tensors of the shapes and types of the results."""
        ranks = self.x.dim() == 3 and self.block.dim() == 4
        check(ranks, "x is [batch, tokens, width] and block [batch, 3, units, width]")
        check(self.block.shape[1] == 3, "a block has a gate, an up and a down projection")
        check(self.block.shape[3] == self.x.shape[2], "x and block have the same width")
        check(self.activation in ACTIVATIONS, f"activation is one of {', '.join(ACTIVATIONS)}")
        return self.x.new_empty(self.x.shape)

    def cost(self, context: int) -> Cost:
        """Return the work of one token."""
        _, parts, units, width = self.block.shape
        weights = parts * units * width
        return Cost(2.0 * weights, float(weights * self.block.dtype.itemsize))


bank_ffn = define(
    "bank_ffn",
    BankFeedForward,
    grads_to=("x", "block"),
    mixes_tokens=False,
)
