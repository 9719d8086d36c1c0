"""What several functions need: a vectorised exponential, and the rows of one softmax."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

import memc.backends.tvm.parsing  # noqa: F401  makes the parser quick

SLOTS = 16
"""Keys that lie together in the state of an attention, channel by channel: one vector of scores is their product."""

KEYS = 4 * SLOTS
"""Keys of one step of the online softmax."""

ROWS = 8
"""Rows of queries that share what is read of keys and values."""

LOWEST = -1e30
"""Stands for minus infinity, of which TVM's C code generator has no literal."""

Expression = Any
PrimFunc = Any


def exp(x: Expression) -> Expression:
    """Return e^x, vectorised, to about two units in the last place (Cephes ``expf``); 0 below the normal numbers."""
    bounded = T.min(T.max(x, T.float32(-87.0)), T.float32(88.0))
    power = T.floor(bounded * T.float32(1.44269504088896341) + T.float32(0.5))
    rest = bounded - power * T.float32(0.693359375) + power * T.float32(2.12194440e-4)
    y = T.float32(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        y = y * rest + T.float32(coefficient)
    y = y * rest * rest + rest + T.float32(1.0)
    scale = T.reinterpret("float32", T.shift_left(T.Cast("int32", power) + 127, 23))
    return T.Select(x < T.float32(-87.0), T.float32(0.0), y * scale)


def tanh(x: Expression) -> Expression:
    """Return tanh(x), vectorised, from :func:`exp`."""
    bounded = T.min(T.max(x, T.float32(-15.0)), T.float32(15.0))
    squared = exp(bounded + bounded)
    return (squared - T.float32(1.0)) / (squared + T.float32(1.0))


@T.inline
def clear(acc, rows, columns):  # noqa: D103
    for i in T.unroll(rows):
        for j in T.vectorized(columns):
            acc[i, j] = T.float32(0)


@T.inline
def multiply(acc, left, right, depth, rows, columns):  # noqa: D103
    # Adds left(i, k) right(k, j) over k to a tile that stays in registers.
    for k in T.serial(depth):
        for i in T.unroll(rows):
            for j in T.vectorized(columns):
                acc[i, j] = acc[i, j] + left(i, k) * right(k, j)


@dataclass(frozen=True)
class Scores:
    """Sizes of one softmax and how its scores are made; fields as the arguments of the dialect's ops."""

    heads: int
    groups: int
    key_dim: int
    value_dim: int
    scale: float
    softcap: float = 0.0
    slopes: bool = False
    sink_logits: bool = False

    @property
    def share(self) -> int:
        """Query heads of one key-value head."""
        return self.heads // self.groups

    @property
    def together(self) -> int:
        """How many of them are done at once."""
        return max(n for n in range(1, ROWS + 1) if self.share % n == 0)

    @property
    def vector(self) -> int:
        """Channels of one key that are multiplied at once, where keys lie one by one."""
        return next(n for n in (SLOTS, 8, 1) if self.key_dim % n == 0)


@dataclass(frozen=True)
class Keys:
    """What one softmax reads, as functions that make expressions.

    ``query(row, d)``; ``key(tile, d, lane)`` with ``SLOTS`` keys to a tile; ``value(slot, e)``; ``allowed(row, slot)``;
    ``bias(row, slot)`` added to the scores, or None.
    """

    query: Callable[[Expression, Expression], Expression]
    key: Callable[[Expression, Expression, Expression], Expression]
    value: Callable[[Expression, Expression], Expression]
    allowed: Callable[[Expression, Expression], Expression]
    bias: Callable[[Expression, Expression], Expression] | None


@T.inline
def add_values(rows, keys, first, count, scores, part, acc, start, width, blocks):  # noqa: D103
    # Adds scores times values, one vector of channels of all rows at a time.
    for block in T.serial(blocks):
        for i in T.unroll(rows):
            for e in T.vectorized(width):
                part[i, e] = acc[i, start + block * width + e]
        for j in T.serial(count):
            for i in T.unroll(rows):
                for e in T.vectorized(width):
                    part[i, e] = part[i, e] + scores[i, j] * keys.value(first + j, start + block * width + e)
        for i in T.unroll(rows):
            for e in T.vectorized(width):
                acc[i, start + block * width + e] = part[i, e]


@T.inline
def softmax_rows(rows, keys, low, high, tiles, s, top, total, acc):  # noqa: D103
    # Online softmax (Milakov and Gimelshein 2018) of ``rows`` rows over slots ``low`` to ``high``, into ``top [rows]``,
    # ``total [rows]`` and ``acc [rows, value_dim]``; keys beyond the last of ``tiles`` tiles are read from the last.
    # Few rows take two tiles abreast: sums of one would wait for each other.
    scores = T.alloc_buffer((rows, KEYS), "float32", scope="local")
    abreast = T.meta_var(2 if rows <= 4 else 1)
    product = T.alloc_buffer((abreast * rows, SLOTS), "float32", scope="local")
    lanes = T.alloc_buffer((SLOTS,), "float32", scope="local")
    part = T.alloc_buffer((rows, 32), "float32", scope="local")
    new = T.alloc_buffer((1,), "float32", scope="local")
    shrink = T.alloc_buffer((1,), "float32", scope="local")
    for i in T.serial(rows):
        top[i] = T.float32(LOWEST)
        total[i] = T.float32(0)
        for e in T.serial(s.value_dim):
            acc[i, e] = T.float32(0)
    for step in T.serial(T.ceildiv(high, T.int64(KEYS)) - low // KEYS):
        first = (low // KEYS + step) * KEYS
        for pair in T.serial(KEYS // SLOTS // abreast):
            for half in T.unroll(abreast):
                for i in T.unroll(rows):
                    for j in T.vectorized(SLOTS):
                        product[half * rows + i, j] = T.float32(0)
            for d in T.serial(s.key_dim):
                for half in T.unroll(abreast):
                    for i in T.unroll(rows):
                        for j in T.vectorized(SLOTS):
                            product[half * rows + i, j] = product[half * rows + i, j] + keys.query(i, d) * keys.key(
                                T.min(first // SLOTS + pair * abreast + half, tiles - 1), d, j
                            )
            for row in T.serial(abreast * rows):
                tile = pair * abreast + row // rows
                i = row % rows
                for j in T.vectorized(SLOTS):
                    product[row, j] = product[row, j] * T.float32(s.scale)
                if s.softcap > 0:
                    for j in T.vectorized(SLOTS):
                        product[row, j] = tanh(product[row, j] / T.float32(s.softcap)) * T.float32(s.softcap)
                if keys.bias is not None:
                    for j in T.serial(SLOTS):
                        if first + tile * SLOTS + j < high:
                            product[row, j] = product[row, j] + keys.bias(i, first + tile * SLOTS + j)
                for j in T.vectorized(SLOTS):
                    scores[i, tile * SLOTS + j] = T.Select(
                        keys.allowed(i, first + tile * SLOTS + j), product[row, j], T.float32(LOWEST)
                    )
        for i in T.serial(rows):
            for j in T.vectorized(SLOTS):
                lanes[j] = top[i]
            for tile in T.unroll(KEYS // SLOTS):
                for j in T.vectorized(SLOTS):
                    lanes[j] = T.max(lanes[j], scores[i, tile * SLOTS + j])
            new[0] = top[i]
            for j in T.serial(SLOTS):
                new[0] = T.max(new[0], lanes[j])
            shrink[0] = exp(top[i] - new[0])
            total[i] = total[i] * shrink[0]
            top[i] = new[0]
            for j in T.vectorized(KEYS):
                scores[i, j] = T.Select(
                    scores[i, j] > T.float32(0.5 * LOWEST), exp(scores[i, j] - new[0]), T.float32(0)
                )
            for j in T.vectorized(SLOTS):
                lanes[j] = T.float32(0)
            for tile in T.unroll(KEYS // SLOTS):
                for j in T.vectorized(SLOTS):
                    lanes[j] = lanes[j] + scores[i, tile * SLOTS + j]
            for j in T.serial(SLOTS):
                total[i] = total[i] + lanes[j]
            for e in T.serial(s.value_dim):
                acc[i, e] = acc[i, e] * shrink[0]
        held = T.min(high - first, T.int64(KEYS))
        wide = T.meta_var(s.value_dim // 32)
        narrow = T.meta_var(s.value_dim % 32 // 8)
        add_values(rows, keys, first, held, scores, part, acc, 0, 32, wide)
        if narrow > 0:
            add_values(rows, keys, first, held, scores, part, acc, wide * 32, 8, narrow)
        if s.value_dim % 8 > 0:
            add_values(rows, keys, first, held, scores, part, acc, wide * 32 + narrow * 8, 1, s.value_dim % 8)


@T.inline
def add_sink(row, sink, top, total, acc, width):  # noqa: D103
    # Lets a learned logit without a value join the denominator.
    newest = T.max(top[row], sink)
    for e in T.serial(width):
        acc[row, e] = acc[row, e] * exp(top[row] - newest)
    total[row] = total[row] * exp(top[row] - newest) + exp(sink - newest)
    top[row] = newest
