"""Choices that serve several tokens: lists made by those whose turn it is, and what the tokens after them take.

Sizes: B batch, H heads, G key-value heads, T queries, N pages or tokens that are ranked, A choices, M entries of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memc.dialect.cuts import note_cut, note_taken
from memc.kernels.common import take
from memc.kernels.sparse_attention.choose import Rule, first, forced, needed, ranks
from memc.kernels.sparse_attention.reference import BLOCK_SCORES, Sequence


@dataclass(frozen=True)
class Choices:
    """The lists ``[B,G,A,M]`` that a sequence's tokens in a call take from, and which each token does ``[B,T]``."""

    lists: Tensor
    index: Tensor

    @staticmethod
    def of(
        query: Tensor, pages: Tensor, positions: Tensor, sequence: Sequence, past: Tensor, length: int, rule: Rule
    ) -> Choices:
        """Let those tokens choose whose turn it is.

        ``query [B,H,T,D]`` is times the scale, ``past [B,G,M]`` the list that the call begins with, ``length`` the
        positions that there is room for. Tokens that read everything, and other sequences', have index 0.
        """
        turn = torch.where(sequence.mine & (positions >= rule.dense_below), positions - rule.dense_below, -1)
        number = turn.div(rule.refresh, rounding_mode="floor")
        most = int(number.max()) + 1
        earliest = number.masked_fill(number < 0, most).amin(1, keepdim=True)
        index = (number - earliest).clamp_min(0)
        each = torch.arange(int(index.max()) + 1, device=positions.device)
        at = (earliest + each) * rule.refresh + rule.dense_below
        column = _columns(positions, sequence, length).gather(1, at.clamp_max(length))
        lists = _lists(query, pages, column, torch.where(column >= 0, at, -1), rule)
        # A list that was made before the call can only be a row's first.
        before = (column[:, :1] < 0)[:, None, None]
        lists[:, :, :1] = torch.where(before, past[:, :, None], lists[:, :, :1])
        return Choices(lists, index)

    def last(self, of: Tensor) -> Tensor:
        """Return the list ``[B,G,M]`` that the last of the tokens ``of [B,T]`` took from."""
        latest = torch.where(of, self.index, 0).amax(1)
        return torch.stack([self.lists[row, :, n] for row, n in enumerate(latest.tolist())])

    def candidates(self, rows: slice, at: Tensor, count: int, rule: Rule) -> Tensor:
        """Mark what tokens ``rows``, at ``at [B,T]``, take of ``count`` pages or tokens ``[B,G,T,N]``."""
        index = self.index[:, None, rows, None].expand(-1, self.lists.shape[1], -1, self.lists.shape[3])
        listed = self.lists.gather(2, index)
        places = torch.arange(rule.most, 0, -1, device=at.device).expand_as(listed)
        rank = places.new_zeros(*listed.shape[:3], count + 1)
        rank = rank.scatter(3, torch.where(listed >= 0, listed, count), places)[..., :count]
        must, seen = forced(at, count, rule)
        rank = torch.where(must, rule.most + 1, rank).masked_fill(~seen, 0)
        taken = first(rank, rule.most) & (rank > 0)
        if rule.mass < 1:
            note_taken(taken, rule.most, (at >= rule.dense_below) & (at >= 0))
        return taken


def _columns(positions: Tensor, sequence: Sequence, length: int) -> Tensor:
    """Return where in the call the token at each position ``[B,length + 1]`` of a sequence is, -1 for none."""
    columns = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    place = torch.full((len(positions), length + 1), -1, device=positions.device)
    where, what = (torch.where(sequence.mine, x, none) for x, none in ((positions, length), (columns, -1)))
    return place.scatter(1, where, what)


def _lists(query: Tensor, pages: Tensor, column: Tensor, at: Tensor, rule: Rule) -> Tensor:
    """Return the lists ``[B,G,A,M]`` that the tokens in ``column [B,A]`` make at ``at [B,A]``, block by block."""
    asking = take(query, column)
    count = pages.shape[2] * rule.piece // rule.unit
    size = max(1, BLOCK_SCORES // max(1, len(query) * query.shape[1] * count))
    made = []
    for q, p in zip(asking.split(size, 2), at.split(size, 1), strict=True):
        rank = ranks(q, pages, p, rule)
        rank = rank.masked_fill(~needed(rank, rule.mass), -torch.inf)
        note_cut(rank, rule.most)
        ordered = rank.sort(dim=-1, descending=True, stable=True)
        listed = ordered.indices.masked_fill(ordered.values == -torch.inf, -1)[..., : rule.most]
        made.append(torch.nn.functional.pad(listed, (0, rule.most - listed.shape[-1]), value=-1))
    return torch.cat(made, 2)
