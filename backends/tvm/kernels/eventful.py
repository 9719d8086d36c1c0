"""Tokens ranked by the events that they belong to, and those of the events beside, in ``memc::sparse_attention``.

``choice [B,S]`` are the numbers of events, -1 for none; from token to token they rise by one at most. Row 0 of ``turns
[units,2,N]`` is for what the tokens of events are worth, ``turns[unit,1,0]`` is where the call begins in a row.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from memc.backends.tvm.kernels.choose import FIRST, NEVER, find_least, take
from memc.backends.tvm.kernels.common import Expression


def _numbered(names: Any, r: Any, unit: Any, p: Any) -> Expression:
    """Return how many tokens the one at position ``p`` may see the events of."""
    begin = T.Cast("int64", names["turns"][unit, 1, 0])
    return T.max(T.min(p - r.delay + 1, begin), T.int64(0))


@T.inline
def begin_events(names, b, unit, tokens):  # noqa: D103
    # Notes where the call begins in a row: nothing from there on has a number.
    names["turns"][unit, 1, 0] = T.int32(0)
    for t in T.serial(tokens):
        if names["positions"][b, tokens - 1 - t] >= 0:
            names["turns"][unit, 1, 0] = T.Cast("int32", names["positions"][b, tokens - 1 - t])


@T.inline
def whole_events(names, r, b, unit, p):  # noqa: D103
    # Gives every token that has an event the highest rank of it: the highest so far is at its end that of all.
    event = T.alloc_buffer((1,), "int64", scope="local")
    top = T.alloc_buffer((1,), "int32", scope="local")
    count = _numbered(names, r, unit, p)
    event[0] = T.int64(-1)
    top[0] = T.int32(NEVER)
    for n in T.serial(count):
        if T.Or(names["choice"][b, n] != event[0], names["choice"][b, n] < 0):
            top[0] = T.int32(NEVER)
            event[0] = names["choice"][b, n]
        top[0] = T.max(top[0], names["rank"][unit, n])
        names["turns"][unit, 0, n] = top[0]
    event[0] = T.int64(-1)
    for k in T.serial(count):
        n = count - 1 - k
        if T.Or(names["choice"][b, n] != event[0], names["choice"][b, n] < 0):
            top[0] = names["turns"][unit, 0, n]
            event[0] = names["choice"][b, n]
        names["rank"][unit, n] = top[0]


@T.inline
def _near(names, b, unit, n, event, top, beside, step):
    # Raises the rank of a token to that of the event before it, as it comes along the line by ``step``.
    if names["choice"][b, n] != event[0]:
        beside[0] = T.if_then_else(names["choice"][b, n] == event[0] + step, top[0], T.int32(NEVER))
        top[0] = T.int32(NEVER)
        event[0] = names["choice"][b, n]
    top[0] = T.max(top[0], names["turns"][unit, 0, n])
    names["rank"][unit, n] = T.max(names["rank"][unit, n], beside[0])


@T.inline
def take_events(names, r, b, unit, p, blocks, least):  # noqa: D103
    # Takes the best tokens of one share of the budget, puts them before all others, and behind them those of the events
    # directly before and after theirs; all others are not taken. Leaves the least that is in ``least``.
    taken = T.alloc_buffer((1,), "int32", scope="local")
    event = T.alloc_buffer((1,), "int64", scope="local")
    top = T.alloc_buffer((1,), "int32", scope="local")
    beside = T.alloc_buffer((1,), "int32", scope="local")
    count = _numbered(names, r, unit, p)
    find_least(names["rank"], unit, blocks, r.alike, least)
    for n in T.serial(p + 1):
        take(names["rank"], unit, n, least, taken)
        names["turns"][unit, 0, n] = T.if_then_else(
            T.And(taken[0] > 0, names["rank"][unit, n] < T.int32(FIRST)), names["rank"][unit, n], T.int32(NEVER)
        )
        if names["rank"][unit, n] < T.int32(FIRST):
            names["rank"][unit, n] = T.if_then_else(taken[0] > 0, T.int32(FIRST), T.int32(NEVER))
    event[0] = T.int64(-2)
    top[0] = T.int32(NEVER)
    for n in T.serial(count):
        if names["choice"][b, n] >= 0:
            _near(names, b, unit, n, event, top, beside, 1)
    event[0] = T.int64(-2)
    top[0] = T.int32(NEVER)
    for k in T.serial(count):
        if names["choice"][b, count - 1 - k] >= 0:
            _near(names, b, unit, count - 1 - k, event, top, beside, -1)
    find_least(names["rank"], unit, blocks, r.most, least)
