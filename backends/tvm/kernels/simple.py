"""Functions that mix no tokens: look-up, normalisation, softmax, rotation."""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm.script import tirx as T

from memc.backends.tvm.kernels.common import LOWEST, PrimFunc, exp

LANES = 16


@cache
def embedding(rows: int, width: int, columns: int | None) -> PrimFunc:
    """Make ``y [M,width] = table[ids [M]]``; an id out of range reads the nearest row, never other memory.

    ``table`` is ``[rows,width]``, or with ``columns`` the packed weight of a product, which is then stored once.
    """
    shape = (rows, width) if columns is None else (-(-rows // columns), width, columns)

    def at(table: Any, row: Any, j: Any) -> Any:
        return table[row, j] if columns is None else table[row // columns, j, row % columns]

    @T.prim_func(private=True)
    def embedding_(table_: T.handle, ids_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        m = T.int64()
        table = T.match_buffer(table_, shape, "float32")
        ids = T.match_buffer(ids_, (m,), "int64")
        y = T.match_buffer(y_, (m, width), "float32")
        for i in T.serial(m):
            for j in T.serial(width):
                y[i, j] = at(table, T.min(T.max(ids[i], T.int64(0)), T.int64(rows - 1)), j)

    return embedding_


@cache
def softmax(width: int) -> PrimFunc:
    """Make ``y [M,width] = softmax(x)`` of each row, times ``whole [1]``."""
    body, rest = width // LANES, width % LANES

    @T.prim_func(private=True)
    def softmax_(x_: T.handle, whole_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        m = T.int64()
        x = T.match_buffer(x_, (m, width), "float32")
        whole = T.match_buffer(whole_, (1,), "float32")
        y = T.match_buffer(y_, (m, width), "float32")
        for i in T.parallel(m):
            lanes = T.alloc_buffer((LANES,), "float32", scope="local")
            top = T.alloc_buffer((1,), "float32", scope="local")
            total = T.alloc_buffer((1,), "float32", scope="local")
            for j in T.vectorized(LANES):
                lanes[j] = T.float32(LOWEST)
            for block in T.serial(body):
                for j in T.vectorized(LANES):
                    lanes[j] = T.max(lanes[j], x[i, block * LANES + j])
            top[0] = T.float32(LOWEST)
            for j in T.serial(LANES):
                top[0] = T.max(top[0], lanes[j])
            for j in T.serial(rest):
                top[0] = T.max(top[0], x[i, body * LANES + j])
            for j in T.vectorized(LANES):
                lanes[j] = T.float32(0)
            for block in T.serial(body):
                for j in T.vectorized(LANES):
                    y[i, block * LANES + j] = exp(x[i, block * LANES + j] - top[0])
                for j in T.vectorized(LANES):
                    lanes[j] = lanes[j] + y[i, block * LANES + j]
            total[0] = T.float32(0)
            for j in T.serial(LANES):
                total[0] = total[0] + lanes[j]
            for j in T.serial(rest):
                y[i, body * LANES + j] = exp(x[i, body * LANES + j] - top[0])
                total[0] = total[0] + y[i, body * LANES + j]
            total[0] = whole[0] / total[0]
            for j in T.serial(width):
                y[i, j] = y[i, j] * total[0]

    return softmax_


@cache
def norm(width: int, eps: float, *, center: bool, weight: bool, bias: bool) -> PrimFunc:
    """Make ``memc::norm`` of rows ``x [M,width]``; ``weight`` and ``bias [width]`` are ``[1]`` where not asked for."""
    body, rest = width // LANES, width % LANES

    @T.inline
    def row_sum(x, i, mean, squared, lanes, into):
        for j in T.vectorized(LANES):
            lanes[j] = T.float32(0)
        for block in T.serial(body):
            for j in T.vectorized(LANES):
                if squared:
                    lanes[j] = lanes[j] + (x[i, block * LANES + j] - mean) * (x[i, block * LANES + j] - mean)
                else:
                    lanes[j] = lanes[j] + x[i, block * LANES + j]
        into[0] = T.float32(0)
        for j in T.serial(LANES):
            into[0] = into[0] + lanes[j]
        for j in T.serial(rest):
            if squared:
                into[0] = into[0] + (x[i, body * LANES + j] - mean) * (x[i, body * LANES + j] - mean)
            else:
                into[0] = into[0] + x[i, body * LANES + j]

    @T.prim_func(private=True)
    def norm_(x_: T.handle, w_: T.handle, b_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        m = T.int64()
        x = T.match_buffer(x_, (m, width), "float32")
        w = T.match_buffer(w_, (width if weight else 1,), "float32")
        b = T.match_buffer(b_, (width if bias else 1,), "float32")
        y = T.match_buffer(y_, (m, width), "float32")
        for i in T.parallel(m):
            lanes = T.alloc_buffer((LANES,), "float32", scope="local")
            mean = T.alloc_buffer((1,), "float32", scope="local")
            spread = T.alloc_buffer((1,), "float32", scope="local")
            mean[0] = T.float32(0)
            if center:
                row_sum(x, i, T.float32(0), False, lanes, mean)
                mean[0] = mean[0] / T.float32(width)
            row_sum(x, i, mean[0], True, lanes, spread)
            spread[0] = T.float32(1) / T.sqrt(spread[0] / T.float32(width) + T.float32(eps))
            for j in T.serial(width):
                y[i, j] = (x[i, j] - mean[0]) * spread[0]
            if weight:
                for j in T.serial(width):
                    y[i, j] = y[i, j] * w[j]
            if bias:
                for j in T.serial(width):
                    y[i, j] = y[i, j] + b[j]

    return norm_


@cache
def rotary(heads: int, width: int, pairs: int, *, interleaved: bool) -> PrimFunc:
    """Make ``memc::rotary`` of ``x [B,heads,T,width]`` with ``cosine`` and ``sine [B,T,pairs]`` already scaled."""

    @T.prim_func(private=True)
    def rotary_(x_: T.handle, c_: T.handle, s_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        batch, tokens = T.int64(), T.int64()
        x = T.match_buffer(x_, (batch, heads, tokens, width), "float32")
        c = T.match_buffer(c_, (batch, tokens, pairs), "float32")
        s = T.match_buffer(s_, (batch, tokens, pairs), "float32")
        y = T.match_buffer(y_, (batch, heads, tokens, width), "float32")
        for row in T.parallel(batch * heads):
            for t in T.serial(tokens):
                b = row // heads
                h = row % heads
                if interleaved:
                    for i in T.serial(pairs):
                        y[b, h, t, 2 * i] = x[b, h, t, 2 * i] * c[b, t, i] - x[b, h, t, 2 * i + 1] * s[b, t, i]
                        y[b, h, t, 2 * i + 1] = x[b, h, t, 2 * i + 1] * c[b, t, i] + x[b, h, t, 2 * i] * s[b, t, i]
                else:
                    for i in T.serial(pairs):
                        y[b, h, t, i] = x[b, h, t, i] * c[b, t, i] - x[b, h, t, pairs + i] * s[b, t, i]
                    for i in T.serial(pairs):
                        y[b, h, t, pairs + i] = x[b, h, t, pairs + i] * c[b, t, i] + x[b, h, t, i] * s[b, t, i]
                for i in T.serial(width - 2 * pairs):
                    y[b, h, t, 2 * pairs + i] = x[b, h, t, 2 * pairs + i]

    return rotary_
