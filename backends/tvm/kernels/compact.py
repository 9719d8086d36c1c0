"""``memc::compact_attention``: keys are held before rotation, and turned as they are read by where they then stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from tvm.script import tirx as T

from memc.backends.tvm.kernels.choose import NEVER, find_least, ordered, take
from memc.backends.tvm.kernels.common import LOWEST, SLOTS, Expression, PrimFunc, Scores, exp, tanh
from memc.backends.tvm.kernels.pick import keep_tokens, list_tiles
from memc.backends.tvm.kernels.rank import Rule
from memc.backends.tvm.kernels.sparse import memory
from memc.backends.tvm.kernels.weigh import attend, clear
from memc.dialect.compact_attention import REPRESENTATIVES


@dataclass(frozen=True)
class Angles:
    """Which channels are turned: ``pairs`` of them, side by side or half of all turned channels apart."""

    pairs: int
    interleaved: bool

    def first(self, i: Expression) -> Expression:
        """Return the first channel of a pair."""
        return 2 * i if self.interleaved else i

    def second(self, i: Expression) -> Expression:
        """Return the second channel of a pair."""
        return 2 * i + 1 if self.interleaved else self.pairs + i


def _query(names: dict[str, Any], b: Any, h: Any, t: Any) -> Callable[[Any], Any]:
    return lambda d: names["q"][b, h, t, d]


def _key(names: dict[str, Any], b: Any, g: Any, slot: Any) -> Callable[[Any], Any]:
    return lambda d: names["keys"][b, g, slot, d]


@T.inline
def _turn(names, s, a, place, read, into, row):
    # Writes what is read, turned to a place, into a row.
    for i in T.serial(a.pairs):
        into[row, a.first(i)] = (
            read(a.first(i)) * names["angles"][place, 0, i] - read(a.second(i)) * names["angles"][place, 1, i]
        )
    for i in T.serial(a.pairs):
        into[row, a.second(i)] = (
            read(a.second(i)) * names["angles"][place, 0, i] + read(a.first(i)) * names["angles"][place, 1, i]
        )
    for i in T.serial(s.key_dim - 2 * a.pairs):
        into[row, 2 * a.pairs + i] = read(2 * a.pairs + i)


@T.inline
def _turn_queries(names, s, a, b, g, t, place, queries):
    for i in T.serial(s.share):
        _turn(names, s, a, place, _query(names, b, g * s.share + i, t), queries, i)


@T.inline
def _multiply(s, queries, i, key, total):
    # Leaves the score of one turned query and one turned key in ``total[0]``.
    product = T.alloc_buffer((s.vector,), "float32", scope="local")
    for j in T.vectorized(s.vector):
        product[j] = T.float32(0)
    for d in T.serial(s.key_dim // s.vector):
        for j in T.vectorized(s.vector):
            product[j] = product[j] + queries[i, d * s.vector + j] * key[0, d * s.vector + j]
    total[0] = T.float32(0)
    for j in T.serial(s.vector):
        total[0] = total[0] + product[j]
    total[0] = total[0] * T.float32(s.scale)


@T.inline
def _soften(weights, row, count, total):
    # Makes weights that sum up to 1 of the first ``count`` scores of a row.
    total[0] = T.float32(LOWEST)
    for j in T.serial(count):
        total[0] = T.max(total[0], weights[row, j])
    for j in T.serial(count):
        weights[row, j] = exp(weights[row, j] - total[0])
    total[0] = T.float32(0)
    for j in T.serial(count):
        total[0] = total[0] + weights[row, j]
    for j in T.serial(count):
        weights[row, j] = weights[row, j] / total[0]


@T.inline
def _add_sum(names, s, r, b, g, p, d, x):
    # Adds to channel ``d`` of the sum of the page of ``p``, which its first token begins anew.
    n = p // r.page
    names["pages"][b, g, n // SLOTS, s.key_dim + d, n % SLOTS] = x + T.if_then_else(
        p % r.page == 0, T.float32(0), names["pages"][b, g, n // SLOTS, s.key_dim + d, n % SLOTS]
    )


@T.inline
def _attend_inside(names, s, r, a, b, g, t, p):
    # Adds to the sum of a page what its token at ``p`` gets from it, on average over the heads of the group.
    queries = T.alloc_buffer((s.share, s.key_dim), "float32", scope="local")
    key = T.alloc_buffer((1, s.key_dim), "float32", scope="local")
    weights = T.alloc_buffer((s.share, r.page), "float32", scope="local")
    total = T.alloc_buffer((1,), "float32", scope="local")
    start = p // r.page * r.page
    _turn_queries(names, s, a, b, g, t, p % r.page, queries)
    for j in T.serial(p % r.page + 1):
        _turn(names, s, a, j, _key(names, b, g, start + j), key, 0)
        for i in T.serial(s.share):
            _multiply(s, queries, i, key, total)
            if s.softcap > 0:
                total[0] = tanh(total[0] / T.float32(s.softcap)) * T.float32(s.softcap)
            weights[i, j] = total[0]
    for i in T.serial(s.share):
        _soften(weights, i, p % r.page + 1, total)
    for e in T.serial(s.value_dim):
        total[0] = T.float32(0)
        for i in T.serial(s.share):
            for j in T.serial(p % r.page + 1):
                total[0] = total[0] + weights[i, j] * names["values"][b, g, start + j, e]
        _add_sum(names, s, r, b, g, p, e, total[0] / T.float32(s.share))


@T.inline
def _describe_attended(names, s, r, b, g, n):
    # Describes page ``n``, which is full, by its keys as the mean of what its tokens get attends to them.
    weights = T.alloc_buffer((1, r.page), "float32", scope="local")
    total = T.alloc_buffer((1,), "float32", scope="local")
    for j in T.serial(r.page):
        total[0] = T.float32(0)
        for d in T.serial(s.key_dim):
            total[0] = total[0] + (
                names["pages"][b, g, n // SLOTS, s.key_dim + d, n % SLOTS]
                / T.float32(r.page)
                * names["keys"][b, g, n * r.page + j, d]
            )
        weights[0, j] = total[0] * T.float32(s.scale)
    _soften(weights, 0, r.page, total)
    for d in T.serial(s.key_dim):
        total[0] = T.float32(0)
        for j in T.serial(r.page):
            total[0] = total[0] + weights[0, j] * names["keys"][b, g, n * r.page + j, d]
        names["pages"][b, g, n // SLOTS, d, n % SLOTS] = total[0]


@T.inline
def _describe_representatives(names, s, r, b, g, n):
    # Describes page ``n`` by the mean of the keys that mean most to the queries of the pages behind it in a window.
    padded = T.meta_var(-(-r.page // SLOTS) * SLOTS)
    count = T.meta_var(min(REPRESENTATIVES, r.page))
    rank = T.alloc_buffer((1, padded), "int32", scope="local")
    behind = T.alloc_buffer((s.key_dim,), "float32", scope="local")
    total = T.alloc_buffer((1,), "float32", scope="local")
    least = T.alloc_buffer((2,), "int32", scope="local")
    taken = T.alloc_buffer((1,), "int32", scope="local")
    for d in T.serial(s.key_dim):
        behind[d] = T.float32(0)
        for f in T.serial(r.window // r.page):
            behind[d] = behind[d] + names["pages"][b, g, (n + 1 + f) // SLOTS, s.key_dim + d, (n + 1 + f) % SLOTS]
    for j in T.serial(padded):
        rank[0, j] = T.int32(NEVER)
    for j in T.serial(r.page):
        total[0] = T.float32(0)
        for d in T.serial(s.key_dim):
            total[0] = total[0] + behind[d] * names["keys"][b, g, n * r.page + j, d]
        rank[0, j] = ordered(total[0])
    find_least(rank, 0, padded // SLOTS, count, least)
    for d in T.serial(s.key_dim):
        names["pages"][b, g, n // SLOTS, d, n % SLOTS] = T.float32(0)
    for j in T.serial(r.page):
        take(rank, 0, j, least, taken)
        if taken[0] > 0:
            for d in T.serial(s.key_dim):
                names["pages"][b, g, n // SLOTS, d, n % SLOTS] = names["pages"][b, g, n // SLOTS, d, n % SLOTS] + names[
                    "keys"
                ][b, g, n * r.page + j, d] / T.float32(count)


@T.inline
def _write(names, s, r, a, b, g, t, p):
    # Writes one token, what it adds to the sum of its page, and the description of the page that is known by it.
    total = T.alloc_buffer((1,), "float32", scope="local")
    for d in T.serial(s.key_dim):
        names["keys"][b, g, p, d] = names["k"][b, g, t, d]
    for e in T.serial(s.value_dim):
        names["values"][b, g, p, e] = names["v"][b, g, t, e]
    if r.selector.descriptor == "attended":
        _attend_inside(names, s, r, a, b, g, t, p)
        if (p + 1) % r.page == 0:
            _describe_attended(names, s, r, b, g, p // r.page)
    else:
        for d in T.serial(s.key_dim):
            total[0] = T.float32(0)
            for i in T.serial(s.share):
                total[0] = total[0] + names["q"][b, g * s.share + i, t, d]
            _add_sum(names, s, r, b, g, p, d, total[0] / T.float32(s.share))
        if T.And((p + 1) % r.page == 0, p // r.page >= r.window // r.page):
            _describe_representatives(names, s, r, b, g, p // r.page - r.window // r.page)


@T.inline
def _score(names, s, r, a, b, g, t, unit, p, listed):
    # Scores the tokens listed, which are in order of time, turned to where they stand: to their places among these, or
    # so that those of the window are as far away as they are, and all others as far as the window reaches.
    queries = T.alloc_buffer((s.share, s.key_dim), "float32", scope="local")
    key = T.alloc_buffer((1, s.key_dim), "float32", scope="local")
    total = T.alloc_buffer((1,), "float32", scope="local")
    place = T.alloc_buffer((1,), "int64", scope="local")
    place[0] = T.int64(r.window)
    if r.selector.positioner == "compact":
        place[0] = listed[0] - 1
    _turn_queries(names, s, a, b, g, t, place[0], queries)
    for at in T.serial(listed[0]):
        slot = T.Cast("int64", names["list"][unit, at])
        place[0] = r.window - T.min(p - slot, T.int64(r.window))
        if r.selector.positioner == "compact":
            place[0] = at
        _turn(names, s, a, place[0], _key(names, b, g, slot), key, 0)
        for i in T.serial(s.share):
            _multiply(s, queries, i, key, total)
            names["scores"][unit, i, at] = total[0]


@cache
def compact_attention(s: Scores, r: Rule, a: Angles) -> PrimFunc:
    """Make ``memc::compact_attention``, its state in place.

    ``keys [B,G,S,D]`` and ``values [B,G,S,E]`` hold the token at position p in slot p, ``pages [B,G,N,2D,SLOTS]`` the
    description of page n and the sum that it is made from; ``angles [places,2,pairs]`` are cosines and sines of the
    places that are turned to. Otherwise as :func:`memc.backends.tvm.kernels.sparse.sparse_attention`.
    """
    heads, groups, key_dim, value_dim, share = s.heads, s.groups, s.key_dim, s.value_dim, s.share

    @T.inline
    def step(names, b, g, t, unit, p):
        listed = T.alloc_buffer((1,), "int64", scope="local")
        kept = T.alloc_buffer((1,), "int64", scope="local")
        if p >= 0:
            list_tiles(names, s, r, b, g, t, unit, p, listed)
            _score(names, s, r, a, b, g, t, unit, p, listed)
            keep_tokens(names, s, r, unit, p, listed, kept)
            for part in T.serial(share // s.together):
                attend(names, s, r, b, g, t, unit, p, kept, part * s.together)
        else:
            clear(names, s, r, b, g, t)

    @T.prim_func(private=True)
    def compact_attention_(
        q_: T.handle,
        k_: T.handle,
        v_: T.handle,
        p_: T.handle,
        keys_: T.handle,
        values_: T.handle,
        pages_: T.handle,
        angles_: T.handle,
        sinks_: T.handle,
        y_: T.handle,
        lse_: T.handle,
        rank_: T.handle,
        list_: T.handle,
        slots_: T.handle,
        scores_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        batch, tokens, held, described, units = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        places = T.int64()
        q = T.match_buffer(q_, (batch, heads, tokens, key_dim), "float32")
        k = T.match_buffer(k_, (batch, groups, tokens, key_dim), "float32")
        v = T.match_buffer(v_, (batch, groups, tokens, value_dim), "float32")
        positions = T.match_buffer(p_, (batch, tokens), "int64")
        keys = T.match_buffer(keys_, (batch, groups, held, key_dim), "float32")
        values = T.match_buffer(values_, (batch, groups, held, value_dim), "float32")
        pages = T.match_buffer(pages_, (batch, groups, described, 2 * key_dim, SLOTS), "float32")
        angles = T.match_buffer(angles_, (places, 2, a.pairs), "float32")
        sinks = T.match_buffer(sinks_, (heads if s.sink_logits else 1,), "float32")
        y = T.match_buffer(y_, (batch, heads, tokens, value_dim), "float32")
        lse = T.match_buffer(lse_, (batch, heads, tokens) if r.lse else (1,), "float32")
        sizes = T.meta_var(memory(s, r, units, described * SLOTS))
        rank = T.match_buffer(rank_, *sizes["rank"])
        list = T.match_buffer(list_, *sizes["list"])
        slots = T.match_buffer(slots_, *sizes["slots"])
        scores = T.match_buffer(scores_, *sizes["scores"])
        names = T.meta_var(
            {
                "q": q,
                "k": k,
                "v": v,
                "positions": positions,
                "keys": keys,
                "values": values,
                "pages": pages,
                "angles": angles,
                "sinks": sinks,
                "y": y,
                "lse": lse,
                "rank": rank,
                "list": list,
                "again": list,
                "slots": slots,
                "scores": scores,
            }
        )
        for row in T.parallel(batch * groups):
            for t in T.serial(tokens):
                if positions[row // groups, t] >= 0:
                    _write(names, s, r, a, row // groups, row % groups, t, positions[row // groups, t])
        dealt = units // (batch * groups)
        for unit in T.parallel(units):
            b = unit // dealt // groups
            g = unit // dealt % groups
            for turn in T.serial(T.ceildiv(tokens - unit % dealt, dealt)):
                t = turn * dealt + unit % dealt
                step(names, b, g, t, unit, positions[b, t])

    return compact_attention_
