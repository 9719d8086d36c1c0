"""The best so many of a list, in TIR: numbers in the order of scores, the least that is taken, and how many ties are.

Lists are rows of a buffer ``[units, N]`` of int32, N a multiple of ``SLOTS``, and are looked through vector by vector,
once for each bit of a number: nothing is sorted or moved.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from memc.backends.tvm.kernels.common import SLOTS, Expression

FIRST = 2**31 - 1
"""Stands before every score: what is always taken."""

NEVER = -(2**31)
"""Stands behind every score: what is never taken."""


def ordered(score: Expression) -> Expression:
    """Return a whole number that orders as finite float32 scores do, zeros of both signs alike."""
    bits = T.reinterpret("int32", T.Select(score == T.float32(0), T.float32(0), score))
    return T.Select(bits >= 0, bits, T.bitwise_xor(bits, T.int32(FIRST)))


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
    # to it are among the first ``count``. There are at least that many above ``NEVER``.
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
        least[1] = T.Cast("int32", count) - total[0]


@T.inline
def take(rank: Any, unit, at, least, taken):  # noqa: D103
    # Tells in ``taken[0]`` whether entry ``at`` is among the best; to be asked of all entries in order.
    taken[0] = T.Select(rank[unit, at] > least[0], 1, 0)
    if T.And(rank[unit, at] == least[0], least[1] > 0):
        taken[0] = 1
        least[1] = least[1] - 1
