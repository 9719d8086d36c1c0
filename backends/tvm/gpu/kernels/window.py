"""``memc::window_memory``: scores of a ring of slots and of the new tokens side by side, then the new state."""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import te, tirx
from tvm.script import tirx as T

from memc.backends.tvm.gpu.kernels.attention import score
from memc.backends.tvm.gpu.kernels.common import (
    OPAQUE,
    along,
    compute,
    function,
    is_score,
    number,
    single,
    size,
    tensor,
)
from memc.backends.tvm.kernels.common import LOWEST, SLOTS, Expression, PrimFunc, Scores
from memc.backends.tvm.kernels.window_chunk import Ring

FAR = 1 << 60
"""Stands for the first position of a row that has none."""


@cache
def sequence_numbers() -> PrimFunc:
    """Make ``numbers [B,T]``: how many sequences have started in a row of ``positions [B,T]``, up to each token."""
    batch, tokens = size("batch"), size("tokens")
    positions, i = tensor("positions", batch, tokens, dtype="int64"), along("i", tokens)

    def count(b: Any, t: Any) -> Any:
        begins = tirx.And(i <= t, positions[b, i] == number(0))
        return te.sum(tirx.Select(begins, number(1), number(0)), axis=i)

    return function([positions], compute("numbers", (batch, tokens), count))


@cache
def first_position() -> PrimFunc:
    """Make ``first [B]``, the first position of each row that goes on with a sequence, ``FAR`` where none does."""
    batch, tokens = size("batch"), size("tokens")
    positions, numbers = (tensor(name, batch, tokens, dtype="int64") for name in ("positions", "numbers"))
    t = along("t", tokens)

    def real(b: Any) -> Any:
        goes_on = tirx.And(positions[b, t] >= number(0), numbers[b, t] == number(0))
        return te.min(tirx.Select(goes_on, positions[b, t], number(FAR)), axis=t)

    return function([positions, numbers], compute("first", (batch,), real))


@cache
def newest_position() -> PrimFunc:
    """Make ``newest [B]``, the last position of each row's last sequence, -1 where there is none."""
    batch, tokens = size("batch"), size("tokens")
    positions, numbers = (tensor(name, batch, tokens, dtype="int64") for name in ("positions", "numbers"))
    t = along("t", tokens)

    def last(b: Any) -> Any:
        same = numbers[b, t] == numbers[b, tokens - number(1)]
        return te.max(tirx.Select(same, positions[b, t], number(-1)), axis=t)

    return function([positions, numbers], compute("newest", (batch,), last))


def held_position(r: Ring, slot: Expression, first: Expression) -> Expression:
    """Return the position of the token in a slot before a call whose first one is ``first``, -1 for none."""
    behind = first - 1 - T.floormod(first - 1 - slot, T.int64(r.window))
    in_ring = T.if_then_else(behind >= r.sinks, behind, T.int64(-1))
    if not r.sinks:
        return in_ring
    return T.if_then_else(slot < r.sinks, T.if_then_else(slot < first, slot, T.int64(-1)), in_ring)


@cache
def window_scores(s: Scores, r: Ring) -> PrimFunc:
    """Make ``scores [B,H,T,N+T]`` of the N slots and then the new tokens, ``LOWEST`` for what is not read.

    ``keys [B,G,P,D,SLOTS]`` holds the token at position p in slot p, or past the sinks in
    ``sinks + (p - sinks) % window``; ``numbers [B,T]`` tell sequences apart, ``first [B]`` is where the row goes on.
    """
    heads, groups, key_dim, share, slots = s.heads, s.groups, s.key_dim, s.share, r.slots
    tiles = -(-slots // SLOTS)

    def read(position: Any, other: Any) -> Any:
        near = T.Or(position - other < r.window, other < r.sinks)
        return T.And(T.And(other >= 0, other <= position), near)

    def biased(x: Any, slopes: Any, h: Any, distance: Any) -> Any:
        return x + slopes[h] * T.Cast("float32", distance) if s.slopes else x

    @T.prim_func(private=True, s_tir=True)
    def window_scores_(
        q_: T.handle,
        k_: T.handle,
        p_: T.handle,
        numbers_: T.handle,
        keys_: T.handle,
        slopes_: T.handle,
        first_: T.handle,
        scores_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "op_pattern": OPAQUE})
        batch, tokens = T.int64(), T.int64()
        q = T.match_buffer(q_, (batch, heads, tokens, key_dim), "float32")
        k = T.match_buffer(k_, (batch, groups, tokens, key_dim), "float32")
        positions = T.match_buffer(p_, (batch, tokens), "int64")
        numbers = T.match_buffer(numbers_, (batch, tokens), "int64")
        keys = T.match_buffer(keys_, (batch, groups, tiles, key_dim, SLOTS), "float32")
        slopes = T.match_buffer(slopes_, (heads if s.slopes else 1,), "float32")
        first = T.match_buffer(first_, (batch,), "int64")
        scores = T.match_buffer(scores_, (batch, heads, tokens, slots + tokens), "float32")
        for b0, h0, t0, s0 in T.grid(batch, T.int64(heads), tokens, T.int64(slots) + tokens):
            with T.sblock("scores"):
                b, h, t, place = T.axis.remap("SSSS", [b0, h0, t0, s0])
                acc = T.sblock_alloc_buffer((1,), "float32", scope="local")
                other = T.sblock_alloc_buffer((1,), "int64", scope="local")
                acc[0] = T.float32(LOWEST)
                if place < slots:
                    other[0] = held_position(r, place, first[b])
                    if numbers[b, t] == 0 and read(positions[b, t], other[0]):
                        acc[0] = T.float32(0)
                        for d in T.serial(T.int64(key_dim)):
                            acc[0] = acc[0] + q[b, h, t, d] * keys[b, h // share, place // SLOTS, d, place % SLOTS]
                        acc[0] = biased(score(s, acc[0]), slopes, h, other[0] - positions[b, t])
                else:
                    other[0] = positions[b, place - slots]
                    if numbers[b, t] == numbers[b, place - slots] and read(positions[b, t], other[0]):
                        acc[0] = T.float32(0)
                        for d in T.serial(T.int64(key_dim)):
                            acc[0] = acc[0] + q[b, h, t, d] * k[b, h // share, place - slots, d]
                        acc[0] = biased(score(s, acc[0]), slopes, h, other[0] - positions[b, t])
                scores[b, h, t, place] = acc[0]

    return window_scores_


@cache
def window_values(groups: int, value_dim: int, slots: int) -> PrimFunc:
    """Make ``all [B,G,N+T,E]``: the values that a ring holds, and then the new ones."""
    batch, tokens = size("batch"), size("tokens")
    held, v = tensor("held", batch, groups, slots, value_dim), tensor("v", batch, groups, tokens, value_dim)

    def value(b: Any, g: Any, place: Any, e: Any) -> Any:
        ring = tirx.min(place, number(slots - 1))
        return tirx.if_then_else(
            place < number(slots), held[b, g, ring, e], v[b, g, tirx.max(place - number(slots), number(0)), e]
        )

    return function([held, v], compute("all", (batch, groups, number(slots) + tokens, value_dim), value))


@cache
def log_sum(heads: int) -> PrimFunc:
    """Make the log-sum-exp ``[B,H,T]`` of scores from ``top`` and ``total [B,H,T]``, 0 for padding."""
    batch, tokens = size("batch"), size("tokens")
    top, total = tensor("top", batch, heads, tokens), tensor("total", batch, heads, tokens)
    positions = tensor("positions", batch, tokens, dtype="int64")

    def lse(b: Any, h: Any, t: Any) -> Any:
        there = tirx.And(positions[b, t] >= number(0), is_score(top[b, h, t]))
        return tirx.if_then_else(there, top[b, h, t] + te.log(total[b, h, t]), single(0))

    return function([top, total, positions], compute("lse", top.shape, lse))


@cache
def hand_out(groups: int, width: int, r: Ring, *, tiled: bool) -> PrimFunc:
    """Make ``left [B,G,T,width]``: what leaves the window as each new token comes, zeros where nothing does.

    ``held`` are the keys of a ring in tiles of slots, or its values ``[B,G,N,width]``.
    """
    slots = r.slots
    shape = (-(-slots // SLOTS), width, SLOTS) if tiled else (slots, width)

    def at(held: Any, b: Any, g: Any, slot: Any, d: Any) -> Any:
        return held[b, g, slot // SLOTS, d, slot % SLOTS] if tiled else held[b, g, slot, d]

    @T.prim_func(private=True, s_tir=True)
    def hand_out_(x_: T.handle, p_: T.handle, numbers_: T.handle, held_: T.handle, first_: T.handle, left_: T.handle):
        T.func_attr({"tirx.noalias": True, "op_pattern": OPAQUE})
        batch, tokens = T.int64(), T.int64()
        x = T.match_buffer(x_, (batch, groups, tokens, width), "float32")
        positions = T.match_buffer(p_, (batch, tokens), "int64")
        numbers = T.match_buffer(numbers_, (batch, tokens), "int64")
        held = T.match_buffer(held_, (batch, groups, *shape), "float32")
        first = T.match_buffer(first_, (batch,), "int64")
        left = T.match_buffer(left_, (batch, groups, tokens, width), "float32")
        for b0, g0, t0, d0 in T.grid(batch, T.int64(groups), tokens, T.int64(width)):
            with T.sblock("left"):
                b, g, t, d = T.axis.remap("SSSS", [b0, g0, t0, d0])
                acc = T.sblock_alloc_buffer((1,), "float32", scope="local")
                gone = T.sblock_alloc_buffer((1,), "int64", scope="local")
                acc[0] = T.float32(0)
                gone[0] = positions[b, t] - r.window
                if positions[b, t] >= 0 and gone[0] >= r.sinks:
                    if numbers[b, t] == 0 and gone[0] < first[b]:
                        acc[0] = at(held, b, g, r.slot_of(gone[0]), d)
                    else:
                        # Padding may lie between the tokens, so that how far back it lies is not known.
                        for i in T.serial(t):
                            if positions[b, i] == gone[0] and numbers[b, i] == numbers[b, t]:
                                acc[0] = x[b, g, i, d]
                left[b, g, t, d] = acc[0]

    return hand_out_


@cache
def take_in(s: Scores, r: Ring) -> PrimFunc:
    """Write the tokens that stay into a ring of ``keys`` and ``values``, and return ``read [B,H,T,E]`` as it is.

    No two of them have a slot in common: what leaves the window within the call, or is of a sequence that ends in it,
    is not written. That the result
    passes through keeps the ring from being written before it has been read.
    """
    heads, groups, key_dim, value_dim, slots = s.heads, s.groups, s.key_dim, s.value_dim, r.slots
    tiles = -(-slots // SLOTS)

    def stays(position: Any, newest: Any, sequence: Any, last: Any) -> Any:
        near = T.Or(position < r.sinks, newest - position < r.window)
        return T.And(T.And(position >= 0, sequence == last), near)

    @T.prim_func(private=True, s_tir=True)
    def take_in_(
        k_: T.handle,
        v_: T.handle,
        p_: T.handle,
        numbers_: T.handle,
        keys_: T.handle,
        values_: T.handle,
        newest_: T.handle,
        read_: T.handle,
        y_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "op_pattern": OPAQUE})
        batch, tokens = T.int64(), T.int64()
        k = T.match_buffer(k_, (batch, groups, tokens, key_dim), "float32")
        v = T.match_buffer(v_, (batch, groups, tokens, value_dim), "float32")
        positions = T.match_buffer(p_, (batch, tokens), "int64")
        numbers = T.match_buffer(numbers_, (batch, tokens), "int64")
        keys = T.match_buffer(keys_, (batch, groups, tiles, key_dim, SLOTS), "float32")
        values = T.match_buffer(values_, (batch, groups, slots, value_dim), "float32")
        newest = T.match_buffer(newest_, (batch,), "int64")
        read = T.match_buffer(read_, (batch, heads, tokens, value_dim), "float32")
        y = T.match_buffer(y_, (batch, heads, tokens, value_dim), "float32")
        for b0, g0, t0, d0 in T.grid(batch, T.int64(groups), tokens, T.int64(key_dim)):
            with T.sblock("keys"):
                b, g, t, d = T.axis.remap("SSSS", [b0, g0, t0, d0])
                if stays(positions[b, t], newest[b], numbers[b, t], numbers[b, tokens - 1]):
                    keys[b, g, r.slot_of(positions[b, t]) // SLOTS, d, r.slot_of(positions[b, t]) % SLOTS] = k[
                        b, g, t, d
                    ]
        for b0, g0, t0, e0 in T.grid(batch, T.int64(groups), tokens, T.int64(value_dim)):
            with T.sblock("values"):
                b, g, t, e = T.axis.remap("SSSS", [b0, g0, t0, e0])
                if stays(positions[b, t], newest[b], numbers[b, t], numbers[b, tokens - 1]):
                    values[b, g, r.slot_of(positions[b, t]), e] = v[b, g, t, e]
        for b0, h0, t0, e0 in T.grid(batch, T.int64(heads), tokens, T.int64(value_dim)):
            with T.sblock("pass"):
                b, h, t, e = T.axis.remap("SSSS", [b0, h0, t0, e0])
                y[b, h, t, e] = read[b, h, t, e]

    return take_in_
