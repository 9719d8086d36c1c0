"""``memc::linear_memory`` for prompts: chunks of 16 tokens as products in registers, one step from chunk to chunk.

The form of ``memc.kernels.linear_memory.chunked``: with the state S that a chunk meets, E_ij = a_(j+1) ... a_i and
h_i = a_1 ... a_i, the outputs are S^T (h_i q_i) + sum_(j <= i) q_i.(E_ij k_j) u_j, where u is the values, or for the
delta rule what the tokens add, and then S = h_C S + sum_j (E_Cj k_j) u_j^T. Decays are products of gates in [0, 1],
built up row by row: however strong a gate is, nothing overflows and nothing cancels. A gate for each head multiplies
the scores. Gates for each channel multiply the keys, one row of the chunk after another, so that a vector of keys,
decayed up to a row, meets the queries of that row; what is left of them after the last row is what the state takes.

A chunk ends early where a sequence starts, which then meets a state of zeros. Padding has keys of zero and gates of 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from memc.backends.tvm.isa import Tile, columns_of
from memc.backends.tvm.kernels.common import SLOTS, Expression, clear, exp, multiply

CHUNK = SLOTS
"""Tokens of a chunk: as many keys as lie in one vector of scores."""


@dataclass(frozen=True)
class Memory:
    """Sizes of ``memc::linear_memory`` and its rule; ``per_channel`` decays have a value for each key channel."""

    heads: int
    groups: int
    key_dim: int
    value_dim: int
    per_channel: bool
    delta: bool

    @property
    def share(self) -> int:
        """Query heads of one key-value head."""
        return self.heads // self.groups

    @property
    def decays(self) -> int:
        """Gates of one token and key-value head."""
        return self.key_dim if self.per_channel else 1


def rows_of(tile: Tile, columns: int) -> int:
    """Return the rows of a tile of fewer ``columns`` that fills the registers: a power of 2, at most ``CHUNK``."""
    rows = max(1, tile.rows * tile.columns // columns)
    return int(min(CHUNK, 1 << (rows.bit_length() - 1)))


def blocks_of(count: Expression, rows: int) -> Expression:
    """Return how many blocks of ``rows`` the tokens of a chunk fill, the last one perhaps in part."""
    return T.ceildiv(count, T.int64(rows))


def chunked(m: Memory, tile: Tile) -> Any:
    """Return ``run(names, b, g, tokens)``, inlined: all tokens of one key-value head, its state in place.

    ``names`` are the tensors of the op. The state, padded to whole vectors, stays in memory of its own meanwhile, a
    tile of value channels at a time.
    """
    heads, key_dim, value_dim, share, decays = m.share, m.key_dim, m.value_dim, m.share, m.decays
    sources = heads + 1 if m.delta else heads
    columns = tile.columns
    full, rest = value_dim // columns, value_dim % columns
    narrow = columns_of(rest, tile) if rest else 0
    padded = full * columns + narrow
    pair = 2 if key_dim % 2 == 0 else 1
    lanes = rows_of(tile, CHUNK)

    @T.inline
    def each_band(body, names, held, b, g, extra):
        # Calls body for every tile of value channels: the first one, the width, how many of these there are.
        for index in T.serial(full):
            body(names, held, b, g, extra, index * columns, columns, columns)
        if rest > 0:
            body(names, held, b, g, extra, full * columns, narrow, rest)

    @T.inline
    def load_state(names, held, b, g, extra, start, width, there):
        for d in T.serial(key_dim):
            if there == width:
                for e in T.vectorized(width):
                    held["memory"][start * key_dim + d * width + e] = names["state"][b, g, d, start + e]
            else:
                for e in T.serial(width):
                    held["memory"][start * key_dim + d * width + e] = T.float32(0)
                for e in T.serial(there):
                    held["memory"][start * key_dim + d * width + e] = names["state"][b, g, d, start + e]

    @T.inline
    def store_state(names, held, b, g, extra, start, width, there):
        for d in T.serial(key_dim):
            if there == width:
                for e in T.vectorized(width):
                    names["state"][b, g, d, start + e] = held["memory"][start * key_dim + d * width + e]
            else:
                for e in T.serial(there):
                    names["state"][b, g, d, start + e] = held["memory"][start * key_dim + d * width + e]

    @T.inline
    def load_values(names, held, b, g, extra, start, width, there):
        for j in T.serial(T.int64(CHUNK)):
            for e in T.serial(width):
                held["values"][start * CHUNK + j * width + e] = T.float32(0)
            if held["live"][j] > 0:
                if there == width:
                    for e in T.vectorized(width):
                        held["values"][start * CHUNK + j * width + e] = names["v"][b, g, held["at"][0] + j, start + e]
                else:
                    for e in T.serial(there):
                        held["values"][start * CHUNK + j * width + e] = names["v"][b, g, held["at"][0] + j, start + e]

    @T.inline
    def measure(names, held, b, tokens):
        # Where the chunk ends, and which of its rows are tokens.
        at = T.meta_var(held["at"])
        at[1] = T.int64(1)
        for n in T.serial(T.min(T.int64(CHUNK), tokens - at[0]) - 1):
            if at[1] == n + 1 and names["positions"][b, at[0] + n + 1] != 0:
                at[1] = n + 2
        for j in T.serial(T.int64(CHUNK)):
            held["live"][j] = T.if_then_else(
                j < at[1], T.Cast("int32", names["positions"][b, at[0] + T.min(j, at[1] - 1)] >= 0), 0
            )

    @T.inline
    def score_by_head(held, source):
        acc = T.alloc_buffer((lanes, CHUNK), "float32", scope="local")
        for block in T.serial(blocks_of(held["at"][1], lanes)):
            clear(acc, lanes, CHUNK)
            multiply(
                acc,
                lambda i, d: held["reads"][source, block * lanes + i, d],
                lambda d, j: held["keys"][d, j],
                key_dim,
                lanes,
                CHUNK,
            )
            for i in T.unroll(lanes):
                for j in T.vectorized(CHUNK):
                    held["scores"][source, block * lanes + i, j] = acc[i, j] * held["decay"][block * lanes + i, j]

    @T.inline
    def prepare_by_head(names, held, b, g):
        # Decays from row to row and from the chunk's start, the keys channel by channel, the scores.
        at = T.meta_var(held["at"])
        gate = T.alloc_buffer((1,), "float32", scope="local")
        for i in T.serial(CHUNK):
            gate[0] = T.float32(1)
            if held["live"][i] > 0:
                gate[0] = exp(names["decay"][b, g, at[0] + i, 0])
            if i == 0:
                held["head"][0] = gate[0]
                for j in T.vectorized(CHUNK):
                    held["decay"][0, j] = T.Select(j == 0, T.float32(1), T.float32(0))
            else:
                held["head"][i] = held["head"][i - 1] * gate[0]
                for j in T.vectorized(CHUNK):
                    held["decay"][i, j] = T.Select(j == i, T.float32(1), held["decay"][i - 1, j] * gate[0])
        for j in T.serial(T.int64(CHUNK)):
            row = at[0] + T.min(j, at[1] - 1)  # rows behind the last are read, and their results not stored
            for source in T.serial(heads):
                for d in T.serial(key_dim):
                    held["reads"][source, j, d] = names["q"][b, g * share + source, row, d]
            if m.delta:
                for d in T.serial(key_dim):
                    held["reads"][share, j, d] = names["k"][b, g, row, d]
            if held["live"][j] > 0:
                for d in T.serial(key_dim):
                    held["keys"][d, j] = names["k"][b, g, at[0] + j, d]
            else:
                for d in T.serial(key_dim):
                    held["keys"][d, j] = T.float32(0)
        for source in T.serial(sources):
            score_by_head(held, source)
        for d in T.serial(key_dim):
            for j in T.vectorized(CHUNK):
                held["keys"][d, j] = held["keys"][d, j] * held["decay"][CHUNK - 1, j]

    @T.inline
    def clear_part(acc, p):
        for source in T.unroll(sources):
            for j in T.vectorized(CHUNK):
                acc[p, source, j] = T.float32(0)

    @T.inline
    def add_row(names, held, acc, gate, b, g, i, d, p):
        for j in T.vectorized(CHUNK):
            held["keys"][d, j] = T.Select(j == T.Cast("int32", i), held["own"][d], held["keys"][d, j] * gate[d])
        for source in T.unroll(heads):
            for j in T.vectorized(CHUNK):
                acc[p, source, j] = acc[p, source, j] + (
                    names["q"][b, g * share + source, held["at"][0] + i, d] * held["keys"][d, j]
                )
        if m.delta:
            for j in T.vectorized(CHUNK):
                acc[p, share, j] = acc[p, share, j] + held["own"][d] * held["keys"][d, j]

    @T.inline
    def prepare_by_channel(names, held, b, g):
        # As for a gate for each head, with the keys decayed from row to row, and the decays from the start multiplied
        # into what reads the state.
        at = T.meta_var(held["at"])
        gate = T.alloc_buffer((key_dim,), "float32", scope="local")
        acc = T.alloc_buffer((pair, sources, CHUNK), "float32", scope="local")
        for d in T.serial(key_dim):
            held["head"][d] = T.float32(1)
            for j in T.vectorized(CHUNK):
                held["keys"][d, j] = T.float32(0)
        for i in T.serial(at[1]):
            if held["live"][i] > 0:
                for d in T.serial(key_dim):
                    gate[d] = exp(names["decay"][b, g, at[0] + i, d])
                    held["own"][d] = names["k"][b, g, at[0] + i, d]
            else:
                for d in T.serial(key_dim):
                    gate[d] = T.float32(1)
                    held["own"][d] = T.float32(0)
            for d in T.serial(key_dim):
                held["head"][d] = held["head"][d] * gate[d]
            for source in T.serial(heads):
                for d in T.serial(key_dim):
                    held["reads"][source, i, d] = names["q"][b, g * share + source, at[0] + i, d] * held["head"][d]
            if m.delta:
                for d in T.serial(key_dim):
                    held["reads"][share, i, d] = held["own"][d] * held["head"][d]
            for p in T.unroll(pair):
                clear_part(acc, p)
            for half in T.serial(key_dim // pair):
                for p in T.unroll(pair):
                    add_row(names, held, acc, gate, b, g, i, half * pair + p, p)
            for source in T.unroll(sources):
                for j in T.vectorized(CHUNK):
                    held["scores"][source, i, j] = acc[0, source, j] + (
                        acc[1, source, j] if pair == 2 else T.float32(0)
                    )

    @T.inline
    def recall(held, source, acc, block, start, width, rows):
        # Reads the state that the chunk meets, for the rows of one block.
        clear(acc, rows, width)
        multiply(
            acc,
            lambda i, d: held["reads"][source, block * rows + i, d],
            lambda d, e: held["memory"][start * key_dim + d * width + e],
            key_dim,
            rows,
            width,
        )
        if not m.per_channel:
            for i in T.unroll(rows):
                for e in T.vectorized(width):
                    acc[i, e] = acc[i, e] * held["head"][block * rows + i]

    @T.inline
    def solve(names, held, b, g, extra, start, width, there):
        # Turns values into what the tokens add, u_i = beta_i (v_i - S^T (h_i k_i) - sum_(j < i) k_i.(E_ij k_j) u_j).
        rows = T.meta_var(rows_of(tile, width))
        acc = T.alloc_buffer((rows, width), "float32", scope="local")
        one = T.alloc_buffer((1, width), "float32", scope="local")
        for block in T.serial(blocks_of(held["at"][1], rows)):
            recall(held, share, acc, block, start, width, rows)
            for i in T.unroll(rows):
                for e in T.vectorized(width):
                    held["values"][start * CHUNK + (block * rows + i) * width + e] = (
                        held["values"][start * CHUNK + (block * rows + i) * width + e] - acc[i, e]
                    )
        for i in T.serial(held["at"][1]):
            clear(one, 1, width)
            multiply(
                one,
                lambda _, j: held["scores"][share, i, j],
                lambda j, e: held["values"][start * CHUNK + j * width + e],
                i,
                1,
                width,
            )
            for e in T.vectorized(width):
                held["values"][start * CHUNK + i * width + e] = T.if_then_else(
                    held["live"][i] > 0, names["beta"][b, g, held["at"][0] + i], T.float32(0)
                ) * (held["values"][start * CHUNK + i * width + e] - one[0, e])

    @T.inline
    def write(names, held, acc, b, h, row, i, start, there):
        if held["live"][row] > 0:
            if there == columns:
                for e in T.vectorized(there):
                    names["y"][b, h, held["at"][0] + row, start + e] = acc[i, e]
            else:
                for e in T.serial(there):
                    names["y"][b, h, held["at"][0] + row, start + e] = acc[i, e]
        else:
            for e in T.serial(there):
                names["y"][b, h, held["at"][0] + row, start + e] = T.float32(0)

    @T.inline
    def answer(names, held, b, g, source, start, width, there):
        rows = T.meta_var(rows_of(tile, width))
        acc = T.alloc_buffer((rows, width), "float32", scope="local")
        for block in T.serial(blocks_of(held["at"][1], rows)):
            recall(held, source, acc, block, start, width, rows)
            multiply(
                acc,
                lambda i, j: held["scores"][source, block * rows + i, j],
                lambda j, e: held["values"][start * CHUNK + j * width + e],
                T.min((block + 1) * rows, held["at"][1]),
                rows,
                width,
            )
            for i in T.unroll(rows):
                if T.Cast("int64", block * rows + i) < held["at"][1]:
                    write(names, held, acc, b, g * share + source, block * rows + i, i, start, there)

    @T.inline
    def advance_rows(held, start, width, first, rows):
        acc = T.alloc_buffer((rows, width), "float32", scope="local")
        for i in T.unroll(rows):
            for e in T.vectorized(width):
                acc[i, e] = held["memory"][start * key_dim + (first + i) * width + e] * (
                    held["head"][first + i] if m.per_channel else held["head"][CHUNK - 1]
                )
        multiply(
            acc,
            lambda i, j: held["keys"][first + i, j],
            lambda j, e: held["values"][start * CHUNK + j * width + e],
            held["at"][1],
            rows,
            width,
        )
        for i in T.unroll(rows):
            for e in T.vectorized(width):
                held["memory"][start * key_dim + (first + i) * width + e] = acc[i, e]

    @T.inline
    def advance(names, held, b, g, extra, start, width, there):
        rows = T.meta_var(min(rows_of(tile, width), key_dim))
        for block in T.serial(key_dim // rows):
            advance_rows(held, start, width, block * rows, rows)
        for row in T.serial(key_dim % rows):
            advance_rows(held, start, width, key_dim // rows * rows + row, 1)

    @T.inline
    def run(names, b, g, tokens):
        memory = T.alloc_buffer((key_dim * padded,), "float32")
        values = T.alloc_buffer((CHUNK * padded,), "float32")
        keys = T.alloc_buffer((key_dim, CHUNK), "float32")
        scores = T.alloc_buffer((sources, CHUNK, CHUNK), "float32")
        reads = T.alloc_buffer((sources, CHUNK, key_dim), "float32")
        decay = T.alloc_buffer((1, 1) if m.per_channel else (CHUNK, CHUNK), "float32")
        own = T.alloc_buffer((decays,), "float32")
        head = T.alloc_buffer((max(decays, CHUNK),), "float32")
        live = T.alloc_buffer((CHUNK,), "int32")
        at = T.alloc_buffer((2,), "int64", scope="local")
        held = T.meta_var(
            {
                "memory": memory,
                "values": values,
                "keys": keys,
                "scores": scores,
                "reads": reads,
                "decay": decay,
                "own": own,
                "head": head,
                "live": live,
                "at": at,
            }
        )
        each_band(load_state, names, held, b, g, 0)
        at[0] = T.int64(0)
        while at[0] < tokens:
            measure(names, held, b, tokens)
            if names["positions"][b, at[0]] == 0:
                for d in T.serial(key_dim * padded):
                    memory[d] = T.float32(0)
            each_band(load_values, names, held, b, g, 0)
            if m.per_channel:
                prepare_by_channel(names, held, b, g)
            else:
                prepare_by_head(names, held, b, g)
            if m.delta:
                each_band(solve, names, held, b, g, 0)
            for source in T.serial(heads):
                each_band(answer, names, held, b, g, source)
            each_band(advance, names, held, b, g, 0)
            at[0] = at[0] + at[1]
        each_band(store_state, names, held, b, g, 0)

    return run
