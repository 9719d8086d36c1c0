"""``memc::sparse_attention``: pages are described as they fill up, ranked, and the tokens of the best attended to."""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm.script import tirx as T

from memc.backends.tvm.kernels.choose import FIRST, NEVER, find_least, ordered, take
from memc.backends.tvm.kernels.common import (
    LOWEST,
    SLOTS,
    Keys,
    PrimFunc,
    Scores,
    add_sink,
    add_values,
    exp,
    tanh,
)
from memc.backends.tvm.kernels.rank import Rule, describe, rank_pages

SHARES = 8
"""Units of work that the tokens of one key-value head are dealt to at most, each with memory of its own."""

TOKENS = 16
"""Tokens that a unit of work is worth its memory for."""


class _Part:
    """Rows of the scores of one unit of work, from one on."""

    def __init__(self, scores: Any, unit: Any, start: Any) -> None:
        self._scores, self._unit, self._start = scores, unit, start

    def __getitem__(self, place: tuple[Any, Any]) -> Any:
        return self._scores[self._unit, self._start + place[0], place[1]]


@cache
def sparse_attention(s: Scores, r: Rule) -> PrimFunc:
    """Make ``memc::sparse_attention``, its state in place.

    ``keys [B,G,P,D,SLOTS]`` and ``values [B,G,S,E]`` hold the token at position p in slot p, ``pages [B,G,N,C,SLOTS]``
    the description of page n; where tokens are ranked ``keys [B,G,S,D]`` are as they are read one by one, and
    ``pages [B,G,P,D,SLOTS]`` the same channel by channel. The new tokens are written first, so that no sequence may
    start in a call after tokens of another one in the same row. A unit of work is some tokens of one key-value head; of
    each it ranks the pages, lists the tiles of keys on which the best ones lie, and makes the scores of these, which
    are ranked again where that is asked for and then weigh the values.
    """
    heads, groups, key_dim, value_dim = s.heads, s.groups, s.key_dim, s.value_dim
    share, together, size = s.share, s.together, r.described(s.key_dim)
    page, each, lanes = r.page, r.unit, r.lanes
    vector = next(n for n in (SLOTS, 8, 1) if key_dim % n == 0)  # channels of one key that are multiplied together
    wide, narrow = value_dim // 32, value_dim % 32 // 8

    @T.inline
    def write(names, b, g, tokens):
        for t in T.serial(tokens):
            if names["positions"][b, t] >= 0:
                position = names["positions"][b, t]
                for e in T.serial(value_dim):
                    names["values"][b, g, position, e] = names["v"][b, g, t, e]
                if r.by_token:
                    for d in T.serial(key_dim):
                        names["keys"][b, g, position, d] = names["k"][b, g, t, d]
                        names["pages"][b, g, position // SLOTS, d, position % SLOTS] = names["k"][b, g, t, d]
                else:
                    for d in T.serial(key_dim):
                        names["keys"][b, g, position // SLOTS, d, position % SLOTS] = names["k"][b, g, t, d]
                    if (position + 1) % page == 0:
                        describe(names, s, r, b, g, position // page)

    @T.inline
    def append(names, unit, first, p, listed):
        # Lists the tiles of the tokens from ``first`` on that are ranked together, each tile once.
        tile = first // lanes
        for k in T.serial(T.min(first + (each - 1), p) // lanes - tile + 1):
            number = T.Cast("int32", tile + k)
            if T.Or(listed[0] == 0, names["list"][unit, T.max(listed[0] - 1, T.int64(0))] < number):
                names["list"][unit, listed[0]] = number
                listed[0] = listed[0] + 1

    @T.inline
    def list_tiles(names, b, g, t, unit, p, listed):
        # Leaves 1 in the rank of each page, or token, that is taken and 0 in the others, and lists where they lie.
        least = T.alloc_buffer((2,), "int32", scope="local")
        taken = T.alloc_buffer((1,), "int32", scope="local")
        hit = T.alloc_buffer((SLOTS,), "int32", scope="local")
        blocks = p // each // SLOTS + 1
        if T.Or(p < r.all_below, p // each < r.most):
            for n in T.serial(blocks * SLOTS):
                names["rank"][unit, n] = T.if_then_else(n <= p // each, T.int32(FIRST), T.int32(NEVER))
            least[0] = T.int32(NEVER)
            least[1] = T.int32(0)
        else:
            rank_pages(names, s, r, b, g, t, unit, p)
            find_least(names["rank"], unit, blocks, r.most, least)
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
                        append(names, unit, (block * SLOTS + j) * each, p, listed)
            else:
                for j in T.vectorized(SLOTS):
                    names["rank"][unit, block * SLOTS + j] = 0

    @T.inline
    def score_tiles(names, b, g, t, unit, listed):
        product = T.alloc_buffer((together, SLOTS), "float32", scope="local")
        for at in T.serial(listed[0]):
            tile = T.Cast("int64", names["list"][unit, at])
            for part in T.serial(share // together):
                for i in T.unroll(together):
                    for j in T.vectorized(SLOTS):
                        product[i, j] = T.float32(0)
                for d in T.serial(key_dim):
                    for i in T.unroll(together):
                        for j in T.vectorized(SLOTS):
                            product[i, j] = product[i, j] + (
                                names["q"][b, g * share + part * together + i, t, d] * names["keys"][b, g, tile, d, j]
                            )
                for i in T.unroll(together):
                    for j in T.vectorized(SLOTS):
                        names["scores"][unit, part * together + i, at * SLOTS + j] = product[i, j] * T.float32(s.scale)

    @T.inline
    def score_tokens(names, b, g, t, unit, listed):
        product = T.alloc_buffer((vector,), "float32", scope="local")
        total = T.alloc_buffer((1,), "float32", scope="local")
        for at in T.serial(listed[0]):
            slot = T.Cast("int64", names["list"][unit, at])
            for i in T.serial(share):
                for j in T.vectorized(vector):
                    product[j] = T.float32(0)
                for d in T.serial(key_dim // vector):
                    for j in T.vectorized(vector):
                        product[j] = product[j] + (
                            names["q"][b, g * share + i, t, d * vector + j] * names["keys"][b, g, slot, d * vector + j]
                        )
                total[0] = T.float32(0)
                for j in T.serial(vector):
                    total[0] = total[0] + product[j]
                names["scores"][unit, i, at] = total[0] * T.float32(s.scale)

    @T.inline
    def rank_tokens(names, unit, p, listed, least):
        best = T.alloc_buffer((lanes,), "float32", scope="local")
        at_most = T.Cast("int32", p)
        for at in T.serial(listed[0]):
            first = names["list"][unit, at] * lanes
            for j in T.vectorized(lanes):
                best[j] = T.float32(LOWEST)
            for i in T.serial(share):
                for j in T.vectorized(lanes):
                    best[j] = T.max(best[j], names["scores"][unit, i, at * lanes + j])
            for j in T.vectorized(lanes):  # nothing is bound in here: TVM would take the first lane's value for all
                names["again"][unit, at * lanes + j] = T.Select(
                    first + j > at_most,
                    T.int32(NEVER),
                    T.Select(
                        T.Or(first + j < r.sinks, at_most - (first + j) < r.window), T.int32(FIRST), ordered(best[j])
                    ),
                )
            if each % lanes > 0:  # only some of the pages on a tile were taken
                for j in T.serial(lanes):
                    if names["rank"][unit, T.min(first + j, at_most) // each] == 0:
                        names["again"][unit, at * lanes + j] = T.int32(NEVER)
        blocks = T.ceildiv(listed[0] * lanes, T.int64(SLOTS))
        for j in T.serial(blocks * SLOTS - listed[0] * lanes):
            names["again"][unit, listed[0] * lanes + j] = T.int32(NEVER)
        find_least(names["again"], unit, blocks, r.budget, least)

    @T.inline
    def keep_tokens(names, unit, p, listed, kept):
        # Lists the slots of the tokens that are read, and moves their scores together.
        least = T.alloc_buffer((2,), "int32", scope="local")
        taken = T.alloc_buffer((1,), "int32", scope="local")
        again = T.alloc_buffer((1,), "bool", scope="local")
        again[0] = T.And(T.bool(r.rerank > 1), p >= r.all_below)
        if again[0]:
            rank_tokens(names, unit, p, listed, least)
        kept[0] = T.int64(0)
        for at in T.serial(listed[0]):
            for j in T.serial(lanes):
                slot = T.Cast("int64", names["list"][unit, at]) * lanes + j
                taken[0] = T.if_then_else(slot <= p, names["rank"][unit, T.min(slot, p) // each], 0)
                if again[0]:
                    take(names["again"], unit, at * lanes + j, least, taken)
                if taken[0] > 0:
                    names["slots"][unit, kept[0]] = T.Cast("int32", slot)
                    for i in T.serial(share):
                        names["scores"][unit, i, kept[0]] = names["scores"][unit, i, at * lanes + j]
                    kept[0] = kept[0] + 1

    @T.inline
    def weigh(names, unit, i, kept, top, total, row):
        # Puts the exponentials of one head's scores in their place, and 0 up to the end of the last vector.
        blocks = T.ceildiv(kept[0], T.int64(SLOTS))
        for j in T.serial(blocks * SLOTS - kept[0]):
            names["scores"][unit, i, kept[0] + j] = T.float32(LOWEST)
        if s.softcap > 0:
            for j in T.serial(kept[0]):
                names["scores"][unit, i, j] = tanh(names["scores"][unit, i, j] / T.float32(s.softcap)) * T.float32(
                    s.softcap
                )
        top[row] = T.float32(LOWEST)
        for j in T.serial(kept[0]):
            top[row] = T.max(top[row], names["scores"][unit, i, j])
        for block in T.serial(blocks):
            for j in T.vectorized(SLOTS):
                names["scores"][unit, i, block * SLOTS + j] = T.Select(
                    names["scores"][unit, i, block * SLOTS + j] > T.float32(0.5 * LOWEST),
                    exp(names["scores"][unit, i, block * SLOTS + j] - top[row]),
                    T.float32(0),
                )
        total[row] = T.float32(0)
        for j in T.serial(kept[0]):
            total[row] = total[row] + names["scores"][unit, i, j]

    @T.inline
    def attend(names, b, g, t, unit, kept, start):
        top = T.alloc_buffer((together,), "float32", scope="local")
        total = T.alloc_buffer((together,), "float32", scope="local")
        acc = T.alloc_buffer((together, value_dim), "float32", scope="local")
        part = T.alloc_buffer((together, 32), "float32", scope="local")
        for i in T.serial(together):
            weigh(names, unit, start + i, kept, top, total, i)
            for e in T.serial(value_dim):
                acc[i, e] = T.float32(0)
        weights = T.meta_var(_Part(names["scores"], unit, start))
        read = T.meta_var(_values(names, b, g, unit))
        add_values(together, read, T.int64(0), kept[0], weights, part, acc, 0, 32, wide)
        if narrow > 0:
            add_values(together, read, T.int64(0), kept[0], weights, part, acc, wide * 32, 8, narrow)
        if value_dim % 8 > 0:
            rest = T.meta_var(wide * 32 + narrow * 8)
            add_values(together, read, T.int64(0), kept[0], weights, part, acc, rest, 1, value_dim % 8)
        for i in T.serial(together):
            h = g * share + start + i
            if s.sink_logits:
                add_sink(i, names["sinks"][h], top, total, acc, value_dim)
            for e in T.serial(value_dim):
                names["y"][b, h, t, e] = acc[i, e] / total[i]
            if r.lse:
                names["lse"][b, h, t] = top[i] + T.log(total[i])

    @T.inline
    def step(names, b, g, t, unit, p):
        listed = T.alloc_buffer((1,), "int64", scope="local")
        kept = T.alloc_buffer((1,), "int64", scope="local")
        if p >= 0:
            list_tiles(names, b, g, t, unit, p, listed)
            if r.by_token:
                score_tokens(names, b, g, t, unit, listed)
            else:
                score_tiles(names, b, g, t, unit, listed)
            keep_tokens(names, unit, p, listed, kept)
            for part in T.serial(share // together):
                attend(names, b, g, t, unit, kept, part * together)
        else:
            for i in T.serial(share):
                for e in T.serial(value_dim):
                    names["y"][b, g * share + i, t, e] = T.float32(0)
                if r.lse:
                    names["lse"][b, g * share + i, t] = T.float32(0)

    @T.prim_func(private=True)
    def sparse_attention_(
        q_: T.handle,
        k_: T.handle,
        v_: T.handle,
        p_: T.handle,
        keys_: T.handle,
        values_: T.handle,
        pages_: T.handle,
        sinks_: T.handle,
        y_: T.handle,
        lse_: T.handle,
        rank_: T.handle,
        list_: T.handle,
        again_: T.handle,
        slots_: T.handle,
        scores_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        batch, tokens, tiles, held, described = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        units = T.int64()
        q = T.match_buffer(q_, (batch, heads, tokens, key_dim), "float32")
        k = T.match_buffer(k_, (batch, groups, tokens, key_dim), "float32")
        v = T.match_buffer(v_, (batch, groups, tokens, value_dim), "float32")
        positions = T.match_buffer(p_, (batch, tokens), "int64")
        sizes = T.meta_var((tiles, key_dim) if r.by_token else (tiles, key_dim, SLOTS))
        keys = T.match_buffer(keys_, (batch, groups, *sizes), "float32")
        values = T.match_buffer(values_, (batch, groups, held, value_dim), "float32")
        pages = T.match_buffer(pages_, (batch, groups, described, size, SLOTS), "float32")
        sinks = T.match_buffer(sinks_, (heads if s.sink_logits else 1,), "float32")
        y = T.match_buffer(y_, (batch, heads, tokens, value_dim), "float32")
        lse = T.match_buffer(lse_, (batch, heads, tokens) if r.lse else (1,), "float32")
        rank = T.match_buffer(rank_, (units, described * SLOTS), "int32")
        list = T.match_buffer(list_, (units, r.listed), "int32")
        again = T.match_buffer(again_, (units, r.room if r.rerank > 1 else 1), "int32")
        slots = T.match_buffer(slots_, (units, r.room), "int32")
        scores = T.match_buffer(scores_, (units, share, r.room), "float32")
        names = T.meta_var(
            {
                "q": q,
                "k": k,
                "v": v,
                "positions": positions,
                "keys": keys,
                "values": values,
                "pages": pages,
                "sinks": sinks,
                "y": y,
                "lse": lse,
                "rank": rank,
                "list": list,
                "again": again,
                "slots": slots,
                "scores": scores,
            }
        )
        for row in T.parallel(batch * groups):
            write(names, row // groups, row % groups, tokens)
        dealt = units // (batch * groups)
        for unit in T.parallel(units):
            b = unit // dealt // groups
            g = unit // dealt % groups
            for turn in T.serial(T.ceildiv(tokens - unit % dealt, dealt)):
                t = turn * dealt + unit % dealt
                step(names, b, g, t, unit, positions[b, t])

    return sparse_attention_


def _values(names: dict[str, Any], b: Any, g: Any, unit: Any) -> Keys:
    """Describe the values of the tokens that are listed in ``slots``."""

    def value(at: Any, e: Any) -> Any:
        return names["values"][b, g, T.Cast("int64", names["slots"][unit, at]), e]

    def nothing(*_: Any) -> Any:
        raise AssertionError("only values are read by this list")

    return Keys(nothing, nothing, value, nothing, None)
