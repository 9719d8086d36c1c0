"""Which pages a query reads and where it puts their tokens: descriptions, choice, positions.

Sizes: B batch, H heads, G key-value heads, T queries, N pages, K pages read by a query, L = K page of their tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memc.dialect.compact_attention import REPRESENTATIVES
from memc.dialect.rotary import Rotary
from memc.dialect.selectors import SELECTORS
from memc.kernels.rotary.reference import forward as rotate
from memc.kernels.softmax import attend, weights
from memc.kernels.sparse_attention.choose import Rule, candidates, first


@dataclass(frozen=True)
class Angles:
    """How ``memc::rotary`` turns pairs of channels; fields as its arguments."""

    inv_freq: Tensor
    interleaved: bool
    scaling: float

    def rotary(self, x: Tensor, positions: Tensor) -> Rotary:
        """Return how ``x [B,H,T,D]`` is rotated by ``positions [B,T]``."""
        return Rotary(x, positions, self.inv_freq, interleaved=self.interleaved, scaling=self.scaling)

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate ``x [B,H,T,D]`` by ``positions [B,T]``."""
        return rotate(self.rotary(x, positions))


@dataclass(frozen=True)
class Reads:
    """What queries read: ``tokens [B,G,T,L]`` in order of time, ``live`` where there is one, and the angles' positions.

    ``key_at [B,G,T,L]`` and ``query_at [B,G,T]`` are what keys and queries are rotated by.
    """

    tokens: Tensor
    live: Tensor
    key_at: Tensor
    query_at: Tensor


def follows(rule: Rule) -> int:
    """Return how many pages have to be complete behind a page before it is described."""
    return rule.window // rule.page if SELECTORS[rule.method].descriptor == "representatives" else 0


def gathered(
    query: Tensor, key: Tensor, value: Tensor, there: Tensor, rule: Rule, angles: Angles, cap: float
) -> Tensor:
    """Return what new tokens add to the sums of their pages ``[B,G,N,D]``.

    ``query [B,H,L,D]``, ``key [B,G,L,D]`` and ``value [B,G,L,E]`` are by position, N pages of them; ``there [B,L]`` are
    the tokens that are new.
    """
    batch, heads, length, _ = query.shape
    groups, pages = key.shape[1], length // rule.page
    if SELECTORS[rule.method].descriptor == "representatives":
        own = query
    else:
        inside = torch.arange(rule.page, device=query.device)
        each = inside.expand(batch * pages, -1)
        q, k, v = (x.unflatten(2, (pages, rule.page)).transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        causal = inside <= inside[:, None]
        out, _ = attend(angles.turn(q, each), angles.turn(k, each), v, causal, None, None, rule.scale, cap)
        own = out.unflatten(0, (batch, pages)).transpose(1, 2).flatten(2, 3)
    own = own.masked_fill(~there[:, None, :, None], 0)
    return own.view(batch, groups, heads // groups, pages, rule.page, -1).sum(4).mean(2)


def described(keys: Tensor, sums: Tensor, rule: Rule) -> Tensor:
    """Return the descriptions ``[B,G,N,D]`` of pages of ``keys [B,G,N,page,D]`` by the sums ``[B,G,N+F,D]``.

    The first N of these are those of the pages themselves, and each page has F = :func:`follows` ones behind it.
    """
    count, after = keys.shape[2], follows(rule)
    if not after:
        subject = (sums / rule.page).flatten(0, 2)[:, None, None]
        each = keys.flatten(0, 2)[:, None]
        return weights(subject, each, None, None, None, rule.scale, 0.0).p[:, 0, 0].matmul(each[:, 0]).view_as(sums)
    behind = torch.stack([sums[:, :, 1 + n : 1 + n + count] for n in range(after)]).sum(0)
    taken = first((keys @ behind[..., None])[..., 0], min(REPRESENTATIVES, rule.page))
    return (keys * taken[..., None]).sum(-2) / min(REPRESENTATIVES, rule.page)


def read(query: Tensor, descriptions: Tensor, at: Tensor, rule: Rule) -> Reads:
    """Choose for queries ``[B,H,T,D]`` at positions ``at [B,T]``, -1 for none, by ``descriptions [B,G,N,D]``."""
    number = torch.arange(descriptions.shape[2], device=query.device)
    p = at[:, None, :, None]
    pages = candidates(query * rule.scale, descriptions, at, rule)
    pages = pages | ((number <= p // rule.page) & (p < rule.dense_below))
    count = pages.sum(-1)
    # Those that are read come first, in order of time, since their numbers are below that of the ones that are not.
    slots = torch.where(pages, number, len(number)).sort(-1).values[..., : max(1, int(count.max()))]
    inside = torch.arange(rule.page, device=query.device)
    tokens = (slots[..., None] * rule.page + inside).flatten(-2)
    live = tokens <= p
    return Reads(tokens, live, *_places(tokens, count, at, rule))


def _places(tokens: Tensor, count: Tensor, at: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Return what keys ``[B,G,T,L]`` and queries ``[B,G,T]`` are rotated by."""
    p = at[:, None]
    if SELECTORS[rule.method].positioner == "clipped":
        away = (p[..., None] - tokens).clamp(0, rule.window)
        return rule.window - away, torch.full_like(count, rule.window)
    # Only the last page that is read, that of p itself, may be incomplete.
    place = torch.arange(tokens.shape[-1], device=tokens.device)
    return place.expand_as(tokens), (count - 1) * rule.page + p % rule.page
