"""What ``memc::sparse_attention`` ranks by: descriptions of pages that are full, and what a query makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tvm.script import tirx as T

from memc.backends.tvm.kernels.choose import FIRST, NEVER, find_least, find_share, ordered, take
from memc.backends.tvm.kernels.common import LOWEST, SLOTS, Expression
from memc.backends.tvm.kernels.eventful import whole_events
from memc.dialect.selectors import SELECTORS, Selector
from memc.dialect.sparse_attention import SPAN
from memc.kernels.sparse_attention.choose import Rule as Choosing


@dataclass(frozen=True)
class Rule(Choosing):
    """Which tokens are read, and whether the log-sum-exp is asked for (``lse``)."""

    lse: bool = field(default=False, kw_only=True)

    @property
    def selector(self) -> Selector:
        """The method, by its slots."""
        return SELECTORS[self.method]

    @property
    def lanes(self) -> int:
        """Tokens whose scores are made together: those of a tile, or one where single tokens are taken, or turned."""
        return 1 if self.by_token or self.selector.extends else SLOTS

    @property
    def all_below(self) -> int:
        """The position from which on not every token is read."""
        return max(self.dense_below, self.budget) if self.mass == 1 else self.dense_below

    @property
    def listed(self) -> int:
        """The most tiles of keys, or tokens, on which what is taken lies."""
        if self.unit % self.lanes == 0:
            tiles = self.unit // self.lanes
        else:
            tiles = 1 if self.lanes % self.unit == 0 else (self.unit - 2) // self.lanes + 2
        return max(self.most * tiles, -(-self.all_below // self.lanes))

    @property
    def room(self) -> int:
        """Scores that a unit of work has memory for: whole vectors."""
        return -(-self.listed * self.lanes // SLOTS) * SLOTS

    def described(self, channels: int) -> int:
        """How many numbers a description has."""
        return 2 * channels if self.selector.descriptor in ("bounds", "moments") else channels

    @property
    def places(self) -> int:
        """Entries of a list that several tokens share: whole vectors."""
        return -(-self.most // SLOTS) * SLOTS

    @property
    def rows(self) -> bool:
        """Whether descriptions lie one by one, as a search reads them, and not a tile of them channel by channel."""
        return self.by_tree or self.by_level

    def ranked(self, channels: int) -> int:
        """How many numbers a rank is made of."""
        return self.channels if self.by_token else self.described(channels)


@T.inline
def describe(names, s, r, b, g, n):  # noqa: D103
    # Writes the description of page ``n``, which is full, into ``pages``.
    sums = T.alloc_buffer((2,), "float32", scope="local")
    one = T.meta_var({"centre": r.page // 2, "landmark": r.page - 1}.get(r.selector.descriptor))
    for d in T.serial(s.key_dim):
        if one is not None:
            sums[0] = names["keys"][b, g, (n * r.page + one) // SLOTS, d, (n * r.page + one) % SLOTS]
        elif r.selector.descriptor == "bounds":
            sums[0] = T.float32(LOWEST)
            sums[1] = T.float32(-LOWEST)
            for i in T.serial(r.page):
                sums[0] = T.max(sums[0], names["keys"][b, g, (n * r.page + i) // SLOTS, d, (n * r.page + i) % SLOTS])
                sums[1] = T.min(sums[1], names["keys"][b, g, (n * r.page + i) // SLOTS, d, (n * r.page + i) % SLOTS])
        else:
            sums[0] = T.float32(0)
            sums[1] = T.float32(0)
            for i in T.serial(r.page):
                sums[0] = sums[0] + names["keys"][b, g, (n * r.page + i) // SLOTS, d, (n * r.page + i) % SLOTS]
            sums[0] = sums[0] / T.float32(r.page)
            if r.selector.descriptor == "moments":
                for i in T.serial(r.page):
                    away = names["keys"][b, g, (n * r.page + i) // SLOTS, d, (n * r.page + i) % SLOTS] - sums[0]
                    sums[1] = sums[1] + away * away
                sums[1] = sums[1] / T.float32(r.page)
        if r.by_level:
            names["pages"][b, g, n // SPAN, 2 * s.key_dim + d * SPAN + n % SPAN] = sums[0]
            names["pages"][b, g, n // SPAN, 2 * s.key_dim + (s.key_dim + d) * SPAN + n % SPAN] = sums[1]
        elif r.rows:
            names["pages"][b, g, n, d] = sums[0]
        else:
            names["pages"][b, g, n // SLOTS, d, n % SLOTS] = sums[0]
        if r.described(s.key_dim) > s.key_dim and not r.rows:
            names["pages"][b, g, n // SLOTS, s.key_dim + d, n % SLOTS] = sums[1]


@T.inline
def _strongest(names, s, r, b, g, t, channel, feature):
    # The channels in which the sum of a query's magnitudes over the heads is highest, and the query there.
    padded = T.meta_var(-(-s.key_dim // SLOTS) * SLOTS)
    rank = T.alloc_buffer((1, padded), "int32", scope="local")
    total = T.alloc_buffer((1,), "float32", scope="local")
    least = T.alloc_buffer((2,), "int32", scope="local")
    taken = T.alloc_buffer((1,), "int32", scope="local")
    found = T.alloc_buffer((1,), "int32", scope="local")
    for d in T.serial(padded):
        rank[0, d] = T.int32(NEVER)
    for d in T.serial(s.key_dim):
        total[0] = T.float32(0)
        for i in T.serial(s.share):
            total[0] = total[0] + T.abs(names["q"][b, g * s.share + i, t, d] * T.float32(s.scale))
        rank[0, d] = ordered(total[0])
    find_least(rank, 0, padded // SLOTS, r.channels, least)
    found[0] = 0
    for d in T.serial(s.key_dim):
        take(rank, 0, d, least, taken)
        if taken[0] > 0:
            channel[found[0]] = d
            for i in T.serial(s.share):
                feature[i, found[0]] = names["q"][b, g * s.share + i, t, d] * T.float32(s.scale)
            found[0] = found[0] + 1


@T.inline
def features(names, s, r, b, g, t, channel, feature):  # noqa: D103
    # What of a query is multiplied with which number of a description.
    for c in T.serial(r.ranked(s.key_dim)):
        channel[c] = c
    for i in T.serial(s.share):
        for d in T.serial(s.key_dim):
            scaled = names["q"][b, g * s.share + i, t, d] * T.float32(s.scale)
            if r.selector.scorer == "bound":
                feature[i, d] = T.max(scaled, T.float32(0))
                feature[i, s.key_dim + d] = T.min(scaled, T.float32(0))
            else:
                feature[i, d] = scaled
                if r.selector.scorer == "moments":
                    feature[i, s.key_dim + d] = scaled * scaled * T.float32(0.5)


def first_near(r: Rule, p: Expression) -> Expression:
    """Return the first page, or token, of those that the window makes a token at position ``p`` always take."""
    return T.min(T.max(p - (r.window - 1), T.int64(0)), p // r.page * r.page) // r.unit


@T.inline
def force(names, r, unit, p):  # noqa: D103
    # Puts what is always taken before every score, and what comes after the token at position ``p`` behind.
    near = first_near(r, p)
    last = p // r.unit
    for n in T.serial(T.min(T.int64(-(-r.sinks // r.unit)), last + 1)):
        names["rank"][unit, n] = T.int32(FIRST)
    for n in T.serial(last + 1 - near):
        names["rank"][unit, near + n] = T.int32(FIRST)
    for n in T.serial(last // SLOTS * SLOTS + SLOTS - 1 - last):
        names["rank"][unit, last + 1 + n] = T.int32(NEVER)


@T.inline
def score_tile(s, count, feature, held, best):  # noqa: D103
    # Leaves in ``best [SLOTS]`` the highest product of the group's heads with each of as many descriptions, of which
    # ``held(c, j)`` is number ``c`` of ``count``.
    product = T.alloc_buffer((s.together, SLOTS), "float32", scope="local")
    for j in T.vectorized(SLOTS):
        best[j] = T.float32(LOWEST)
    for part in T.serial(s.share // s.together):
        for i in T.unroll(s.together):
            for j in T.vectorized(SLOTS):
                product[i, j] = T.float32(0)
        for c in T.serial(count):
            for i in T.unroll(s.together):
                for j in T.vectorized(SLOTS):
                    product[i, j] = product[i, j] + feature[part * s.together + i, c] * held(c, j)
        for i in T.unroll(s.together):
            for j in T.vectorized(SLOTS):
                best[j] = T.max(best[j], product[i, j])


def _of_tile(names: Any, b: Any, g: Any, tile: Any, channel: Any) -> Callable[[Any, Any], Any]:
    """Return number ``channel[c]`` of description ``j`` of a tile."""
    return lambda c, j: names["pages"][b, g, tile, channel[c], j]


@T.inline
def rank_pages(names, s, r, b, g, t, unit, p):  # noqa: D103
    # Writes into row ``unit`` of ``rank`` what the token at position ``p`` ranks each page, or token, by.
    channel = T.alloc_buffer((r.ranked(s.key_dim),), "int32", scope="local")
    feature = T.alloc_buffer((s.share, r.ranked(s.key_dim)), "float32", scope="local")
    best = T.alloc_buffer((SLOTS,), "float32", scope="local")
    if r.by_token:
        _strongest(names, s, r, b, g, t, channel, feature)
    else:
        features(names, s, r, b, g, t, channel, feature)
    for tile in T.serial(p // r.unit // SLOTS + 1):
        score_tile(s, r.ranked(s.key_dim), feature, _of_tile(names, b, g, tile, channel), best)
        for j in T.vectorized(SLOTS):
            names["rank"][unit, tile * SLOTS + j] = ordered(best[j])
    if r.by_event:
        whole_events(names, r, b, unit, p)
    force(names, r, unit, p)


@T.inline
def find_best(names, r, unit, blocks, least):  # noqa: D103
    # As ``find_least`` of what fills the budget, or of less that holds the share asked for.
    enough = T.alloc_buffer((2,), "int32", scope="local")
    find_least(names["rank"], unit, blocks, r.most, least)
    if r.mass < 1:
        find_share(names["rank"], names["shares"], unit, blocks, r.mass, enough)
        if T.Or(enough[0] > least[0], T.And(enough[0] == least[0], enough[1] < least[1])):
            least[0] = enough[0]
            least[1] = enough[1]
