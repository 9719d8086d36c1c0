"""``memc::refreshed_attention``: ``memc::sparse_attention`` whose choices serve several tokens each."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from memc.dialect.base import check, define
from memc.dialect.selectors import SELECTORS
from memc.dialect.sparse_attention import (
    GRADS_FROM,
    GRADS_TO,
    RETURNS,
    STATES,
    ChoosingAttention,
    SparseAttention,
)


def most_chosen(method: str, page: int, budget: int, rerank: int) -> int:
    """Return how many pages, or tokens of a method that ranks tokens, a choice holds."""
    return rerank * budget // (1 if SELECTORS[method].choice == "tokens" else page)


@dataclass(frozen=True)
class RefreshedAttention(ChoosingAttention):
    """Attend causally to at most ``budget`` tokens, of candidates that ``refresh`` tokens in a row share.

    The mask refresh of HiP attention (Lee et al. 2024), for any method. Arguments not named here as in
    ``memc::sparse_attention``. The query at position a chooses for the ``refresh`` tokens from a on, where a =
    ``dense_below`` + n ``refresh`` for any n from 0 on. Its choice is a list ``past_choice [B,G,M]`` of the M =
    ``rerank budget / page`` pages (``lowbit``: ``rerank budget`` tokens) that ``memc::sparse_attention`` would take at
    a: those that are always taken, by number, then the others from the highest score down; -1 behind the last, which
    comes earlier with ``mass`` under 1. A token at p takes what p itself is always to take, sinks and window, and of
    the list what comes first of the rest, M in all; with ``rerank`` over 1 it ranks their tokens by its own query.
    ``window`` is at least ``refresh``, so that every token newer than the choice is in the window.

    Which tokens choose depends on positions alone, and the list is state: any split gives the same. A sequence start
    clears it. Returns what ``memc::sparse_attention`` does, and the list of the last token of each row.
    """

    past_choice: Tensor
    sink_logits: Tensor | None = None
    _: KW_ONLY
    refresh: int

    @property
    def served(self) -> int:
        """How many tokens share a choice."""
        return self.refresh

    def prompt_flops(self, context: int) -> float:
        """Return the operations of one token of a prompt, which is multiplied with all that its turn has fetched."""
        flops = self.cost(context).flops
        if context <= self.reads_all_to:
            return flops
        ranked_out = min(context, self.rerank * self.budget) - self.budget
        return flops + 2.0 * self.query.shape[1] * ranked_out * self.value.shape[3]

    def outputs(self) -> tuple[Tensor, ...]:
        """Return uninitialised tensors of the shapes and types of the results."""
        fits = 1 <= self.refresh <= self.window
        check(fits, "refresh is at least 1 and at most the window, which holds what the choice cannot")
        results = super().outputs()
        most = most_chosen(self.method, self.page, self.budget, self.rerank)
        return *results, self.positions.new_empty(*self.key.shape[:2], most)


refreshed_attention = define(
    "refreshed_attention",
    RefreshedAttention,
    returns=(*RETURNS, "next_choice"),
    states=(*STATES, "past_choice"),
    grads_from=GRADS_FROM,
    grads_to=GRADS_TO,
)

Choosing = SparseAttention | RefreshedAttention
"""Calls of either op, which differ in who chooses alone."""
