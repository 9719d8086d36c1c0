"""``memc::events``: surprises, the ends of events, and the numbers of all slots, row by row."""

from __future__ import annotations

from functools import cache

from tvm.script import tirx as T

from memc.backends.tvm.kernels.common import LOWEST, SLOTS, PrimFunc, exp
from memc.dialect.events import NEAR
from memc.kernels.events.rule import LEAST, Segmentation


@T.inline
def _surprise(row, width, token, out):
    # Writes into ``out[0]`` how little the logits ``row(j)`` expect a token: their log-sum-exp less its own.
    lanes = T.alloc_buffer((SLOTS,), "float32", scope="local")
    top = T.alloc_buffer((1,), "float32", scope="local")
    for j in T.vectorized(SLOTS):
        lanes[j] = T.float32(LOWEST)
    for block in T.serial(width // SLOTS):
        for j in T.vectorized(SLOTS):
            lanes[j] = T.max(lanes[j], row(block * SLOTS + j))
    top[0] = T.float32(LOWEST)
    for j in T.serial(SLOTS):
        top[0] = T.max(top[0], lanes[j])
    for j in T.serial(width % SLOTS):
        top[0] = T.max(top[0], row(width // SLOTS * SLOTS + j))
    for j in T.vectorized(SLOTS):
        lanes[j] = T.float32(0)
    for block in T.serial(width // SLOTS):
        for j in T.vectorized(SLOTS):
            lanes[j] = lanes[j] + exp(row(block * SLOTS + j) - top[0])
    out[0] = T.float32(0)
    for j in T.serial(SLOTS):
        out[0] = out[0] + lanes[j]
    for j in T.serial(width % SLOTS):
        out[0] = out[0] + exp(row(width // SLOTS * SLOTS + j) - top[0])
    out[0] = top[0] + T.log(out[0]) - row(token)


@T.inline
def _limit(ring, b, p, e, sums):
    # Writes into ``sums[0]`` how many surprises there are before position ``p``, and into ``sums[1]`` the mean of
    # those plus ``gamma`` times their standard deviation.
    total = T.alloc_buffer((2,), "float32", scope="local")
    sums[0] = T.float32(0)
    total[0] = T.float32(0)
    for j in T.serial(e.history):
        if p - 1 - T.floormod(p - 1 - j, T.int64(e.history)) >= 1:
            sums[0] = sums[0] + T.float32(1)
            total[0] = total[0] + ring[b, j]
    total[0] = total[0] / T.max(sums[0], T.float32(1))
    total[1] = T.float32(0)
    for j in T.serial(e.history):
        if p - 1 - T.floormod(p - 1 - j, T.int64(e.history)) >= 1:
            total[1] = total[1] + (ring[b, j] - total[0]) * (ring[b, j] - total[0])
    sums[1] = total[0] + T.float32(e.gamma) * T.sqrt(total[1] / T.max(sums[0], T.float32(1)))


@T.inline
def _gain(alike, b, before, nodes, e, side):
    # Writes into ``side[3]`` what it gains to cut a graph behind node ``before``.
    for part in T.serial(3):
        side[part] = T.float32(0)
    for i in T.serial(nodes):
        for j in T.serial(nodes):
            ahead = T.Cast("int32", i <= before) + T.Cast("int32", j <= before)
            side[0] = side[0] + T.if_then_else(ahead == 2, alike[b, i, j], T.float32(0))
            side[1] = side[1] + T.if_then_else(ahead == 0, alike[b, i, j], T.float32(0))
            side[2] = side[2] + T.if_then_else(T.And(ahead == 1, i <= before), alike[b, i, j], T.float32(0))
    if e.refine == "modularity":
        side[3] = T.max(side[2] * T.float32(2) + side[0] + side[1], T.float32(LEAST))
        side[3] = T.float32(2) * (side[0] * side[1] - side[2] * side[2]) / (side[3] * side[3])
    else:
        side[3] = T.float32(-1)
        if side[2] + T.min(side[0], side[1]) > T.float32(LEAST):
            side[3] = T.float32(0) - side[2] / (side[2] + T.min(side[0], side[1]))


@T.inline
def _centre(keys, away, b, start, nodes, e):
    # Writes into ``away`` the keys of a graph, less their mean, each of length 1.
    total = T.alloc_buffer((1,), "float32", scope="local")
    slots = T.meta_var(T.int64(e.longest + 1))
    for g in T.serial(e.groups):
        for d in T.serial(e.size):
            total[0] = T.float32(0)
            for i in T.serial(nodes):
                total[0] = total[0] + keys[b, g, T.floormod(start + i, slots), d]
            total[0] = total[0] / T.Cast("float32", nodes)
            for i in T.serial(nodes):
                away[b, g, i, d] = keys[b, g, T.floormod(start + i, slots), d] - total[0]
        for i in T.serial(nodes):
            total[0] = T.float32(0)
            for d in T.serial(e.size):
                total[0] = total[0] + away[b, g, i, d] * away[b, g, i, d]
            total[0] = T.max(T.sqrt(total[0]), T.float32(LEAST))
            for d in T.serial(e.size):
                away[b, g, i, d] = away[b, g, i, d] / total[0]


@T.inline
def _refine(keys, away, alike, b, start, p, e, end):
    # Writes into ``end[2]`` the position before which the graph of the keys at ``start`` to ``p`` is best cut.
    product = T.alloc_buffer((1,), "float32", scope="local")
    side = T.alloc_buffer((4,), "float32", scope="local")
    gain = T.alloc_buffer((1,), "float32", scope="local")
    nodes = p - start + 1
    _centre(keys, away, b, start, nodes, e)
    for i in T.serial(nodes):
        for j in T.serial(nodes):
            product[0] = T.float32(0)
            for g in T.serial(e.groups):
                for d in T.serial(e.size):
                    product[0] = product[0] + away[b, g, i, d] * away[b, g, j, d]
            alike[b, i, j] = T.if_then_else(i == j, T.float32(0), T.max(product[0] / T.float32(e.groups), T.float32(0)))
    gain[0] = T.float32(LOWEST)
    # The best first, then the last that is as good.
    for turn in T.serial(2):
        for before in T.serial(nodes - 1):
            _gain(alike, b, before, nodes, e, side)
            if turn == 0:
                gain[0] = T.max(gain[0], side[3])
            elif side[3] >= gain[0] - T.float32(NEAR):
                end[2] = start + before + 1


@cache
def events(e: Segmentation) -> PrimFunc:
    """Make ``memc::events`` over slots: ``past_events [B,S]`` has the number of the token at position p in slot p.

    The states that it writes are others than those that it reads, as attention reads the numbers of the call before.
    The tokens of a row are of one sequence. ``alike`` and ``away`` are memory for the graph of an
    event and the keys that it is of.
    """
    width, groups, size, history, slots = e.vocabulary, e.groups, e.size, e.history, e.longest + 1

    @T.inline
    def follow(b, tokens, held, names):
        # Finds the events of a row, whose states lie where they go.
        span = T.alloc_buffer((3,), "int64", scope="local")  # where the last one starts, its number, and its end
        sums = T.alloc_buffer((2,), "float32", scope="local")
        span[0] = T.int64(0)
        span[1] = T.int64(0)
        for t in T.serial(tokens):
            if names["positions"][b, t] == 0:
                span[0] = T.int64(-1)
        for n in T.serial(held):
            names["numbers"][b, n] = T.if_then_else(span[0] < 0, T.int64(-1), names["past_numbers"][b, n])
        span[0] = T.int64(0)
        for n in T.serial(held):
            if names["numbers"][b, n] >= 0:
                span[0] = span[0] + 1
                span[1] = T.max(span[1], names["numbers"][b, n] + 1)
        for t in T.serial(tokens):
            p = names["positions"][b, t]
            if p >= 0:
                for g in T.serial(groups):
                    for d in T.serial(size):
                        names["keys"][b, g, T.floormod(p, T.int64(slots)), d] = names["key"][b, g, t, d]
            if p > 0:
                _limit(names["surprises"], b, p, e, sums)
                names["surprises"][b, T.floormod(p, T.int64(history))] = names["surprise"][b, t]
                if T.Or(T.And(sums[0] > T.float32(0), names["surprise"][b, t] > sums[1]), p - span[0] >= e.longest):
                    span[2] = p
                    if e.refine != "none":
                        _refine(names["keys"], names["away"], names["alike"], b, span[0], p, e, span)
                    for k in T.serial(span[2] - span[0]):
                        names["numbers"][b, span[0] + k] = span[1]
                    span[0] = span[2]
                    span[1] = span[1] + 1

    @T.prim_func(private=True)
    def events_(
        l_: T.handle,
        i_: T.handle,
        p_: T.handle,
        k_: T.handle,
        past_l_: T.handle,
        past_s_: T.handle,
        past_k_: T.handle,
        past_n_: T.handle,
        surprise_: T.handle,
        next_l_: T.handle,
        next_s_: T.handle,
        next_k_: T.handle,
        next_n_: T.handle,
        alike_: T.handle,
        away_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        batch, tokens, held = T.int64(), T.int64(), T.int64()
        logits = T.match_buffer(l_, (batch, tokens, width), "float32")
        ids = T.match_buffer(i_, (batch, tokens), "int64")
        positions = T.match_buffer(p_, (batch, tokens), "int64")
        key = T.match_buffer(k_, (batch, groups, tokens, size), "float32")
        past_logits = T.match_buffer(past_l_, (batch, width), "float32")
        past_surprises = T.match_buffer(past_s_, (batch, history), "float32")
        past_keys = T.match_buffer(past_k_, (batch, groups, slots, size), "float32")
        past_numbers = T.match_buffer(past_n_, (batch, held), "int64")
        surprise = T.match_buffer(surprise_, (batch, tokens), "float32")
        next_logits = T.match_buffer(next_l_, (batch, width), "float32")
        surprises = T.match_buffer(next_s_, (batch, history), "float32")
        keys = T.match_buffer(next_k_, (batch, groups, slots, size), "float32")
        numbers = T.match_buffer(next_n_, (batch, held), "int64")
        alike = T.match_buffer(alike_, (batch, slots, slots), "float32")
        away = T.match_buffer(away_, (batch, groups, slots, size), "float32")
        names = T.meta_var(
            {
                "positions": positions,
                "key": key,
                "past_numbers": past_numbers,
                "surprise": surprise,
                "surprises": surprises,
                "keys": keys,
                "numbers": numbers,
                "alike": alike,
                "away": away,
            }
        )
        for row in T.parallel(batch * tokens):
            b = row // tokens
            t = row % tokens
            before = T.alloc_buffer((1,), "int64", scope="local")
            out = T.alloc_buffer((1,), "float32", scope="local")
            before[0] = T.int64(-1)
            for k in T.serial(t):
                if positions[b, k] >= 0:
                    before[0] = k
            out[0] = T.float32(0)
            if positions[b, t] > 0:
                token = T.min(T.max(ids[b, t], T.int64(0)), T.int64(width - 1))
                if before[0] >= 0:
                    _surprise(lambda j: logits[b, before[0], j], width, token, out)
                else:
                    _surprise(lambda j: past_logits[b, j], width, token, out)
            surprise[b, t] = out[0]
        for b in T.parallel(batch):
            last = T.alloc_buffer((1,), "int64", scope="local")
            last[0] = T.int64(-1)
            for t in T.serial(tokens):
                if positions[b, t] >= 0:
                    last[0] = t
            for j in T.serial(width):
                next_logits[b, j] = T.if_then_else(
                    last[0] >= 0, logits[b, T.max(last[0], T.int64(0)), j], past_logits[b, j]
                )
            for j in T.serial(history):
                surprises[b, j] = past_surprises[b, j]
            for g in T.serial(groups):
                for j in T.serial(slots):
                    for d in T.serial(size):
                        keys[b, g, j, d] = past_keys[b, g, j, d]
            follow(b, tokens, held, names)

    return events_
