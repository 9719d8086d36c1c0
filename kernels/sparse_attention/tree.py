"""Top-k tree search over pages: ranges of them, halved as long as any has several, of which the best go on.

Letters as in ``choose``, and K ranges at most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memc.dialect.cuts import note_cut


def reached(scores: Tensor, start: Tensor, end: Tensor, count: Tensor, most: int, rounds: int) -> Tensor:
    """Mark the pages ``[B,G,T,P]`` that a search among those from ``start`` to ``end`` finds, ``count`` of them.

    ``scores [B,G,T,P]`` are those of the pages, of which only representatives are looked at; the others are
    ``[B,1,T,1]`` each, and ``count`` is at most ``most``. The pages are cut into ``count`` ranges, as
    equal as can be (all pages, if they are no more). Each round halves every range, the first half the shorter one,
    scores the halves by the page in their middle and keeps the best ``count``, of equal ones those that come first;
    HiP attention (Lee et al. 2024), algorithm 1. ``rounds`` are enough to halve any range to single pages; one more
    leaves those as they are, so that the host need not look when all are.
    """
    length = (end - start).clamp_min(0)
    count = count.clamp_min(0).minimum(length)
    number = torch.arange(most, device=scores.device)
    live = (number < count).expand(*scores.shape[:3], -1)
    pieces = count.clamp_min(1)
    left, right = (start + length * n // pieces for n in (number, number + 1))
    left, right = (torch.where(live, x, 0) for x in (left, right))
    for _ in range(rounds):
        left, right = _best_halves(scores, left, right, live)
    found = torch.zeros(*scores.shape[:3], scores.shape[3] + 1, dtype=torch.bool, device=scores.device)
    return found.scatter(3, torch.where(live, left, scores.shape[3]), value=True)[..., :-1]


def _best_halves(scores: Tensor, left: Tensor, right: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best halves of ranges ``[B,G,T,K]``, as many as are ``live``, in order; dead ones are empty."""
    middle = left + (right - left) // 2
    starts, ends = (torch.stack(x, -1).flatten(-2) for x in ((left, middle), (middle, right)))
    centre = starts + (ends - starts) // 2
    rank = scores.gather(3, centre.clamp_max(scores.shape[3] - 1)).masked_fill(starts == ends, -torch.inf)
    note_cut(rank, live.sum(-1, keepdim=True))
    best = rank.sort(dim=-1, descending=True, stable=True).indices[..., : left.shape[3]]
    kept = torch.where(live, best, starts.shape[3]).sort(-1).values
    there, kept = kept < starts.shape[3], kept.clamp_max(starts.shape[3] - 1)
    return torch.where(there, starts.gather(3, kept), 0), torch.where(there, ends.gather(3, kept), 0)
