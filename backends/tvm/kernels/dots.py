"""Products of 8- and 4-bit weights by the instruction that multiplies bytes and adds four products (AVX-512 VNNI).

Activations are not rounded to bytes: each block of them is a step times whole numbers of 24 bits, which three products
of bytes multiply exactly. They are off by 2^-24 of the largest of their block, as float32 is of a number. That takes 3
instructions for 64 weights where float32 takes 4, and 8 more to make floats of the codes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from tvm.script import tirx as T

from memc.backends.tvm.isa import Tile
from memc.backends.tvm.kernels.common import Expression, PrimFunc, clear
from memc.backends.tvm.kernels.linear import BLOCK, linear, multiply_tile, quantised_linear, store

LANES = 16
"""Sums of one instruction, each of four products."""

DIGITS = 3
"""Of base 256, from -128 to 127, the lowest first."""

LARGEST = 127 << 16
"""The largest whole number of an activation: its digits are bytes with a sign."""

MANY = 128
"""Rows from which it is faster to make the values of a tile in float32 once: the digits of so many leave the caches."""

SMALLEST = 1e-30
"""Activations of a block that are all nearer to zero share the step of this."""


def _dot(total: Expression, codes: Expression, digits: Expression) -> Expression:
    """Return ``total`` int32x16 plus the products of unsigned ``codes`` and ``digits``, four bytes to a lane."""
    codes, digits = T.reinterpret("int8x64", codes), T.reinterpret("int8x64", digits)
    return T.call_llvm_pure_intrin("int32x16", "llvm.x86.avx512.vpdpbusd.512", total, codes, digits)


def _lanes(start: Expression) -> Expression:
    return T.Ramp(start, 1, LANES)


def _magnitude(x: Expression) -> Expression:
    """Return the bits of |x|: as whole numbers they order like the values, with NaN the largest, so that it stays."""
    return T.bitwise_and(T.reinterpret("int32", x), T.int32(0x7FFFFFFF))


@T.inline
def _split(x, row, into, blocks, digits, sums, steps):
    # A block of x[row] is steps[row, block] (digits[row, 0] + 256 digits[row, 1] + 65536 digits[row, 2]); ``sums`` are
    # those of its digits, by which what was added to the codes is taken off again.
    values = T.alloc_buffer((BLOCK,), "float32", scope="local")
    whole = T.alloc_buffer((BLOCK,), "int32", scope="local")
    top = T.alloc_buffer((1,), "int32", scope="local")
    for block in T.serial(blocks):
        if into % BLOCK == 0:
            for j in T.vectorized(BLOCK):
                values[j] = x[row, block * BLOCK + j]
        else:
            for j in T.serial(BLOCK):
                values[j] = T.float32(0)
                if block * BLOCK + j < into:
                    values[j] = x[row, block * BLOCK + j]
        top[0] = T.reinterpret("int32", T.float32(SMALLEST))
        for j in T.serial(BLOCK):
            top[0] = T.max(top[0], _magnitude(values[j]))
        steps[row, block] = T.reinterpret("float32", top[0]) / T.float32(LARGEST)
        for j in T.vectorized(BLOCK):
            whole[j] = T.Cast(
                "int32",
                T.floor(values[j] * (T.float32(LARGEST) / T.reinterpret("float32", top[0])) + T.float32(0.5)),
            )
        for digit in T.unroll(DIGITS):
            for j in T.vectorized(BLOCK):
                digits[row, digit, block * BLOCK + j] = T.Cast("int8", whole[j])
            for j in T.vectorized(BLOCK):
                whole[j] = T.shift_right(whole[j] + 128, 8)
            sums[row, digit, block] = 0
            for j in T.serial(BLOCK):
                sums[row, digit, block] = sums[row, digit, block] + T.Cast(
                    "int32", digits[row, digit, block * BLOCK + j]
                )


@cache
def dot_linear(out: int, into: int, tile: Tile, *, bits: int, bias: bool) -> PrimFunc:
    """Make :func:`~memc.backends.tvm.kernels.linear.quantised_linear` by dot products of bytes.

    ``codes`` int32 ``[tiles, ceil(into / BLOCK) * bits, columns]`` hold, each, codes of one output: of 8 bits those of
    4 inputs, 128 added; of 4 bits those of 8, the first four in the low halves of the bytes. Blocks are filled up. Of
    many rows the values of a tile of outputs are made first, as there.
    """
    columns, tiles, blocks = tile.columns, -(-out // tile.columns), -(-into // BLOCK)
    halves = 8 // bits

    def codes_of(
        codes: Expression, index: Expression, word: Expression, start: Expression, half: Expression
    ) -> Expression:
        read = codes[index, word, _lanes(start)]
        if bits == 8:
            return read
        shifted = T.shift_right(read, T.Broadcast(4 * half, LANES))
        return T.bitwise_and(shifted, T.Broadcast(T.int32(0x0F0F0F0F), LANES))

    def zero(zeros: Expression, index: Expression, block: Expression, j: Expression) -> Expression:
        return T.Cast("float32", T.Cast("int32", zeros[index, block, j])) if bits == 4 else T.float32(128)

    @T.inline
    def multiply(codes, digits, totals, index, block, row):
        for word in T.serial(bits):
            for half in T.unroll(halves):
                for digit in T.unroll(DIGITS):
                    for part in T.unroll(columns // LANES):
                        totals[digit, _lanes(part * LANES)] = _dot(
                            totals[digit, _lanes(part * LANES)],
                            codes_of(codes, index, block * bits + word, part * LANES, half),
                            T.Broadcast(
                                T.reinterpret(
                                    "int32",
                                    digits[row, digit, T.Ramp(block * BLOCK + (word * halves + half) * 4, 1, 4)],
                                ),
                                LANES,
                            ),
                        )

    @T.inline
    def product(codes, scales, zeros, digits, sums, steps, y, b, index, row):
        acc = T.alloc_buffer((1, columns), "float32", scope="local")
        totals = T.alloc_buffer((DIGITS, columns), "int32", scope="local")
        clear(acc, 1, columns)
        for block in T.serial(blocks):
            for digit in T.unroll(DIGITS):
                for j in T.vectorized(columns):
                    if bits == 4:
                        totals[digit, j] = T.Cast("int32", zeros[index, block, j]) * (0 - sums[row, digit, block])
                    else:
                        totals[digit, j] = -128 * sums[row, digit, block]
            multiply(codes, digits, totals, index, block, row)
            for j in T.vectorized(columns):
                # The upper digits fit into a whole number of 32 bits together, all three do not.
                acc[0, j] = acc[0, j] + (
                    T.Cast("float32", totals[2, j] * 256 + totals[1, j]) * T.float32(256)
                    + T.Cast("float32", totals[0, j])
                ) * (scales[index, block, j] * steps[row, block])
        store(y, acc, row, index, 1, columns, out, b, bias)

    @T.inline
    def unpack(codes, scales, zeros, panel, index):
        for block in T.serial(blocks):
            for word in T.serial(bits):
                for half in T.unroll(halves):
                    for place in T.unroll(4):
                        for j in T.vectorized(columns):
                            panel[0, block * BLOCK + (word * halves + half) * 4 + place, j] = (
                                T.Cast(
                                    "float32",
                                    T.bitwise_and(
                                        T.shift_right(codes[index, block * bits + word, j], place * 8 + half * 4),
                                        T.int32((1 << bits) - 1),
                                    ),
                                )
                                - zero(zeros, index, block, j)
                            ) * scales[index, block, j]

    @T.prim_func(private=True)
    def dot_linear_(x_: T.handle, codes_: T.handle, scales_: T.handle, zeros_: T.handle, b_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        m = T.int64()
        x = T.match_buffer(x_, (m, into), "float32")
        codes = T.match_buffer(codes_, (tiles, blocks * bits, columns), "int32")
        scales = T.match_buffer(scales_, (tiles, blocks, columns), "float32")
        zeros = T.match_buffer(zeros_, (tiles, blocks, columns) if bits == 4 else (1,), "uint8")
        b = T.match_buffer(b_, (out if bias else 1,), "float32")
        y = T.match_buffer(y_, (m, out), "float32")
        if m >= MANY:
            for index in T.parallel(tiles):
                panel = T.alloc_buffer((1, blocks * BLOCK, columns), "float32")
                unpack(codes, scales, zeros, panel, index)
                multiply_tile(x, panel, y, b, 0, index, m, into, out, tile, bias)
        else:
            digits = T.alloc_buffer((m, DIGITS, blocks * BLOCK), "int8")
            sums = T.alloc_buffer((m, DIGITS, blocks), "int32")
            steps = T.alloc_buffer((m, blocks), "float32")
            for row in T.serial(m):
                _split(x, row, into, blocks, digits, sums, steps)
            for index in T.parallel(tiles):
                for row in T.serial(m):
                    product(codes, scales, zeros, digits, sums, steps, y, b, index, row)

    return dot_linear_


def maker(bits: int, tile: Tile) -> tuple[Callable[..., PrimFunc], dict[str, int]]:
    """Return what makes a product of float32 weights, or of 8 or 4 ``bits``, in a tile, and its options for them."""
    if bits == 32:
        return linear, {}
    return dot_linear if tile.dots else quantised_linear, {"bits": bits}
