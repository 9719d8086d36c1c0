"""Two levels of bounds that ``bounds2`` ranks by: super-pages are ranked, and the pages of the best ones.

``pages [B,G,M,(1+SPAN) 2D]`` has a super-page's bounds and then those of its pages, channel by channel: a vector of
scores is the product of a query with ``SPAN`` pages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from memc.backends.tvm.kernels.choose import NEVER, find_least, ordered, take
from memc.backends.tvm.kernels.common import LOWEST, SLOTS
from memc.backends.tvm.kernels.rank import features, first_near, force, score_tile
from memc.dialect.sparse_attention import SPAN


def place_of(channels: int, number: Any, channel: Any) -> Any:
    """Return where a number of page ``number`` of a super-page is, of ``channels`` to each."""
    return channels + channel * SPAN + number


@T.inline
def describe_above(names, s, b, g, m):  # noqa: D103
    # Writes the bounds of super-page ``m``, whose pages have all been described.
    size = T.meta_var(2 * s.key_dim)
    for d in T.serial(s.key_dim):
        names["pages"][b, g, m, d] = T.float32(LOWEST)
        names["pages"][b, g, m, s.key_dim + d] = T.float32(-LOWEST)
        for n in T.serial(SPAN):
            names["pages"][b, g, m, d] = T.max(
                names["pages"][b, g, m, d], names["pages"][b, g, m, place_of(size, n, d)]
            )
            names["pages"][b, g, m, s.key_dim + d] = T.min(
                names["pages"][b, g, m, s.key_dim + d], names["pages"][b, g, m, place_of(size, n, s.key_dim + d)]
            )


@T.inline
def _score_above(names, s, b, g, m, feature, best):
    # Leaves in ``best[0]`` the number that super-page ``m`` is ranked by.
    product = T.alloc_buffer((s.together, s.vector), "float32", scope="local")
    total = T.alloc_buffer((2,), "float32", scope="local")
    total[1] = T.float32(LOWEST)
    for part in T.serial(s.share // s.together):
        for i in T.unroll(s.together):
            for j in T.vectorized(s.vector):
                product[i, j] = T.float32(0)
        for c in T.serial(2 * s.key_dim // s.vector):
            for i in T.unroll(s.together):
                for j in T.vectorized(s.vector):
                    product[i, j] = product[i, j] + (
                        feature[part * s.together + i, c * s.vector + j] * names["pages"][b, g, m, c * s.vector + j]
                    )
        for i in T.unroll(s.together):
            total[0] = T.float32(0)
            for j in T.serial(s.vector):
                total[0] = total[0] + product[i, j]
            total[1] = T.max(total[1], total[0])
    best[0] = ordered(total[1])


def _below(names: Any, s: Any, b: Any, g: Any, m: Any) -> Callable[[Any, Any], Any]:
    """Return number ``c`` of the description of page ``j`` of super-page ``m``."""
    return lambda c, j: names["pages"][b, g, m, place_of(2 * s.key_dim, j, c)]


@T.inline
def rank_levels(names, s, r, b, g, t, unit, p):  # noqa: D103
    # As ``rank_pages``, of the pages of the super-pages that the token at position ``p`` enters; no others are looked
    # at. What super-pages rank by, and then which are entered, stands where the ranks of the first pages will: of the
    # last super-page first these overwrite nothing that is yet to be read.
    channel = T.alloc_buffer((r.ranked(s.key_dim),), "int32", scope="local")
    feature = T.alloc_buffer((s.share, r.ranked(s.key_dim)), "float32", scope="local")
    best = T.alloc_buffer((1,), "int32", scope="local")
    below = T.alloc_buffer((SPAN,), "float32", scope="local")
    least = T.alloc_buffer((2,), "int32", scope="local")
    reached = first_near(r, p) // SPAN
    sunk = T.min(T.int64(-(-r.sinks // r.page) // SPAN), reached)
    blocks = T.ceildiv(reached, T.int64(SLOTS))
    features(names, s, r, b, g, t, channel, feature)
    for m in T.serial(blocks * SLOTS):
        names["rank"][unit, m] = T.int32(NEVER)
    for k in T.serial(reached - sunk):
        _score_above(names, s, b, g, sunk + k, feature, best)
        names["rank"][unit, sunk + k] = best[0]
    find_least(names["rank"], unit, blocks, T.int32(r.entered), least)
    for m in T.serial(reached):
        take(names["rank"], unit, m, least, best)
        names["rank"][unit, m] = best[0]
    for k in T.serial(reached + 1):
        m = reached - k
        best[0] = T.if_then_else(k == 0, 1, names["rank"][unit, m])
        if best[0] > 0:
            score_tile(s, 2 * s.key_dim, feature, _below(names, s, b, g, m), below)
            for j in T.vectorized(SPAN):
                names["rank"][unit, m * SPAN + j] = ordered(below[j])
        else:
            for j in T.vectorized(SPAN):
                names["rank"][unit, m * SPAN + j] = T.int32(NEVER)
    force(names, r, unit, p)
