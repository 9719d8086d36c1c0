"""``memc::quantised_attention``: pages are coded as they fill up, and a query reads its own page as it is."""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm.script import tirx as T

from memc.backends.tvm.kernels.codes import Codes
from memc.backends.tvm.kernels.common import LOWEST, SLOTS, Keys, PrimFunc, Scores
from memc.backends.tvm.kernels.pick import keep_tokens, list_tiles
from memc.backends.tvm.kernels.rank import Rule
from memc.backends.tvm.kernels.sparse import memory
from memc.backends.tvm.kernels.weigh import Part, add_all, clear, finish, values_by, weigh


def _exact(names: dict[str, Any], c: Codes, b: Any, g: Any, what: str, position: Any, d: Any, fresh: bool) -> Any:
    """Return a channel of a key or value (``what``) as it is: of the call (``fresh``), or of the page begun before."""
    if fresh:
        return names[what][b, g, T.Cast("int64", names["columns"][b, position - names["span"][b, 0]]), d]
    return names[f"{what}_tail"][b, g, position % c.page, d]


def _values(names: dict[str, Any], c: Codes, b: Any, g: Any, first: Any, fresh: bool) -> Keys:
    """Describe the values as they are of the tokens from position ``first`` on."""
    return values_by(lambda at, e: _exact(names, c, b, g, "v", first + at, e, fresh))


def _levels(names: dict[str, Any], c: Codes, b: Any, g: Any, unit: Any, size: int, first: int) -> Keys:
    """Describe the levels of the values of the tokens that are listed, of the half of channels from ``first`` on."""

    def level(at: Any, e: Any) -> Any:
        slot = T.Cast("int64", names["slots"][unit, at])
        return c.level(names["values"][b, g, slot, e - first], T.int32(first), size)

    return values_by(level)


@T.inline
def _find_columns(names, b, tokens):
    # Lists the columns of a row's tokens, whose positions rise by one from the first of ``span`` to before the second.
    names["span"][b, 0] = T.int64(0)
    names["span"][b, 1] = T.int64(0)
    for t in T.serial(tokens):
        if names["positions"][b, t] >= 0:
            if names["span"][b, 1] == 0:
                names["span"][b, 0] = names["positions"][b, t]
            names["columns"][b, names["positions"][b, t] - names["span"][b, 0]] = T.Cast("int32", t)
            names["span"][b, 1] = names["positions"][b, t] + 1


@T.inline
def _code_value(names, s, c, b, g, position):
    # Writes the code of a new token's value, and where its range begins and what a level of it is.
    ends = T.alloc_buffer((3,), "float32", scope="local")
    half = T.meta_var(c.half(s.value_dim))
    ends[0] = T.float32(LOWEST)
    ends[1] = T.float32(-LOWEST)
    for e in T.serial(s.value_dim):
        ends[0] = T.max(ends[0], _exact(names, c, b, g, "v", position, e, True))
        ends[1] = T.min(ends[1], _exact(names, c, b, g, "v", position, e, True))
    ends[2] = c.step(ends[0], ends[1])
    names["ranges"][b, g, position, 0] = ends[1]
    names["ranges"][b, g, position, 1] = ends[2]
    for e in T.serial(half):
        names["values"][b, g, position, e] = c.code(_exact(names, c, b, g, "v", position, e, True), ends[1], ends[2])
    for e in T.serial(s.value_dim - half):
        names["values"][b, g, position, e] = names["values"][b, g, position, e] + T.uint8(16) * c.code(
            _exact(names, c, b, g, "v", position, half + e, True), ends[1], ends[2]
        )


@T.inline
def _code_page(names, s, c, b, g, n):
    # Writes bounds and codes of page ``n``, which is full: some of its keys are in the tail, the others in the call.
    ends = T.alloc_buffer((3,), "float32", scope="local")
    keys = T.alloc_buffer((c.page,), "float32", scope="local")
    half = T.meta_var(c.half(s.key_dim))
    for d in T.serial(s.key_dim):
        for i in T.serial(c.page):
            if n * c.page + i < names["span"][b, 0]:
                keys[i] = _exact(names, c, b, g, "k", n * c.page + i, d, False)
            else:
                keys[i] = _exact(names, c, b, g, "k", n * c.page + i, d, True)
        ends[0] = keys[0]
        ends[1] = keys[0]
        for i in T.serial(c.page):
            ends[0] = T.max(ends[0], keys[i])
            ends[1] = T.min(ends[1], keys[i])
        names["pages"][b, g, n // SLOTS, d, n % SLOTS] = ends[0]
        names["pages"][b, g, n // SLOTS, s.key_dim + d, n % SLOTS] = ends[1]
        ends[2] = c.step(ends[0], ends[1])
        for i in T.serial(c.page):
            tile = (n * c.page + i) // SLOTS
            lane = (n * c.page + i) % SLOTS
            if d < half:
                names["codes"][b, g, tile, d, lane] = c.code(keys[i], ends[1], ends[2])
            elif half < s.key_dim:
                names["codes"][b, g, tile, d - half, lane] = names["codes"][b, g, tile, d - half, lane] + T.uint8(
                    16
                ) * c.code(keys[i], ends[1], ends[2])


@T.inline
def _write(names, s, c, b, g):
    for i in T.serial(names["span"][b, 1] - names["span"][b, 0]):
        position = names["span"][b, 0] + i
        _code_value(names, s, c, b, g, position)
        if (position + 1) % c.page == 0:
            _code_page(names, s, c, b, g, position // c.page)


@T.inline
def _save_tails(names, s, c, b, g):
    # Keeps what is not of a complete page; what is behind it in the tails is never read.
    first = T.max(names["span"][b, 0], names["span"][b, 1] // c.page * c.page)
    for i in T.serial(T.max(names["span"][b, 1] - first, T.int64(0))):
        for d in T.serial(s.key_dim):
            names["k_tail"][b, g, (first + i) % c.page, d] = _exact(names, c, b, g, "k", first + i, d, True)
        for e in T.serial(s.value_dim):
            names["v_tail"][b, g, (first + i) % c.page, e] = _exact(names, c, b, g, "v", first + i, e, True)


@T.inline
def _find_ranges(names, s, c, b, g, tile, lanes, low, step):
    # Leaves where the ranges of the channels of a tile's keys begin and what a level is, for each page on the tile.
    for j in T.serial(lanes):
        page = (tile * SLOTS + j) // c.page
        for d in T.serial(s.key_dim):
            low[d, j] = names["pages"][b, g, page // SLOTS, s.key_dim + d, page % SLOTS]
            step[d, j] = c.step(names["pages"][b, g, page // SLOTS, d, page % SLOTS], low[d, j])


@T.inline
def _score_codes(names, s, c, b, g, t, unit, listed):
    # As ``score_tiles``, of keys that are read through their codes.
    lanes = T.meta_var(1 if c.page % SLOTS == 0 else SLOTS)
    low = T.alloc_buffer((s.key_dim, lanes), "float32", scope="local")
    step = T.alloc_buffer((s.key_dim, lanes), "float32", scope="local")
    product = T.alloc_buffer((s.together, SLOTS), "float32", scope="local")
    known = T.alloc_buffer((1,), "int64", scope="local")
    known[0] = T.int64(-1)
    for at in T.serial(listed[0]):
        tile = T.Cast("int64", names["list"][unit, at])
        if T.Or(T.bool(lanes > 1), tile * SLOTS // c.page != known[0]):
            _find_ranges(names, s, c, b, g, tile, lanes, low, step)
            known[0] = tile * SLOTS // c.page
        for part in T.serial(s.share // s.together):
            for i in T.unroll(s.together):
                for j in T.vectorized(SLOTS):
                    product[i, j] = T.float32(0)
            for d in T.serial(s.key_dim):
                for i in T.unroll(s.together):
                    for j in T.vectorized(SLOTS):
                        product[i, j] = product[i, j] + names["q"][b, g * s.share + part * s.together + i, t, d] * (
                            low[d, j % lanes]
                            + c.level(names["codes"][b, g, tile, c.byte(d, s.key_dim), j], d, s.key_dim)
                            * step[d, j % lanes]
                        )
            for i in T.unroll(s.together):
                for j in T.vectorized(SLOTS):
                    names["scores"][unit, part * s.together + i, at * SLOTS + j] = product[i, j] * T.float32(s.scale)


@T.inline
def _score_one(names, s, c, b, g, t, unit, position, place, fresh):
    # Writes the scores of a key as it is, of the call (``fresh``) or of the tail.
    product = T.alloc_buffer((s.vector,), "float32", scope="local")
    total = T.alloc_buffer((1,), "float32", scope="local")
    for i in T.serial(s.share):
        for j in T.vectorized(s.vector):
            product[j] = T.float32(0)
        for d in T.serial(s.key_dim // s.vector):
            for j in T.vectorized(s.vector):
                product[j] = product[j] + names["q"][b, g * s.share + i, t, d * s.vector + j] * _exact(
                    names, c, b, g, "k", position, d * s.vector + j, fresh
                )
        total[0] = T.float32(0)
        for j in T.serial(s.vector):
            total[0] = total[0] + product[j]
        names["scores"][unit, i, place] = total[0] * T.float32(s.scale)


@T.inline
def _score_own(names, s, c, b, g, t, unit, p, listed):
    # Makes the scores of the query's own page anew, by its keys as they are. Its tiles are the last that are listed.
    for n in T.serial(p % c.page + 1):
        position = p // c.page * c.page + n
        place = (listed[0] - 1 - (p // SLOTS - position // SLOTS)) * SLOTS + position % SLOTS
        if position < names["span"][b, 0]:
            _score_one(names, s, c, b, g, t, unit, position, place, False)
        else:
            _score_one(names, s, c, b, g, t, unit, position, place, True)


@T.inline
def _attend(names, s, r, c, b, g, t, unit, p, kept, start):
    # Values in codes are a weight times where their range begins, which all channels share, and what a level of it
    # is times codes. Those of the query's own page are the last that are kept, and are read as they are.
    top = T.alloc_buffer((s.together,), "float32", scope="local")
    total = T.alloc_buffer((s.together,), "float32", scope="local")
    base = T.alloc_buffer((1,), "float32", scope="local")
    acc = T.alloc_buffer((s.together, s.value_dim), "float32", scope="local")
    part = T.alloc_buffer((s.together, 32), "float32", scope="local")
    own = p // c.page * c.page
    coded = kept[0] - (p % c.page + 1)
    before = T.max(T.min(names["span"][b, 0], p + 1) - own, T.int64(0))
    for i in T.serial(s.together):
        weigh(names, s, r, unit, start + i, p, kept, top, total, i)
        base[0] = T.float32(0)
        for j in T.serial(coded):
            slot = T.Cast("int64", names["slots"][unit, j])
            base[0] = base[0] + names["scores"][unit, start + i, j] * names["ranges"][b, g, slot, 0]
            names["scores"][unit, start + i, j] = names["scores"][unit, start + i, j] * names["ranges"][b, g, slot, 1]
        for e in T.serial(s.value_dim):
            acc[i, e] = base[0]
    half = T.meta_var(c.half(s.value_dim))
    weights = T.meta_var(Part(names["scores"], unit, start))
    low = T.meta_var(_levels(names, c, b, g, unit, s.value_dim, 0))
    add_all(s, low, coded, weights, part, acc, 0, half)
    if half < s.value_dim:
        high = T.meta_var(_levels(names, c, b, g, unit, s.value_dim, half))
        add_all(s, high, coded, weights, part, acc, half, s.value_dim - half)
    of_held = T.meta_var(Part(names["scores"], unit, start, coded))
    held = T.meta_var(_values(names, c, b, g, own, False))
    add_all(s, held, before, of_held, part, acc, 0, s.value_dim)
    of_new = T.meta_var(Part(names["scores"], unit, start, coded + before))
    new = T.meta_var(_values(names, c, b, g, own + before, True))
    add_all(s, new, p + 1 - own - before, of_new, part, acc, 0, s.value_dim)
    finish(names, s, r, b, g, t, start, top, total, acc)


def memory_of(s: Scores, r: Rule, batch: Any, tokens: Any, units: Any, pages: Any) -> dict[str, Any]:
    """Return shapes and types of what is needed beside the state: as :func:`memory`, and where a row's tokens are.

    ``columns`` lists the columns of the tokens of a call, ``span`` their first position and the one behind the last.
    """
    needed = memory(s, r, units, pages)
    columns = {"columns": ((batch, tokens), "int32"), "span": ((batch, 2), "int64")}
    return {**{name: needed[name] for name in ("rank", "list", "again", "slots", "scores")}, **columns}


@cache
def quantised_attention(s: Scores, r: Rule, c: Codes) -> PrimFunc:
    """Make ``memc::quantised_attention``, its state in place.

    ``codes [B,G,P,.,SLOTS]`` and ``values [B,G,S,.]`` hold the codes of the token at position p in slot p, ``pages
    [B,G,N,2D,SLOTS]`` largest and smallest of each channel of page n, ``ranges [B,G,S,2]`` smallest and step of each
    value, ``k_tail [B,G,page,D]`` and ``v_tail [B,G,page,E]`` the tokens of the page that is not complete. Codes are
    written first, tails last: in between a query reads its own page from the tails and the call. What it reads of
    other pages is found as in :func:`memc.backends.tvm.kernels.sparse.sparse_attention`.
    """
    heads, groups, key_dim, value_dim, share = s.heads, s.groups, s.key_dim, s.value_dim, s.share

    @T.inline
    def step(names, b, g, t, unit, p):
        listed = T.alloc_buffer((1,), "int64", scope="local")
        kept = T.alloc_buffer((1,), "int64", scope="local")
        if p >= 0:
            list_tiles(names, s, r, b, g, t, unit, p, listed)
            _score_codes(names, s, c, b, g, t, unit, listed)
            _score_own(names, s, c, b, g, t, unit, p, listed)
            keep_tokens(names, s, r, unit, p, listed, kept)
            for part in T.serial(share // s.together):
                _attend(names, s, r, c, b, g, t, unit, p, kept, part * s.together)
        else:
            clear(names, s, r, b, g, t)

    @T.prim_func(private=True)
    def quantised_attention_(
        q_: T.handle,
        k_: T.handle,
        v_: T.handle,
        p_: T.handle,
        codes_: T.handle,
        values_: T.handle,
        pages_: T.handle,
        ranges_: T.handle,
        k_tail_: T.handle,
        v_tail_: T.handle,
        sinks_: T.handle,
        y_: T.handle,
        lse_: T.handle,
        rank_: T.handle,
        list_: T.handle,
        again_: T.handle,
        slots_: T.handle,
        scores_: T.handle,
        columns_: T.handle,
        span_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        batch, tokens, tiles, held, described = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        units = T.int64()
        q = T.match_buffer(q_, (batch, heads, tokens, key_dim), "float32")
        k = T.match_buffer(k_, (batch, groups, tokens, key_dim), "float32")
        v = T.match_buffer(v_, (batch, groups, tokens, value_dim), "float32")
        positions = T.match_buffer(p_, (batch, tokens), "int64")
        codes = T.match_buffer(codes_, (batch, groups, tiles, c.half(key_dim), SLOTS), "uint8")
        values = T.match_buffer(values_, (batch, groups, held, c.half(value_dim)), "uint8")
        pages = T.match_buffer(pages_, (batch, groups, described, 2 * key_dim, SLOTS), "float32")
        ranges = T.match_buffer(ranges_, (batch, groups, held, 2), "float32")
        k_tail = T.match_buffer(k_tail_, (batch, groups, c.page, key_dim), "float32")
        v_tail = T.match_buffer(v_tail_, (batch, groups, c.page, value_dim), "float32")
        sinks = T.match_buffer(sinks_, (heads if s.sink_logits else 1,), "float32")
        y = T.match_buffer(y_, (batch, heads, tokens, value_dim), "float32")
        lse = T.match_buffer(lse_, (batch, heads, tokens) if r.lse else (1,), "float32")
        sizes = T.meta_var(memory_of(s, r, batch, tokens, units, described * SLOTS))
        rank = T.match_buffer(rank_, *sizes["rank"])
        list = T.match_buffer(list_, *sizes["list"])
        again = T.match_buffer(again_, *sizes["again"])
        slots = T.match_buffer(slots_, *sizes["slots"])
        scores = T.match_buffer(scores_, *sizes["scores"])
        columns = T.match_buffer(columns_, *sizes["columns"])
        span = T.match_buffer(span_, *sizes["span"])
        names = T.meta_var(
            {
                "q": q,
                "k": k,
                "v": v,
                "positions": positions,
                "codes": codes,
                "values": values,
                "pages": pages,
                "ranges": ranges,
                "k_tail": k_tail,
                "v_tail": v_tail,
                "sinks": sinks,
                "y": y,
                "lse": lse,
                "rank": rank,
                "list": list,
                "again": again,
                "slots": slots,
                "scores": scores,
                "columns": columns,
                "span": span,
            }
        )
        for b in T.serial(batch):
            _find_columns(names, b, tokens)
        for row in T.parallel(batch * groups):
            _write(names, s, c, row // groups, row % groups)
        dealt = units // (batch * groups)
        for unit in T.parallel(units):
            b = unit // dealt // groups
            g = unit // dealt % groups
            for turn in T.serial(T.ceildiv(tokens - unit % dealt, dealt)):
                t = turn * dealt + unit % dealt
                step(names, b, g, t, unit, positions[b, t])
        for row in T.parallel(batch * groups):
            _save_tails(names, s, c, row // groups, row % groups)

    return quantised_attention_
