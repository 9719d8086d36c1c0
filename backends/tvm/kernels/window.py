"""``memc::window_memory``: a ring of slots for the window behind the slots of the first tokens."""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm.script import tirx as T

from memc.backends.tvm.isa import Tile
from memc.backends.tvm.kernels.common import SLOTS, Keys, PrimFunc, Scores, add_sink, softmax_rows
from memc.backends.tvm.kernels.window_chunk import LEAST, Ring, chunked, hand_out, take_in


@cache
def window_memory(s: Scores, r: Ring, tile: Tile) -> PrimFunc:
    """Make ``memc::window_memory``, its state in place.

    ``keys [B,G,P,D,SLOTS]`` and ``values [B,G,N,E]`` hold the token at position p in slot p, or past the sinks in
    ``sinks + (p - sinks) % window``: a token is written where the one lies that leaves the window as it comes, prompts
    by the chunk and single tokens one after another. Slots
    fill in order, so that how many hold a token of the sequence follows from its position. Results that nobody reads
    have the shape of a scalar.
    """
    heads, groups, key_dim, value_dim = s.heads, s.groups, s.key_dim, s.value_dim
    share, together, slots, run = s.share, s.together, r.slots, chunked(s, r, tile)

    def describe(names: dict[str, Any], b: Any, h: Any, t: Any, position: Any) -> Keys:
        q, k, v, g = names["q"], names["keys"], names["values"], h // share

        def bias(row: Any, slot: Any) -> Any:
            behind = T.floormod(position - slot, r.window)
            distance = T.if_then_else(slot < r.sinks, position - slot, behind) if r.sinks else behind
            return names["slopes"][h + row] * (T.float32(0) - T.Cast("float32", distance))

        return Keys(
            lambda row, d: q[b, h + row, t, d],
            lambda tile, d, lane: k[b, g, tile, d, lane],
            lambda slot, e: v[b, g, slot, e],
            lambda row, slot: slot < T.min(position + 1, T.int64(slots)),
            bias if s.slopes else None,
        )

    @T.inline
    def read(names, b, h, t, position):
        top = T.alloc_buffer((together,), "float32", scope="local")
        total = T.alloc_buffer((together,), "float32", scope="local")
        acc = T.alloc_buffer((together, value_dim), "float32", scope="local")
        softmax_rows(
            together,
            describe(names, b, h, t, position),
            T.int64(0),
            T.min(position + 1, T.int64(slots)),
            T.int64(-(-slots // SLOTS)),
            s,
            top,
            total,
            acc,
        )
        for i in T.serial(together):
            if s.sink_logits:
                add_sink(i, names["sinks"][h + i], top, total, acc, value_dim)
            for e in T.serial(value_dim):
                names["y"][b, h + i, t, e] = acc[i, e] / total[i]
            if r.lse:
                names["lse"][b, h + i, t] = top[i] + T.log(total[i])

    @T.inline
    def skip(names, b, g, t):
        for h in T.serial(share):
            for e in T.serial(value_dim):
                names["y"][b, g * share + h, t, e] = T.float32(0)
            if r.lse:
                names["lse"][b, g * share + h, t] = T.float32(0)

    @T.inline
    def step(names, b, g, t, position):
        if r.left:
            hand_out(names, s, r, b, g, t, position)
        if position >= 0:
            take_in(names, s, r, b, g, t, position)
            for part in T.serial(share // together):
                read(names, b, g * share + part * together, t, position)
        else:
            skip(names, b, g, t)

    @T.prim_func(private=True)
    def window_memory_(
        q_: T.handle,
        k_: T.handle,
        v_: T.handle,
        p_: T.handle,
        keys_: T.handle,
        values_: T.handle,
        slopes_: T.handle,
        sinks_: T.handle,
        y_: T.handle,
        lse_: T.handle,
        left_key_: T.handle,
        left_value_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        batch, tokens = T.int64(), T.int64()
        q = T.match_buffer(q_, (batch, heads, tokens, key_dim), "float32")
        k = T.match_buffer(k_, (batch, groups, tokens, key_dim), "float32")
        v = T.match_buffer(v_, (batch, groups, tokens, value_dim), "float32")
        positions = T.match_buffer(p_, (batch, tokens), "int64")
        keys = T.match_buffer(keys_, (batch, groups, -(-slots // SLOTS), key_dim, SLOTS), "float32")
        values = T.match_buffer(values_, (batch, groups, slots, value_dim), "float32")
        slopes = T.match_buffer(slopes_, (heads if s.slopes else 1,), "float32")
        sinks = T.match_buffer(sinks_, (heads if s.sink_logits else 1,), "float32")
        y = T.match_buffer(y_, (batch, heads, tokens, value_dim), "float32")
        lse = T.match_buffer(lse_, (batch, heads, tokens) if r.lse else (1,), "float32")
        left_key = T.match_buffer(left_key_, (batch, groups, tokens, key_dim) if r.left else (1,), "float32")
        left_value = T.match_buffer(left_value_, (batch, groups, tokens, value_dim) if r.left else (1,), "float32")
        names = T.meta_var(
            {
                "q": q,
                "k": k,
                "v": v,
                "positions": positions,
                "keys": keys,
                "values": values,
                "slopes": slopes,
                "sinks": sinks,
                "y": y,
                "lse": lse,
                "left_key": left_key,
                "left_value": left_value,
            }
        )
        for row in T.parallel(batch * groups):
            if tokens >= LEAST:
                run(names, step, row // groups, row % groups, tokens)
            else:
                for t in T.serial(tokens):
                    step(names, row // groups, row % groups, t, positions[row // groups, t])

    return window_memory_
