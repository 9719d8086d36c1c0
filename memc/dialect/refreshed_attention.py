"""``memc::refreshed_attention``: ``memc::sparse_attention`` whose choices serve several tokens each."""

from __future__ import annotations

import torch
from torch import Tensor

from memc.dialect.base import check, define
from memc.dialect.selectors import SELECTORS
from memc.dialect.sparse_attention import cost, sparse_attention


def most_chosen(method: str, page: int, budget: int, rerank: int) -> int:
    """Return how many pages, or tokens of a method that ranks tokens, a choice holds."""
    return rerank * budget // (1 if SELECTORS[method].choice == "tokens" else page)


@define(
    "refreshed_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor positions,"
    " Tensor past_key, Tensor past_value, Tensor past_positions, Tensor past_pages, Tensor past_choice,"
    " Tensor? sink_logits=None, *, float scale, str method, int page, int budget, int sinks, int window, int refresh,"
    " int rerank=1, int dense_below=0, float softcap=0.0, int channels=0, float mass=1.0)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    states={"past_key": 2, "past_value": 3, "past_positions": 4, "past_pages": 5, "past_choice": 6},
    cost=cost,
    reads_all_to=lambda a: max(int(a["budget"]), int(a["dense_below"])),
)
def refreshed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_positions: Tensor,
    past_pages: Tensor,
    past_choice: Tensor,
    sink_logits: Tensor | None = None,
    *,
    scale: float,
    method: str,
    page: int,
    budget: int,
    sinks: int,
    window: int,
    refresh: int,
    rerank: int = 1,
    dense_below: int = 0,
    softcap: float = 0.0,
    channels: int = 0,
    mass: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
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
    check(1 <= refresh <= window, "refresh is at least 1 and at most the window, which holds what the choice cannot")
    past = (past_key, past_value, past_positions, past_pages)
    options = {"scale": scale, "method": method, "page": page, "budget": budget, "sinks": sinks, "window": window}
    options |= {"rerank": rerank, "dense_below": dense_below, "softcap": softcap, "channels": channels}
    options["mass"] = mass
    results = sparse_attention.overload(query, key, value, positions, *past, sink_logits, **options)
    most = most_chosen(method, page, budget, rerank)
    return (*results, torch.empty(query.shape[0], key.shape[1], most, dtype=torch.int64, device=query.device))
