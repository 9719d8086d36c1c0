"""``memc::attention`` over slots that hold the token of each position, and ``memc::full_attention``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from tvm.script import tirx as T

from memc.backends.tvm.kernels.common import (
    ROWS,
    SLOTS,
    Expression,
    Keys,
    PrimFunc,
    Scores,
    add_sink,
    softmax_rows,
)


@dataclass(frozen=True)
class Range:
    """Who reads whom in ``memc::attention``; fields as its arguments, 0 for none."""

    window: int = 0
    chunk: int = 0
    prefix: int = 0

    def low(self, position: Expression) -> Expression:
        """Return the first position that a query reads."""
        first: Expression = T.int64(0)
        if self.window:
            first = T.max(first, position - (self.window - 1))
        if self.chunk:
            first = T.max(first, position // self.chunk * self.chunk)
        return T.if_then_else(position < self.prefix, T.int64(0), first) if self.prefix else first

    def high(self, position: Expression, newest: Expression) -> Expression:
        """Return one more than the last position that a query reads; ``newest`` is the last of its sequence."""
        if not self.prefix:
            return position + 1
        return T.if_then_else(position < self.prefix, T.min(T.int64(self.prefix), newest + 1), position + 1)


def _rows(s: Scores, together: int, b: Any, h: Any, t: Any, names: dict[str, Any], low: Any, high: Any) -> Keys:
    """Describe ``together`` heads from ``h`` on of the tokens from ``t`` on, over keys and values in slots."""
    q, k, v, g = names["q"], names["k"], names["v"], h // s.share

    def bias(row: Any, slot: Any) -> Any:
        distance = slot - names["positions"][b, t + row // together]
        return names["slopes"][h + row % together] * T.Cast("float32", distance)

    return Keys(
        lambda row, d: q[b, h + row % together, t + row // together, d],
        lambda tile, d, lane: k[b, g, tile, d, lane],
        lambda slot, e: v[b, g, slot, e],
        lambda row, slot: T.And(low[row] <= slot, slot < high[row]),
        bias if s.slopes else None,
    )


@cache
def attention(s: Scores, r: Range) -> PrimFunc:
    """Make ``memc::attention``, its state in place.

    ``keys [B,G,P,D,SLOTS]`` and ``values [B,G,S,E]`` hold the token at position p in slot p. The new tokens are written
    first, so that no sequence may start in a call after tokens of another one in the same row.
    """
    heads, groups, key_dim, value_dim = s.heads, s.groups, s.key_dim, s.value_dim
    together = s.together
    several = max(1, ROWS // together)

    @T.inline
    def write(key, value, positions, keys, values, b, g, tokens):
        for t in T.serial(tokens):
            if positions[b, t] >= 0:
                for d in T.serial(key_dim):
                    keys[b, g, positions[b, t] // SLOTS, d, positions[b, t] % SLOTS] = key[b, g, t, d]
                for e in T.serial(value_dim):
                    values[b, g, positions[b, t], e] = value[b, g, t, e]

    @T.inline
    def read(names, b, h, t, rows, newest, tiles):
        low = T.alloc_buffer((rows,), "int64", scope="local")
        high = T.alloc_buffer((rows,), "int64", scope="local")
        ends = T.alloc_buffer((2,), "int64", scope="local")
        top = T.alloc_buffer((rows,), "float32", scope="local")
        total = T.alloc_buffer((rows,), "float32", scope="local")
        acc = T.alloc_buffer((rows, value_dim), "float32", scope="local")
        for i in T.serial(rows):
            low[i] = r.low(names["positions"][b, t + i // together])
            high[i] = r.high(names["positions"][b, t + i // together], newest)
            if names["positions"][b, t + i // together] < 0:
                low[i] = T.int64(0)
                high[i] = T.int64(0)
        ends[0] = low[0]
        ends[1] = high[0]
        for i in T.serial(rows - 1):
            if high[i + 1] > 0:
                ends[0] = T.if_then_else(ends[1] > 0, T.min(ends[0], low[i + 1]), low[i + 1])
                ends[1] = T.max(ends[1], high[i + 1])
        softmax_rows(rows, _rows(s, together, b, h, t, names, low, high), ends[0], ends[1], tiles, s, top, total, acc)
        for i in T.serial(rows):
            if s.sink_logits:
                add_sink(i, names["sinks"][h + i % together], top, total, acc, value_dim)
            for e in T.serial(value_dim):
                names["y"][b, h + i % together, t + i // together, e] = T.if_then_else(
                    total[i] > T.float32(0), acc[i, e] / total[i], T.float32(0)
                )

    @T.prim_func(private=True)
    def attention_(
        q_: T.handle,
        k_: T.handle,
        v_: T.handle,
        p_: T.handle,
        keys_: T.handle,
        values_: T.handle,
        slopes_: T.handle,
        sinks_: T.handle,
        y_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        batch, tokens, tiles, slots = T.int64(), T.int64(), T.int64(), T.int64()
        q = T.match_buffer(q_, (batch, heads, tokens, key_dim), "float32")
        k = T.match_buffer(k_, (batch, groups, tokens, key_dim), "float32")
        v = T.match_buffer(v_, (batch, groups, tokens, value_dim), "float32")
        positions = T.match_buffer(p_, (batch, tokens), "int64")
        keys = T.match_buffer(keys_, (batch, groups, tiles, key_dim, SLOTS), "float32")
        values = T.match_buffer(values_, (batch, groups, slots, value_dim), "float32")
        slopes = T.match_buffer(slopes_, (heads if s.slopes else 1,), "float32")
        sinks = T.match_buffer(sinks_, (heads if s.sink_logits else 1,), "float32")
        y = T.match_buffer(y_, (batch, heads, tokens, value_dim), "float32")
        for row in T.parallel(batch * groups):
            write(k, v, positions, keys, values, row // groups, row % groups, tokens)
        names = T.meta_var(
            {"q": q, "k": keys, "v": values, "positions": positions, "slopes": slopes, "sinks": sinks, "y": y}
        )
        blocks = T.ceildiv(tokens, several)
        for unit in T.parallel(batch * (heads // together) * blocks):
            b = unit // blocks // (heads // together)
            h = unit // blocks % (heads // together) * together
            t = unit % blocks * several
            newest = T.alloc_buffer((1,), "int64", scope="local")
            newest[0] = T.int64(-1)
            if r.prefix > 0:
                for i in T.serial(tokens):
                    newest[0] = T.max(newest[0], positions[b, i])
            if t + several <= tokens:
                read(names, b, h, t, together * several, newest[0], tiles)
            else:
                for i in T.serial(tokens - t):
                    read(names, b, h, t + i, together, newest[0], tiles)

    return attention_


@cache
def full_attention(s: Scores, *, masked: bool, bias: tuple[bool, ...] | None) -> PrimFunc:
    """Make ``memc::full_attention``; ``packed [B,G,P,D,SLOTS]`` is memory for the keys, a second result.

    ``bias`` tells which axes of the additive bias ``[B or 1,H or 1,T or 1,S or 1]`` have their size, None without one.
    """
    heads, groups, key_dim, value_dim = s.heads, s.groups, s.key_dim, s.value_dim
    together = s.together
    several = max(1, ROWS // together)
    sized = bias or (False,) * 4

    def describe(names: dict[str, Any], b: Any, h: Any, t: Any, held: Any) -> Keys:
        q, k, v, g = names["q"], names["packed"], names["v"], h // s.share

        def added(row: Any, slot: Any) -> Any:
            place = (b, h + row % together, t + row // together, slot)
            index = [at if there else T.int64(0) for at, there in zip(place, sized, strict=True)]
            return names["bias"][tuple(index)]

        def allowed(row: Any, slot: Any) -> Any:
            if not masked:
                return slot < held
            return T.And(slot < held, names["positions"][b, T.min(slot, held - 1)] >= 0)

        return Keys(
            lambda row, d: q[b, h + row % together, t + row // together, d],
            lambda tile, d, lane: k[b, g, tile, d, lane],
            lambda slot, e: v[b, g, slot, e],
            allowed,
            None if bias is None else added,
        )

    @T.inline
    def read(names, b, h, t, rows, held, tiles):
        top = T.alloc_buffer((rows,), "float32", scope="local")
        total = T.alloc_buffer((rows,), "float32", scope="local")
        acc = T.alloc_buffer((rows, value_dim), "float32", scope="local")
        softmax_rows(rows, describe(names, b, h, t, held), T.int64(0), held, tiles, s, top, total, acc)
        for i in T.serial(rows):
            if s.sink_logits:
                add_sink(i, names["sinks"][h + i % together], top, total, acc, value_dim)
            for e in T.serial(value_dim):
                names["y"][b, h + i % together, t + i // together, e] = T.if_then_else(
                    total[i] > T.float32(0), acc[i, e] / total[i], T.float32(0)
                )

    @T.prim_func(private=True)
    def full_attention_(
        q_: T.handle,
        k_: T.handle,
        v_: T.handle,
        p_: T.handle,
        bias_: T.handle,
        sinks_: T.handle,
        y_: T.handle,
        packed_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        batch, tokens, held = T.int64(), T.int64(), T.int64()
        sizes = T.int64(), T.int64(), T.int64(), T.int64()
        q = T.match_buffer(q_, (batch, heads, tokens, key_dim), "float32")
        k = T.match_buffer(k_, (batch, groups, held, key_dim), "float32")
        v = T.match_buffer(v_, (batch, groups, held, value_dim), "float32")
        positions = T.match_buffer(p_, (batch, held) if masked else (1, 1), "int64")
        added = T.match_buffer(bias_, sizes, "float32")
        sinks = T.match_buffer(sinks_, (heads if s.sink_logits else 1,), "float32")
        y = T.match_buffer(y_, (batch, heads, tokens, value_dim), "float32")
        packed = T.match_buffer(packed_, (batch, groups, T.ceildiv(held, SLOTS), key_dim, SLOTS), "float32")
        for unit in T.parallel(batch * groups * T.ceildiv(held, SLOTS)):
            for d in T.serial(key_dim):
                for lane in T.serial(SLOTS):
                    tile = unit % T.ceildiv(held, SLOTS)
                    row = unit // T.ceildiv(held, SLOTS)
                    packed[row // groups, row % groups, tile, d, lane] = k[
                        row // groups, row % groups, T.min(tile * SLOTS + lane, held - 1), d
                    ]
        names = T.meta_var(
            {"q": q, "packed": packed, "v": v, "positions": positions, "bias": added, "sinks": sinks, "y": y}
        )
        blocks = T.ceildiv(tokens, several)
        for unit in T.parallel(batch * (heads // together) * blocks):
            b = unit // blocks // (heads // together)
            h = unit // blocks % (heads // together) * together
            t = unit % blocks * several
            if t + several <= tokens:
                read(names, b, h, t, together * several, held, T.ceildiv(held, SLOTS))
            else:
                for i in T.serial(tokens - t):
                    read(names, b, h, t + i, together, held, T.ceildiv(held, SLOTS))

    return full_attention_
