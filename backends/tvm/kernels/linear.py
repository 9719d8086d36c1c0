"""Products with a stored matrix, in tiles of its outputs: float32 weights, and 8 or 4 bits in blocks."""

from __future__ import annotations

from functools import cache

from tvm.script import tirx as T

from memc.backends.tvm.isa import Tile, columns_of
from memc.backends.tvm.kernels.common import PrimFunc, clear

BLOCK = 32
"""Inputs that share a scale."""

PANEL_ROWS = 16
"""Rows from which the values of a quantised tile are made once for all of them."""


@T.inline
def store(y, acc, row, tile, rows, columns, out, bias, biased):  # noqa: D103
    for i in T.unroll(rows):
        if biased:
            for j in T.serial(columns):
                if tile * columns + j < out:
                    acc[i, j] = acc[i, j] + bias[tile * columns + j]
        if out % columns == 0:
            for j in T.vectorized(columns):
                y[row + i, tile * columns + j] = acc[i, j]
        else:
            for j in T.serial(columns):
                if tile * columns + j < out:
                    y[row + i, tile * columns + j] = acc[i, j]


@T.inline
def by_rows(m, tile, block):  # noqa: D103
    # Calls ``block(first, rows)`` for all rows of a call: whole tiles, then pairs, then single rows.
    for group in T.serial(m // tile.rows):
        block(group * tile.rows, tile.rows)
    if tile.rows > 2:
        for pair in T.serial(m % tile.rows // 2):
            block(m - m % tile.rows + pair * 2, 2)
        for rest in T.serial(m % tile.rows % 2):
            block(m - 1 + rest, 1)
    elif tile.rows > 1:
        for rest in T.serial(m % 2):
            block(m - 1 + rest, 1)


@T.inline
def multiply_tile(x, w, y, b, source, index, m, into, out, tile, biased):  # noqa: D103
    # All rows of the outputs of tile ``index``, whose values lie in ``w[source]``.
    @T.inline
    def block(row, rows):
        acc = T.alloc_buffer((rows, tile.columns), "float32", scope="local")
        clear(acc, rows, tile.columns)
        for k in T.serial(into):
            for i in T.unroll(rows):
                for j in T.vectorized(tile.columns):
                    acc[i, j] = acc[i, j] + x[row + i, k] * w[source, k, j]
        store(y, acc, row, index, rows, tile.columns, out, b, biased)

    by_rows(m, tile, block)


@cache
def linear(out: int, into: int, tile: Tile, *, bias: bool) -> PrimFunc:
    """Make ``y [M,out] = x [M,into] w (+ bias [out])`` for any M.

    ``w [ceil(out / columns), into, columns]`` holds the transposed weight a tile of outputs at a time, the last one
    filled up with zeros.
    """
    columns, tiles = tile.columns, -(-out // tile.columns)

    @T.prim_func(private=True)
    def linear_(x_: T.handle, w_: T.handle, b_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        m = T.int64()
        x = T.match_buffer(x_, (m, into), "float32")
        w = T.match_buffer(w_, (tiles, into, columns), "float32")
        b = T.match_buffer(b_, (out if bias else 1,), "float32")
        y = T.match_buffer(y_, (m, out), "float32")
        for index in T.parallel(tiles):
            multiply_tile(x, w, y, b, index, index, m, into, out, tile, bias)

    return linear_


@cache
def head_linear(heads: int, out: int, into: int, tile: Tile) -> PrimFunc:
    """Make ``y [B,heads,T,out] = x [B,heads,T,into] w`` with a weight for each head.

    ``w [heads, ceil(out / columns), into, columns]``, as of :func:`linear`.
    """
    columns = columns_of(out, tile)
    tiles = -(-out // columns)

    @T.inline
    def rows_of(x, w, y, b, h, index, row, rows):
        acc = T.alloc_buffer((rows, columns), "float32", scope="local")
        clear(acc, rows, columns)
        for k in T.serial(into):
            for i in T.unroll(rows):
                for j in T.vectorized(columns):
                    acc[i, j] = acc[i, j] + x[b, h, row + i, k] * w[h, index, k, j]
        for i in T.unroll(rows):
            if out % columns == 0:
                for j in T.vectorized(columns):
                    y[b, h, row + i, index * columns + j] = acc[i, j]
            else:
                for j in T.serial(columns):
                    if index * columns + j < out:
                        y[b, h, row + i, index * columns + j] = acc[i, j]

    @T.prim_func(private=True)
    def head_linear_(x_: T.handle, w_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        batch, tokens = T.int64(), T.int64()
        x = T.match_buffer(x_, (batch, heads, tokens, into), "float32")
        w = T.match_buffer(w_, (heads, tiles, into, columns), "float32")
        y = T.match_buffer(y_, (batch, heads, tokens, out), "float32")
        for unit in T.parallel(batch * heads):
            for index in T.serial(tiles):

                @T.inline
                def block(row, rows):
                    rows_of(x, w, y, unit // heads, unit % heads, index, row, rows)

                by_rows(tokens, tile, block)

    return head_linear_


@cache
def quantised_linear(out: int, into: int, tile: Tile, *, bits: int, bias: bool) -> PrimFunc:
    """Make :func:`linear` with a weight of ``bits``: value = scale (code - zero).

    ``scales`` and, of 4 bits, ``zeros`` uint8 are ``[tiles, ceil(into / BLOCK), columns]``. ``codes`` are int8
    ``[tiles, into, columns]``, or uint8 ``[tiles, ceil(into / 2), columns]`` with two inputs to a byte, the first in
    the low half. Of few rows values are made as they are read; of many those of a tile of outputs are made first.
    """
    columns, tiles, blocks = tile.columns, -(-out // tile.columns), -(-into // BLOCK)
    step = 8 // bits
    kind = "int8" if bits == 8 else "uint8"

    @T.inline
    def read_block(scales, zeros, scale, shift, index, group):
        for j in T.vectorized(columns):
            scale[j] = scales[index, group, j]
        if bits == 4:
            for j in T.vectorized(columns):
                shift[j] = T.float32(0) - scale[j] * T.Cast("float32", T.Cast("int32", zeros[index, group, j]))

    @T.inline
    def values(codes, scale, shift, w, source, row, index, place):
        for j in T.vectorized(columns):
            if bits == 8:
                w[source, row, j] = T.Cast("float32", T.Cast("int32", codes[index, place, j])) * scale[j]
            else:
                w[source, row, j] = (
                    T.Cast("float32", T.Cast("int32", codes[index, place, j]) & 15) * scale[j] + shift[j]
                )
        if bits == 4:
            for j in T.vectorized(columns):
                w[source, row + 1, j] = (
                    T.Cast("float32", T.shift_right(T.Cast("int32", codes[index, place, j]), 4)) * scale[j] + shift[j]
                )

    @T.inline
    def add(x, codes, scale, shift, acc, index, row, rows, place):
        w = T.alloc_buffer((1, step, columns), "float32", scope="local")
        values(codes, scale, shift, w, 0, 0, index, place)
        for half in T.unroll(step):
            for i in T.unroll(rows):
                for j in T.vectorized(columns):
                    acc[i, j] = acc[i, j] + x[row + i, place * step + half] * w[0, half, j]

    @T.inline
    def rows_of(x, codes, scales, zeros, y, b, index, row, rows):
        acc = T.alloc_buffer((rows, columns), "float32", scope="local")
        scale = T.alloc_buffer((columns,), "float32", scope="local")
        shift = T.alloc_buffer((columns,), "float32", scope="local")
        clear(acc, rows, columns)
        for group in T.serial(blocks):
            read_block(scales, zeros, scale, shift, index, group)
            for k in T.serial(T.min(BLOCK, into - group * BLOCK) // step):
                add(x, codes, scale, shift, acc, index, row, rows, group * (BLOCK // step) + k)
        store(y, acc, row, index, rows, columns, out, b, bias)

    @T.inline
    def unpack(codes, scales, zeros, panel, index):
        scale = T.alloc_buffer((columns,), "float32", scope="local")
        shift = T.alloc_buffer((columns,), "float32", scope="local")
        for group in T.serial(blocks):
            read_block(scales, zeros, scale, shift, index, group)
            for k in T.serial(T.min(BLOCK, into - group * BLOCK) // step):
                values(codes, scale, shift, panel, 0, group * BLOCK + k * step, index, group * (BLOCK // step) + k)

    @T.prim_func(private=True)
    def quantised_linear_(
        x_: T.handle, codes_: T.handle, scales_: T.handle, zeros_: T.handle, b_: T.handle, y_: T.handle
    ):
        T.func_attr({"tirx.noalias": True})
        m = T.int64()
        x = T.match_buffer(x_, (m, into), "float32")
        codes = T.match_buffer(codes_, (tiles, into // step, columns), kind)
        scales = T.match_buffer(scales_, (tiles, blocks, columns), "float32")
        zeros = T.match_buffer(zeros_, (tiles, blocks, columns) if bits == 4 else (1,), "uint8")
        b = T.match_buffer(b_, (out if bias else 1,), "float32")
        y = T.match_buffer(y_, (m, out), "float32")
        for index in T.parallel(tiles):
            if m >= PANEL_ROWS:
                panel = T.alloc_buffer((1, into, columns), "float32")
                unpack(codes, scales, zeros, panel, index)
                multiply_tile(x, panel, y, b, 0, index, m, into, out, tile, bias)
            else:

                @T.inline
                def block(row, rows):
                    rows_of(x, codes, scales, zeros, y, b, index, row, rows)

                by_rows(m, tile, block)

    return quantised_linear_
