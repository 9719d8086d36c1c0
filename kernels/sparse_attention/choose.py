"""Which tokens a query reads: pages described, they or their tokens scored and chosen, and tokens ranked again.

Sizes: B batch, H heads, G key-value heads, T queries, P pages, L = P page tokens; token j of a sequence is column j.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memc.dialect.selectors import SELECTORS


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
    rerank: int
    dense_below: int
    channels: int = 0
    own_page: bool = False

    @property
    def by_token(self) -> bool:
        """Whether tokens are ranked by what describes them, not whole pages."""
        return SELECTORS[self.method].choice == "tokens"


def describe(keys: Tensor, method: str) -> Tensor:
    """Return the descriptions of pages of ``keys [..., page, D]``, shaped as the dialect says."""
    match SELECTORS[method].descriptor:
        case "channels":
            return keys.mT
        case "bounds":
            return torch.cat([keys.amax(-2), keys.amin(-2)], -1)
        case "mean":
            return keys.mean(-2)
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
    least = rank.topk(count, dim=-1).values[..., -1:]
    above, level = rank > least, rank == least
    return above | (level & (level.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def chosen_pages(query: Tensor, pages: Tensor, at: Tensor, rule: Rule) -> Tensor:
    """Mark the pages ``[B,G,T,P]`` that queries ``[B,H,T,D]``, times the scale, at positions ``at [B,T]`` take."""
    number = torch.arange(pages.shape[2], device=pages.device)
    p = at[:, None, :, None]
    seen = number <= p // rule.page
    near = number >= (p - rule.window + 1).clamp_min(0) // rule.page
    forced = seen & (near | (number * rule.page < rule.sinks))
    rank = best_of_group(features(query, rule.method), pages)
    rank = rank.masked_fill(forced, torch.inf).masked_fill(~seen, -torch.inf)
    return first(rank, rule.rerank * rule.budget // rule.page) & seen


def chosen_by_channels(query: Tensor, pages: Tensor, at: Tensor, rule: Rule) -> Tensor:
    """Mark the tokens ``[B,G,T,L]`` that queries ``[B,H,T,D]`` take by their strongest channels, as ``lowbit`` does."""
    p, j = at[:, None, :, None], torch.arange(pages.shape[2] * rule.page, device=pages.device)
    seen = j <= p
    # The page of the query itself may not be complete, and is not described before it is.
    forced = seen & ((j < rule.sinks) | (p - j < rule.window) | (j // rule.page == p // rule.page))
    rank = best_of_group(strongest(query, pages.shape[1], rule.channels), pages.mT.flatten(2, 3))
    rank = rank.masked_fill(forced, torch.inf).masked_fill(~seen, -torch.inf)
    return first(rank, rule.rerank * rule.budget) & seen


def chosen(query: Tensor, keys: Tensor, pages: Tensor, at: Tensor, rule: Rule) -> Tensor:
    """Mark the tokens ``[B,G,T,L]`` that queries ``[B,H,T,D]`` at positions ``at [B,T]`` read of ``keys [B,G,L,D]``."""
    query = query * rule.scale
    p, j = at[:, None, :, None], torch.arange(keys.shape[2], device=keys.device)
    seen = j <= p
    if rule.by_token:
        tokens = chosen_by_channels(query, pages, at, rule)
    else:
        tokens = chosen_pages(query, pages, at, rule).repeat_interleave(rule.page, -1) & seen
    if rule.rerank > 1:
        forced = (j < rule.sinks) | (p - j < rule.window)
        if rule.own_page:
            forced = forced | (j // rule.page == p // rule.page)
        rank = best_of_group(query, keys).masked_fill(forced, torch.inf).masked_fill(~tokens, -torch.inf)
        tokens = first(rank, rule.budget) & tokens
    return tokens | (seen & (p < rule.dense_below))
