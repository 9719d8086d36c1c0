"""The system of the delta rule: how keys of a chunk overlap, and its inverse."""

from __future__ import annotations

import triton
import triton.language as tl

from memc.kernels.linear_memory.triton.blocks import load_rows, present, scores, store_rows


@triton.jit(do_not_specialize=["T"])
def overlaps(
    key,
    positions,
    whole,
    part,
    overlap,
    T,
    G: tl.constexpr,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
):
    """Write down B_jl = k_j.(E_jl k_l) ``[T, CHUNK]`` of each group; blocks above the diagonal are left as they are.

    Grid: blocks of rows of all groups.
    """
    blocks = tl.cdiv(T, ROWS)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    mark = block * ROWS
    rows = mark + tl.arange(0, ROWS)
    start = mark // CHUNK * CHUNK
    key += group * T * K
    whole += group * T * CHANNELS
    part += group * T * CHANNELS
    positions += group // G * T
    overlap += group * T * CHUNK
    taken = present(positions, rows, T)
    if ROWS < CHUNK:
        for earlier in range(start // ROWS, block):
            others = earlier * ROWS + tl.arange(0, ROWS)
            there = present(positions, others, T)
            b = scores(
                key, key, whole, part, rows, others, taken, there, mark, T, K, CHANNELS, False, ROWS, BK, PRECISION
            )
            store_rows(overlap, b, rows, others - start, rows < T, CHUNK)
    b = scores(key, key, whole, part, rows, rows, taken, taken, mark, T, K, CHANNELS, True, ROWS, BK, PRECISION)
    store_rows(overlap, b, rows, rows - start, rows < T, CHUNK)


@triton.jit(do_not_specialize=["T"])
def invert(
    overlap,
    beta,
    positions,
    inverse,
    T,
    G: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    BY_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Invert I + overlap beta, or I + beta overlap (``BY_ROW``), of the keys before each key: unit lower triangular.

    Forward substitution within all blocks on the diagonal at once, and then from block to block.
    Grid: chunks of all groups.
    """
    BLOCKS: tl.constexpr = CHUNK // BLOCK
    count = tl.cdiv(T, CHUNK)
    group = (tl.program_id(0) // count).to(tl.int64)
    local = tl.arange(0, CHUNK)
    rows = tl.program_id(0) % count * CHUNK + local
    taken = present(positions + group // G * T, rows, T)
    strength = tl.load(beta + group * T + rows, mask=taken, other=0.0).to(tl.float32)
    lower = load_rows(overlap + group * T * CHUNK, rows, local, rows < T, CHUNK)
    lower = tl.where(local[:, None] > local[None, :], lower, 0.0)
    lower = lower * strength[:, None] if BY_ROW else lower * strength[None, :]
    near = local[:, None] // BLOCK == local[None, :] // BLOCK
    square = tl.arange(0, BLOCK)
    diagonal = tl.sum(tl.reshape(tl.where(near, lower, 0.0), [BLOCKS, BLOCK, BLOCKS, BLOCK]), 2)
    solved = tl.zeros([BLOCKS, BLOCK, BLOCK], tl.float32)
    solved = tl.where((square[:, None] == square[None, :])[None, :, :], 1.0, solved)
    for i in range(1, BLOCK):
        here = (square == i)[None, :, None]
        row = tl.sum(tl.where(here, diagonal, 0.0), 1)
        solved = tl.where(here, solved - tl.sum(row[:, :, None] * solved, 1)[:, None, :], solved)
    blocks = tl.arange(0, BLOCKS)
    same = (blocks[:, None] == blocks[None, :])[:, None, :, None]
    inner = tl.reshape(tl.where(same, solved[:, :, None, :], 0.0), [CHUNK, CHUNK])
    far = tl.where(near, 0.0, lower)
    for number in range(BLOCKS):
        first = tl.reshape(tl.where((blocks == number)[:, None, None], solved, 0.0), [CHUNK, BLOCK])
        result = first
        for _ in range(number + 1, BLOCKS):
            below = tl.dot(far, result, input_precision=PRECISION)
            result = first - tl.dot(inner, below, input_precision=PRECISION)
        store_rows(inverse + group * T * CHUNK, result, rows, number * BLOCK + square, rows < T, CHUNK)
