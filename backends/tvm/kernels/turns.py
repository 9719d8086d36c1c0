"""``memc::refreshed_attention``: lists that one token makes for as many as share them, and what is taken of them.

A list is the numbers of the pages, or tokens, that are taken, in their own order, and what each was ranked by, whole
vectors of both, -1 for none: ``choice [B,G,2,M]`` is that of the last token of each row.
"""

from __future__ import annotations

from tvm.script import tirx as T

from memc.backends.tvm.kernels.choose import FIRST, NEVER, find_least, take
from memc.backends.tvm.kernels.common import SLOTS
from memc.backends.tvm.kernels.levels import rank_levels
from memc.backends.tvm.kernels.rank import find_best, first_near, force, rank_pages
from memc.backends.tvm.kernels.tree import search_pages


@T.inline
def rank_all(names, s, r, b, g, t, unit, p):  # noqa: D103
    # Ranks every page or token for the token at position ``p``, in one level or two.
    if r.by_level:
        rank_levels(names, s, r, b, g, t, unit, p)
    else:
        rank_pages(names, s, r, b, g, t, unit, p)


@T.inline
def make_list(names, s, r, b, g, t, unit, p):  # noqa: D103
    # Lists what the token at position ``p`` takes, if it is its turn. What is always taken of it comes before all
    # others, and behind what is to be taken by a later token.
    least = T.alloc_buffer((2,), "int32", scope="local")
    taken = T.alloc_buffer((1,), "int32", scope="local")
    count = T.alloc_buffer((1,), "int64", scope="local")
    blocks = p // r.unit // SLOTS + 1
    if T.And(p >= r.dense_below, (p - r.dense_below) % r.refresh == 0):
        if r.by_tree:
            search_pages(names, s, r, b, g, t, unit, p)
        else:
            rank_all(names, s, r, b, g, t, unit, p)
        find_best(names, r, unit, blocks, least)
        count[0] = T.int64(0)
        for n in T.serial(p // r.unit + 1):
            take(names["rank"], unit, n, least, taken)
            if taken[0] > 0:
                names["turns"][unit, 0, count[0]] = T.Cast("int32", n)
                names["turns"][unit, 1, count[0]] = T.min(names["rank"][unit, n], T.int32(FIRST - 1))
                count[0] = count[0] + 1
        for n in T.serial(r.places - count[0]):
            names["turns"][unit, 0, count[0] + n] = T.int32(-1)


@T.inline
def take_listed(names, r, unit, p):  # noqa: D103
    # Leaves FIRST in the rank of what the token at position ``p`` takes: what it always does, and the best of the list.
    # ``slots`` is free yet.
    least = T.alloc_buffer((2,), "int32", scope="local")
    taken = T.alloc_buffer((1,), "int32", scope="local")
    last = p // r.unit
    near = first_near(r, p)
    sinks = T.min(T.int64(-(-r.sinks // r.unit)), near)
    low = T.Cast("int32", sinks)
    high = T.Cast("int32", near)
    for block in T.serial(r.places // SLOTS):
        for j in T.vectorized(SLOTS):
            names["slots"][unit, block * SLOTS + j] = T.Select(
                T.And(
                    names["turns"][unit, 0, block * SLOTS + j] >= low,
                    names["turns"][unit, 0, block * SLOTS + j] < high,
                ),
                names["turns"][unit, 1, block * SLOTS + j],
                T.int32(NEVER),
            )
    find_least(names["slots"], unit, r.places // SLOTS, T.Cast("int32", r.most - (last + 1 - near) - sinks), least)
    for block in T.serial(last // SLOTS + 1):
        for j in T.vectorized(SLOTS):
            names["rank"][unit, block * SLOTS + j] = T.int32(NEVER)
    for n in T.serial(r.places):
        take(names["slots"], unit, n, least, taken)
        if taken[0] > 0:
            names["rank"][unit, T.Cast("int64", names["turns"][unit, 0, n])] = T.int32(FIRST)
    force(names, r, unit, p)


@T.inline
def hold_list(names, r, b, g, unit, p, turn):  # noqa: D103
    # Takes the list of ``p`` from the state where it was made before the call; ``turn[0]`` is whose list is at hand.
    if p >= r.dense_below:
        number = (p - r.dense_below) // r.refresh
        if T.And(number != turn[0], (p - r.dense_below) % r.refresh > 0):
            for part in T.serial(2):
                for n in T.serial(r.places):
                    names["turns"][unit, part, n] = names["choice"][b, g, part, n]
        turn[0] = number


@T.inline
def save_list(names, r, b, g, first, dealt, tokens):  # noqa: D103
    # Writes the list of the last token of a row into the state, or that there is none yet where a sequence starts.
    # Units of work from ``first`` on share the row, ``dealt`` of them.
    ends = T.alloc_buffer((2,), "int64", scope="local")
    ends[0] = T.int64(-1)
    ends[1] = T.int64(1)
    for t in T.serial(tokens):
        ends[0] = T.max(ends[0], names["positions"][b, t])
        ends[1] = T.if_then_else(names["positions"][b, t] == 0, T.int64(0), ends[1])
    for part in T.serial(2):
        for n in T.serial(r.places):
            if ends[0] >= r.dense_below:
                unit = first + (ends[0] - r.dense_below) // r.refresh % dealt
                names["choice"][b, g, part, n] = names["turns"][unit, part, n]
            elif ends[1] == 0:
                names["choice"][b, g, part, n] = T.int32(-1)
