"""``memc::full_attention``: stateless softmax attention (bidirectional, cross, or under an arbitrary additive bias)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from memc.dialect.base import Arguments, Cost, check_heads, define


@dataclass(frozen=True)
class FullAttention(Arguments):
    """Attend to every key.

    ``query [B,H,T,D]``, ``key [B,G,S,D]``, ``value [B,G,S,E]`` -> ``[B,H,T,E]``. Keys at ``key_positions [B,S]`` -1 are
    padding and read by nobody. ``bias``, broadcast to ``[B,H,T,S]``, is added to the scores after ``scale`` and
    ``softcap``; -inf masks. A row with nothing to read gives 0. ``sink_logits [H]`` join the denominator without a
    value.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_positions: Tensor | None = None
    bias: Tensor | None = None
    sink_logits: Tensor | None = None
    _: KW_ONLY
    scale: float
    softcap: float = 0.0

    def outputs(self) -> Tensor:
        """Return uninitialised tensors of the shapes and types of the results."""
        check_heads(self.query, self.key, self.value)
        return self.query.new_empty(*self.query.shape[:3], self.value.shape[3])

    def cost(self, context: int) -> Cost:
        """Return the work of one token."""
        query, key, value = self.query, self.key, self.value
        if isinstance(key.shape[2], int):  # a model without tokens, such as one of image patches: all of a fixed number
            context = key.shape[2]
        queries = query.shape[2] if isinstance(query.shape[2], int) else 1
        flops = 2.0 * queries * query.shape[1] * context * (query.shape[3] + value.shape[3])
        return Cost(flops, float(context * key.shape[1] * (key.shape[3] + value.shape[3]) * key.dtype.itemsize))


full_attention = define(
    "full_attention",
    FullAttention,
    grads_to=("query", "key", "value", "bias", "sink_logits"),
    split_invariant=False,
    depends_on="tokens that come later",
)
