"""The best of a list, in TIR: numbers in the order of scores, the least that is taken, and how many ties are.

Either so many, or as many as hold a share of the exponentials of all scores.

Lists are rows of a buffer ``[units, N]`` of int32, N a multiple of ``SLOTS``, and are looked through vector by vector,
once for each bit of a number: nothing is sorted or moved.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from memc.backends.tvm.kernels.common import SLOTS, Expression, exp

FIRST = 2**31 - 1
"""Stands before every score: what is always taken."""

NEVER = -(2**31)
"""Stands behind every score: what is never taken."""


def ordered(score: Expression) -> Expression:
    """Return a whole number that orders as finite float32 scores do, zeros of both signs alike."""
    bits = T.reinterpret("int32", T.Select(score == T.float32(0), T.float32(0), score))
    return T.Select(bits >= 0, bits, T.bitwise_xor(bits, T.int32(FIRST)))


def score_of(number: Expression) -> Expression:
    """Return the float32 that :func:`ordered` made a number of."""
    return T.reinterpret("float32", T.Select(number >= 0, number, T.bitwise_xor(number, T.int32(FIRST))))


@T.inline
def count_from(rank: Any, unit, blocks, least, lanes, total):  # noqa: D103
    # Counts the entries of row ``unit`` of ``rank`` from ``least`` on, over ``blocks`` vectors, into ``total``.
    for j in T.vectorized(SLOTS):
        lanes[j] = 0
    for block in T.serial(blocks):
        for j in T.vectorized(SLOTS):
            lanes[j] = lanes[j] + T.Select(rank[unit, block * SLOTS + j] >= least, 1, 0)
    total[0] = 0
    for j in T.serial(SLOTS):
        total[0] = total[0] + lanes[j]


@T.inline
def find_least(rank: Any, unit, blocks, count, least):  # noqa: D103
    # Finds the ``count``-th highest entry, bit by bit from the top, into ``least[0]``; into ``least[1]`` how many equal
    # to it are among the first ``count``. Where fewer are above ``NEVER`` those are all.
    lanes = T.alloc_buffer((SLOTS,), "int32", scope="local")
    total = T.alloc_buffer((1,), "int32", scope="local")
    tried = T.alloc_buffer((1,), "int32", scope="local")
    least[0] = T.int32(NEVER)
    for step in T.serial(32):
        tried[0] = T.if_then_else(step == 0, T.int32(0), least[0] + T.shift_left(T.int32(1), T.min(31 - step, 30)))
        count_from(rank, unit, blocks, tried[0], lanes, total)
        if total[0] >= count:
            least[0] = tried[0]
    least[1] = T.Cast("int32", count)
    if least[0] < T.int32(FIRST):
        count_from(rank, unit, blocks, least[0] + 1, lanes, total)
        least[1] = T.if_then_else(least[0] > T.int32(NEVER), T.Cast("int32", count) - total[0], 0)


@T.inline
def sum_from(rank: Any, weight: Any, unit, blocks, least, lanes, total):  # noqa: D103
    # Sums the weights of the entries of row ``unit`` of ``rank`` from ``least`` on, into ``total``. With fewer entries
    # it is never more, since the order of the sum stays.
    for j in T.vectorized(SLOTS):
        lanes[j] = T.float32(0)
    for block in T.serial(blocks):
        for j in T.vectorized(SLOTS):
            lanes[j] = lanes[j] + T.Select(
                rank[unit, block * SLOTS + j] >= least, weight[unit, block * SLOTS + j], T.float32(0)
            )
    total[0] = T.float32(0)
    for j in T.serial(SLOTS):
        total[0] = total[0] + lanes[j]


@T.inline
def find_share(rank: Any, weight: Any, unit, blocks, share, least):  # noqa: D103
    # Finds the highest number from which on the entries hold a ``share`` of the exponentials of all scores, as
    # ``find_least`` does: those at ``FIRST`` come before, and hold nothing. ``weight`` is memory like ``rank``.
    lanes = T.alloc_buffer((SLOTS,), "float32", scope="local")
    highest = T.alloc_buffer((SLOTS,), "int32", scope="local")
    total = T.alloc_buffer((1,), "float32", scope="local")
    goal = T.alloc_buffer((1,), "float32", scope="local")
    top = T.alloc_buffer((1,), "float32", scope="local")
    best = T.alloc_buffer((1,), "int32", scope="local")
    tried = T.alloc_buffer((1,), "int32", scope="local")
    for j in T.vectorized(SLOTS):
        highest[j] = T.int32(NEVER + 1)
    for block in T.serial(blocks):
        for j in T.vectorized(SLOTS):
            highest[j] = T.max(
                highest[j],
                T.Select(rank[unit, block * SLOTS + j] < T.int32(FIRST), rank[unit, block * SLOTS + j], NEVER),
            )
    best[0] = T.int32(NEVER + 1)
    for j in T.serial(SLOTS):
        best[0] = T.max(best[0], highest[j])
    top[0] = score_of(best[0])
    for block in T.serial(blocks):
        for j in T.vectorized(SLOTS):
            weight[unit, block * SLOTS + j] = T.Select(
                T.And(rank[unit, block * SLOTS + j] > T.int32(NEVER), rank[unit, block * SLOTS + j] < T.int32(FIRST)),
                exp(score_of(rank[unit, block * SLOTS + j]) - top[0]),
                T.float32(0),
            )
    sum_from(rank, weight, unit, blocks, T.int32(NEVER), lanes, total)
    goal[0] = total[0] * T.float32(share)
    least[0] = T.int32(NEVER)
    for step in T.serial(32):
        tried[0] = T.if_then_else(step == 0, T.int32(0), least[0] + T.shift_left(T.int32(1), T.min(31 - step, 30)))
        sum_from(rank, weight, unit, blocks, tried[0], lanes, total)
        if total[0] >= goal[0]:
            least[0] = tried[0]
    least[1] = T.int32(FIRST)
    if least[0] < T.int32(FIRST):  # an entry whose exponential is not 0, and those equal to it
        sum_from(rank, weight, unit, blocks, least[0] + 1, lanes, total)
        least[1] = T.max(T.Cast("int32", T.ceil((goal[0] - total[0]) / exp(score_of(least[0]) - top[0]))), T.int32(1))


@T.inline
def take(rank: Any, unit, at, least, taken):  # noqa: D103
    # Tells in ``taken[0]`` whether entry ``at`` is among the best; to be asked of all entries in order.
    taken[0] = T.Select(rank[unit, at] > least[0], 1, 0)
    if T.And(rank[unit, at] == least[0], least[1] > 0):
        taken[0] = 1
        least[1] = least[1] - 1
