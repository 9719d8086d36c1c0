"""Which tokens a query reads: pages described, they or their tokens scored and chosen, and tokens ranked again.

Sizes: B batch, H heads, G key-value heads, T queries, P pages, L = P page tokens; token j of a sequence is column j.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from memc.dialect.base import Arguments
from memc.dialect.cuts import note_cut, note_share, note_taken
from memc.dialect.selectors import SELECTORS
from memc.dialect.sparse_attention import SPAN, described_tokens, entered, forced_pages
from memc.kernels.softmax_groups import Groups
from memc.kernels.sparse_attention import levels
from memc.kernels.sparse_attention.events import Numbered
from memc.kernels.sparse_attention.tree import reached


@dataclass(frozen=True)
class Rule:
    """How tokens are chosen; fields as the op's arguments.

    With ``own_page`` the page of the query itself is always read, also where tokens are ranked one by one.
    """

    scale: float
    method: str
    page: int
    budget: int
    sinks: int
    window: int
    rerank: int = 1
    dense_below: int = 0
    channels: int = 0
    own_page: bool = False
    refresh: int = 1
    mass: float = 1.0
    beam: int = 4
    contiguity: float = 0.0
    delay: int = 0

    @classmethod
    def of(cls, args: Arguments, **others: Any) -> Rule:
        """Return the rule of a call, and of ``others`` that are no options of its op."""
        given = {f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)}
        return cls(**given, **others)

    @property
    def by_token(self) -> bool:
        """Whether tokens are ranked by what describes them, not whole pages."""
        return SELECTORS[self.method].choice == "tokens"

    @property
    def by_tree(self) -> bool:
        """Whether pages are found by a search that does not look at all of them."""
        return SELECTORS[self.method].choice == "tree"

    @property
    def by_level(self) -> bool:
        """Whether the pages of the best super-pages alone are ranked."""
        return SELECTORS[self.method].choice == "levels"

    @property
    def entered(self) -> int:
        """Super-pages that are entered at most, beside the one that the window reaches into."""
        return entered(self.most, self.beam)

    @property
    def piece(self) -> int:
        """Tokens of what is described together."""
        return described_tokens(self.method, self.page)

    @property
    def grouped(self) -> bool:
        """Whether pages beside those of sinks and window are read through their landmarks."""
        return SELECTORS[self.method].grouped

    @property
    def by_event(self) -> bool:
        """Whether tokens are ranked by the events that they belong to."""
        return SELECTORS[self.method].eventful

    @property
    def alike(self) -> int:
        """Tokens that are taken by their own events' scores at most, before those of the events beside."""
        return self.most - math.floor(self.contiguity * self.most)

    @property
    def unit(self) -> int:
        """Tokens of what is ranked: those of a page, or one."""
        return 1 if self.by_token else self.page

    @property
    def most(self) -> int:
        """Pages or tokens that are taken at most, before they are ranked again."""
        return self.rerank * self.budget // self.unit


def describe(keys: Tensor, method: str) -> Tensor:
    """Return the descriptions of pages of ``keys [..., page, D]``, shaped as the dialect says."""
    match SELECTORS[method].descriptor:
        case "channels":
            return keys.mT
        case "bounds":
            return torch.cat([keys.amax(-2), keys.amin(-2)], -1)
        case "mean":
            return keys.mean(-2)
        case "centre":
            return keys[..., keys.shape[-2] // 2, :]
        case "landmark":
            return keys[..., -1, :]
        case _:
            mean = keys.mean(-2, keepdim=True)
            return torch.cat([mean[..., 0, :], (keys - mean).square().mean(-2)], -1)


def features(query: Tensor, method: str) -> Tensor:
    """Return what of ``query [..., D]`` is multiplied with a page's description to give the score of the two."""
    match SELECTORS[method].scorer:
        case "bound":
            return torch.cat([query.clamp_min(0), query.clamp_max(0)], -1)
        case "product":
            return query
        case _:
            return torch.cat([query, query.square() / 2], -1)


def best_of_group(query: Tensor, rows: Tensor) -> Tensor:
    """Return each group's highest product ``[B,G,T,N]`` of its heads' ``query [B,H,T,C]`` and ``rows [B,G,N,C]``."""
    batch, heads, tokens, size = query.shape
    groups = rows.shape[1]
    products = query.reshape(batch, groups, heads // groups * tokens, size) @ rows.mT
    return products.view(batch, groups, heads // groups, tokens, -1).amax(2)


def strongest(query: Tensor, groups: int, count: int) -> Tensor:
    """Keep, of ``query [B,H,T,D]``, the ``count`` channels of the highest magnitudes, summed over a group's heads."""
    by_group = query.unflatten(1, (groups, -1))
    kept: Tensor = by_group * first(by_group.abs().sum(2, keepdim=True), count)
    return kept.flatten(1, 2)


def first(rank: Tensor, count: int) -> Tensor:
    """Mark the ``count`` highest of each row of ``rank [..., N]``, of equals those at lower indices."""
    if count >= rank.shape[-1]:
        return torch.ones_like(rank, dtype=torch.bool)
    note_cut(rank, count)
    least = rank.topk(count, dim=-1).values[..., -1:]
    above, level = rank > least, rank == least
    return above | (level & (level.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def forced(at: Tensor, count: int, rule: Rule) -> tuple[Tensor, Tensor]:
    """Mark, of ``count`` pages or tokens, those that queries at ``at [B,T]`` always take, and all that they may.

    Two masks ``[B,1,T,N]``. Where tokens are ranked the page of the query itself is taken, which may not be complete,
    and is not described before it is.
    """
    number = torch.arange(count, device=at.device)
    p = at[:, None, :, None]
    if rule.by_token:
        seen = number <= p
        near = (p - number < rule.window) | (number // rule.page == p // rule.page)
        return seen & (near | (number < rule.sinks)), seen
    seen = number <= p // rule.page
    near = number >= edge_of(at, rule)
    return seen & (near | (number * rule.page < rule.sinks)), seen


def groups(at: Tensor, count: int, rule: Rule) -> Groups | None:
    """Return which of ``count`` pages queries at ``at [B,T]`` read through their landmarks, if they take them.

    None where a method weighs tokens alone.
    """
    if not rule.grouped:
        return None
    must, seen = forced(at, count, rule)
    through = seen & ~must & (at >= rule.dense_below)[:, None, :, None]
    return Groups(through[:, :, None], rule.page)


def edge_of(at: Tensor, rule: Rule) -> Tensor:
    """Return the first page ``[B,1,T,1]`` that the window of queries at ``at [B,T]`` reaches into."""
    return (at[:, None, :, None] - rule.window + 1).clamp_min(0) // rule.page


def found(scores: Tensor, at: Tensor, must: Tensor, rule: Rule) -> Tensor:
    """Mark the pages ``[B,G,T,P]`` that a tree search finds, by ``scores``, beside those that ``must`` be taken."""
    end = edge_of(at, rule)
    start = end.clamp_max(-(-rule.sinks // rule.page))
    count = rule.most - must.sum(-1, keepdim=True)
    # Longest is what few ranges are made of: of at least so many pages as are left when all that may be forced are.
    least = max(1, rule.most - forced_pages(rule.page, rule.sinks, rule.window))
    return reached(scores, start, end, count, rule.most, (-(-scores.shape[3] // least) - 1).bit_length())


def looked_at(query: Tensor, held: Tensor, at: Tensor, rule: Rule) -> Tensor:
    """Mark the pages ``[B,G,T,P]`` of the super-pages that queries enter, by what is ``held [B,G,M,1+SPAN,2D]``."""
    above = best_of_group(features(query, rule.method), held[:, :, :, 0])
    rank = levels.ranked(above, -(-rule.sinks // rule.page), edge_of(at, rule))
    return (first(rank, rule.entered + 1) & (rank > -torch.inf)).repeat_interleave(SPAN, -1)


def ranks(query: Tensor, pages: Tensor, at: Tensor, rule: Rule, numbered: Numbered | None = None) -> Tensor:
    """Return what pages or tokens ``[B,G,T,N]`` are ranked by, for queries ``[B,H,T,D]``, times the scale, at ``at``.

    What is always taken has infinity, what may not be taken, or was not found, minus infinity. Tokens that are
    ``numbered`` have the highest of their event.
    """
    if rule.by_token:
        rank = best_of_group(strongest(query, pages.shape[1], rule.channels), pages.mT.flatten(2, 3))
    else:
        described = levels.lower(pages) if rule.by_level else pages
        rank = best_of_group(features(query, rule.method), described)
    must, seen = forced(at, rank.shape[3], rule)
    if rule.by_tree:
        rank = rank.masked_fill(~found(rank, at, must, rule), -torch.inf)
    if rule.by_level:
        rank = rank.masked_fill(~looked_at(query, pages, at, rule), -torch.inf)
    if numbered is not None:
        rank = numbered.whole(rank)
    return rank.masked_fill(must, torch.inf).masked_fill(~seen, -torch.inf)


def candidates(query: Tensor, pages: Tensor, at: Tensor, rule: Rule, events: Tensor | None = None) -> Tensor:
    """Mark the pages or tokens ``[B,G,T,N]`` that queries ``[B,H,T,D]``, times the scale, at ``at [B,T]`` take.

    ``events [B,N]`` are the numbers of the tokens' events where these are ranked by.
    """
    if rule.by_event:
        count = pages.shape[2] * rule.page
        numbered = Numbered.of(at.new_full((len(at), count), -1) if events is None else events, at, rule.delay)
        rank = ranks(query, pages, at, rule, numbered)
        taken = first(rank, rule.alike) & (rank > -torch.inf)
        beside = numbered.beside(rank, taken).masked_fill(taken | (rank == torch.inf), torch.inf)
        return first(beside, rule.most) & (beside > -torch.inf)
    rank = ranks(query, pages, at, rule)
    taken = first(rank, rule.most) & (rank > -torch.inf) & needed(rank, rule.mass)
    if rule.mass < 1:
        note_taken(taken, rule.most, (at >= rule.dense_below) & (at >= 0))
    return taken


def needed(rank: Tensor, mass: float) -> Tensor:
    """Mark, of each row of ``rank [..., N]``, the best that hold a share ``mass`` of the exponentials of those scored.

    The least number of them, of equal ones those at lower indices; what is always taken, at infinity, holds nothing.
    """
    if mass == 1:
        return torch.ones_like(rank, dtype=torch.bool)
    ordered = rank.sort(dim=-1, descending=True, stable=True)
    kept = enough(ordered.values, mass)
    return torch.zeros_like(kept).scatter(-1, ordered.indices, kept)


def enough(ordered: Tensor, mass: float) -> Tensor:
    """Mark, as :func:`needed`, of ranks ``ordered [..., N]`` from the highest down."""
    weight = ordered.masked_fill(ordered.isinf(), -torch.inf).softmax(-1).nan_to_num()
    before = weight.cumsum(-1) - weight
    note_share(before, mass)
    return (before < mass) | (ordered == torch.inf)


def chosen(query: Tensor, keys: Tensor, pages: Tensor, at: Tensor, rule: Rule, events: Tensor | None = None) -> Tensor:
    """Mark the tokens ``[B,G,T,L]`` that queries ``[B,H,T,D]`` at positions ``at [B,T]`` read of ``keys [B,G,L,D]``.

    ``events [B,L]`` as in :func:`candidates`.
    """
    query = query * rule.scale
    return narrowed(query, keys, candidates(query, pages, at, rule, events), at, rule)


def narrowed(query: Tensor, keys: Tensor, taken: Tensor, at: Tensor, rule: Rule) -> Tensor:
    """Mark what is read of the candidates ``taken [B,G,T,N]``: all of their tokens, or the best by whole keys.

    Arguments as in :func:`chosen`, the query times the scale.
    """
    p, j = at[:, None, :, None], torch.arange(keys.shape[2], device=keys.device)
    seen = j <= p
    tokens = taken.repeat_interleave(rule.unit, -1) & seen
    if rule.rerank > 1:
        must = (j < rule.sinks) | (p - j < rule.window)
        if rule.own_page:
            must = must | (j // rule.page == p // rule.page)
        rank = best_of_group(query, keys).masked_fill(must, torch.inf).masked_fill(~tokens, -torch.inf)
        tokens = first(rank, rule.budget) & tokens
    return tokens | (seen & (p < rule.dense_below))
