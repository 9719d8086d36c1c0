"""Which tokens ``memc::sparse_attention`` reads: pages listed as tiles of keys, their scores, and the best of them."""

from __future__ import annotations

from tvm.script import tirx as T

from memc.backends.tvm.kernels.choose import FIRST, NEVER, find_least, ordered, take
from memc.backends.tvm.kernels.common import LOWEST, SLOTS
from memc.backends.tvm.kernels.eventful import take_events
from memc.backends.tvm.kernels.rank import find_best
from memc.backends.tvm.kernels.tree import search_pages
from memc.backends.tvm.kernels.turns import make_list, rank_all, take_listed


@T.inline
def _append(names, r, unit, first, p, listed):
    # Lists the tiles of the tokens from ``first`` on that are ranked together, each tile once.
    tile = first // r.lanes
    for k in T.serial(T.min(first + (r.unit - 1), p) // r.lanes - tile + 1):
        number = T.Cast("int32", tile + k)
        if T.Or(listed[0] == 0, names["list"][unit, T.max(listed[0] - 1, T.int64(0))] < number):
            names["list"][unit, listed[0]] = number
            listed[0] = listed[0] + 1


@T.inline
def list_tiles(names, s, r, b, g, t, unit, p, listed):  # noqa: D103
    # Leaves 1 in the rank of each page, or token, that is taken and 0 in the others, and lists where they lie.
    least = T.alloc_buffer((2,), "int32", scope="local")
    taken = T.alloc_buffer((1,), "int32", scope="local")
    hit = T.alloc_buffer((SLOTS,), "int32", scope="local")
    blocks = p // r.unit // SLOTS + 1
    everything = T.Or(p < r.all_below, T.And(T.bool(r.mass == 1), p // r.unit < r.most))
    least[0] = T.int32(NEVER)
    least[1] = T.int32(0)
    if r.refresh > 1:
        make_list(names, s, r, b, g, t, unit, p)
    if everything:
        for n in T.serial(blocks * SLOTS):
            names["rank"][unit, n] = T.if_then_else(n <= p // r.unit, T.int32(FIRST), T.int32(NEVER))
    elif r.refresh > 1:
        take_listed(names, r, unit, p)
    elif r.by_tree:
        search_pages(names, s, r, b, g, t, unit, p)
    else:
        rank_all(names, s, r, b, g, t, unit, p)
        if r.by_event:
            take_events(names, r, b, unit, p, blocks, least)
        else:
            find_best(names, r, unit, blocks, least)
    listed[0] = T.int64(0)
    for block in T.serial(blocks):
        for j in T.vectorized(SLOTS):
            hit[j] = T.Select(names["rank"][unit, block * SLOTS + j] >= least[0], 1, 0)
        taken[0] = 0
        for j in T.serial(SLOTS):
            taken[0] = taken[0] + hit[j]
        if taken[0] > 0:
            for j in T.serial(SLOTS):
                take(names["rank"], unit, block * SLOTS + j, least, taken)
                names["rank"][unit, block * SLOTS + j] = taken[0]
                if taken[0] > 0:
                    _append(names, r, unit, (block * SLOTS + j) * r.unit, p, listed)
        else:
            for j in T.vectorized(SLOTS):
                names["rank"][unit, block * SLOTS + j] = 0


@T.inline
def score_tiles(names, s, b, g, t, unit, listed):  # noqa: D103
    product = T.alloc_buffer((s.together, SLOTS), "float32", scope="local")
    for at in T.serial(listed[0]):
        tile = T.Cast("int64", names["list"][unit, at])
        for part in T.serial(s.share // s.together):
            for i in T.unroll(s.together):
                for j in T.vectorized(SLOTS):
                    product[i, j] = T.float32(0)
            for d in T.serial(s.key_dim):
                for i in T.unroll(s.together):
                    for j in T.vectorized(SLOTS):
                        product[i, j] = product[i, j] + (
                            names["q"][b, g * s.share + part * s.together + i, t, d] * names["keys"][b, g, tile, d, j]
                        )
            for i in T.unroll(s.together):
                for j in T.vectorized(SLOTS):
                    names["scores"][unit, part * s.together + i, at * SLOTS + j] = product[i, j] * T.float32(s.scale)


@T.inline
def score_tokens(names, s, b, g, t, unit, listed):  # noqa: D103
    product = T.alloc_buffer((s.vector,), "float32", scope="local")
    total = T.alloc_buffer((1,), "float32", scope="local")
    for at in T.serial(listed[0]):
        slot = T.Cast("int64", names["list"][unit, at])
        for i in T.serial(s.share):
            for j in T.vectorized(s.vector):
                product[j] = T.float32(0)
            for d in T.serial(s.key_dim // s.vector):
                for j in T.vectorized(s.vector):
                    product[j] = product[j] + (
                        names["q"][b, g * s.share + i, t, d * s.vector + j]
                        * names["keys"][b, g, slot, d * s.vector + j]
                    )
            total[0] = T.float32(0)
            for j in T.serial(s.vector):
                total[0] = total[0] + product[j]
            names["scores"][unit, i, at] = total[0] * T.float32(s.scale)


@T.inline
def _rank_tokens(names, s, r, unit, p, listed, least):
    best = T.alloc_buffer((r.lanes,), "float32", scope="local")
    at_most = T.Cast("int32", p)
    near = T.min(at_most - (r.window - 1), at_most // r.page * r.page if r.own_page else at_most)
    for at in T.serial(listed[0]):
        first = names["list"][unit, at] * r.lanes
        for j in T.vectorized(r.lanes):
            best[j] = T.float32(LOWEST)
        for i in T.serial(s.share):
            for j in T.vectorized(r.lanes):
                best[j] = T.max(best[j], names["scores"][unit, i, at * r.lanes + j])
        for j in T.vectorized(r.lanes):  # nothing is bound in here: TVM would take the first lane's value for all
            names["again"][unit, at * r.lanes + j] = T.Select(
                first + j > at_most,
                T.int32(NEVER),
                T.Select(T.Or(first + j < r.sinks, first + j >= near), T.int32(FIRST), ordered(best[j])),
            )
        if r.unit % r.lanes > 0:  # only some of the pages on a tile were taken
            for j in T.serial(r.lanes):
                if names["rank"][unit, T.min(first + j, at_most) // r.unit] == 0:
                    names["again"][unit, at * r.lanes + j] = T.int32(NEVER)
    blocks = T.ceildiv(listed[0] * r.lanes, T.int64(SLOTS))
    for j in T.serial(blocks * SLOTS - listed[0] * r.lanes):
        names["again"][unit, listed[0] * r.lanes + j] = T.int32(NEVER)
    find_least(names["again"], unit, blocks, r.budget, least)


@T.inline
def keep_tokens(names, s, r, unit, p, listed, kept):  # noqa: D103
    # Lists the slots of the tokens that are read, and moves their scores together.
    least = T.alloc_buffer((2,), "int32", scope="local")
    taken = T.alloc_buffer((1,), "int32", scope="local")
    again = T.alloc_buffer((1,), "bool", scope="local")
    again[0] = T.And(T.bool(r.rerank > 1), p >= r.all_below)
    if again[0]:
        _rank_tokens(names, s, r, unit, p, listed, least)
    kept[0] = T.int64(0)
    for at in T.serial(listed[0]):
        for j in T.serial(r.lanes):
            slot = T.Cast("int64", names["list"][unit, at]) * r.lanes + j
            taken[0] = T.if_then_else(slot <= p, names["rank"][unit, T.min(slot, p) // r.unit], 0)
            if again[0]:
                take(names["again"], unit, at * r.lanes + j, least, taken)
            if taken[0] > 0:
                names["slots"][unit, kept[0]] = T.Cast("int32", slot)
                for i in T.serial(s.share):
                    names["scores"][unit, i, kept[0]] = names["scores"][unit, i, at * r.lanes + j]
                kept[0] = kept[0] + 1
