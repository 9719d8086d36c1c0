"""``memc::compact_attention``: attention that rotates what it reads by where it stands among what is read."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from memc.dialect.attention import CausalAttention
from memc.dialect.base import Cost, check, define, log_sum_exp
from memc.dialect.selectors import methods
from memc.dialect.sparse_attention import GRADS_FROM, RETURNS, STATES, check_pages, pages_of

METHODS = methods(extending=True)
"""Methods whose distances stay within what a token reads, so that sequences may get longer than those trained on."""

REPRESENTATIVES = 4
"""Keys of a page whose mean represents it (InfLLM's ``repr_topk``)."""


def span(method: str, budget: int, window: int, dense_below: int) -> int:
    """Return how many positions keys and queries are rotated by, 0 the first of them."""
    return window + 1 if method == "infllm" else max(budget, dense_below)


@dataclass(frozen=True)
class CompactAttention(CausalAttention):
    """Attend causally to the tokens of ``budget / page`` pages, rotated by where they stand among these.

    Arguments as in ``memc::sparse_attention``, but that query and key are not rotated yet, and neither are the keys
    that are held; ``inv_freq [R/2]``, ``interleaved`` and ``scaling`` are those of ``memc::rotary``. A query at
    position p takes the pages of the first ``sinks`` tokens and of the last ``window``, then those whose description
    has the highest product with it (the highest over the heads that share a key-value head; of equal ones the lower
    page), and reads all their tokens up to p. Below ``dense_below`` it takes every page. What it reads is then rotated:

    - ``longheads`` (Lu et al. 2024): by its place among what is read, in order of time, the query by the last of these
      places. Places end at the larger of ``budget`` and ``dense_below``, less 1. Of a page is held the attention of
      its own subject to its keys, ``softmax(scale s.k) k`` before rotation, where s is the mean of what its tokens (and
      the heads that share the key-value head) get from attention to no more than the page: keys and values have equally
      many channels.
    - ``infllm`` (Xiao et al. 2024): so that the query is ``window`` or, where it is less, the true distance away. Of a
      page is held the mean of the ``REPRESENTATIVES`` of its keys with the highest product with the sum of the queries
      of the floor(window / page) pages that follow it (of equal ones the earlier); the window is a page at least.

    ``past_pages [B,G,ceil(S/page),2D]``, float32 or float64, holds these descriptions, 0 until they are known, and
    behind each one the sum that it is made from, over the tokens of the page so far: of what they get from their page,
    or of their queries, averaged over the heads that share the key-value head. A page has left the window by the time
    that it is described. Where nothing is left out and no distance clipped (up to position max(``budget``,
    ``dense_below``) - 1, or ``window``) this is ``memc::attention`` of rotated queries and keys.

    Returns output, log-sum-exp and states as ``memc::sparse_attention``, keys not rotated. Choosing has no gradient.
    """

    past_pages: Tensor
    inv_freq: Tensor
    sink_logits: Tensor | None = None
    _: KW_ONLY
    scale: float
    method: str
    page: int
    budget: int
    sinks: int
    window: int
    dense_below: int = 0
    softcap: float = 0.0
    interleaved: bool = False
    scaling: float = 1.0

    def outputs(self) -> tuple[Tensor, ...]:
        """Return uninitialised tensors of the shapes and types of the results."""
        out, (_, _, tokens, size) = self.out(), self.key.shape
        check(self.method in METHODS, f"method is one of {', '.join(METHODS)}")
        check_pages(self.page, self.budget, self.sinks, self.window)
        check(self.method != "infllm" or self.window >= self.page, "infllm needs a window of a page at least")
        same = size == self.value.shape[3]
        check(self.method != "longheads" or same, "longheads needs keys and values of one size")
        check(2 * self.inv_freq.shape[0] <= size, "no more channels are rotated than there are")
        lse, count = log_sum_exp(self.query), pages_of(self.past_key.shape[2] + tokens, self.page)
        return out, lse, *self.appended(), lse.new_empty(*self.key.shape[:2], count, 2 * size)

    @property
    def reads_all_to(self) -> int:
        """From how many tokens of a sequence on it chooses what it reads."""
        return max(self.budget, self.dense_below)

    def cost(self, context: int) -> Cost:
        """Return the work of one token."""
        query, key, value = self.query, self.key, self.value
        size, page = key.shape[3], self.page
        described, read = 0, context
        if context > self.dense_below:
            described, read = pages_of(context, page), min(context, self.budget)
        # Keys are rotated as they are read; a page is described from what the token's own page holds.
        own = page if self.method == "longheads" else 0
        channels = (read + own) * (size + value.shape[3])
        state = 4.0 * (described + 2) * size
        flops = 2.0 * query.shape[1] * (channels + described * size) + 6.0 * key.shape[1] * read * size
        return Cost(flops, (channels * key.dtype.itemsize + state) * key.shape[1])


compact_attention = define(
    "compact_attention",
    CompactAttention,
    returns=RETURNS,
    states=STATES,
    grads_from=GRADS_FROM,
    grads_to=("query", "key", "value", "past_key", "past_value", "inv_freq", "sink_logits"),
)
