"""``memc::window_memory`` for prompts: chunks of 16 queries against the ring as the chunk meets it, and its own keys.

Tokens of a chunk follow one another in one sequence and are no more than the window holds, so that what leaves it
meanwhile lies in the ring before any of them is written. Scores of a chunk are made in whole, the ring's by the tile
of slots; then each row is divided by its own sum, and weighs the values. What lies in which slot follows from the
chunk's first position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from memc.backends.tvm.isa import Tile
from memc.backends.tvm.kernels.common import LOWEST, SLOTS, Expression, Scores, clear, exp, multiply, tanh
from memc.backends.tvm.kernels.memory_chunk import CHUNK, blocks_of, rows_of

LEAST = 4
"""Tokens of a chunk at least; fewer go one after another."""

FAR = 1 << 30
"""Stands for the age of what was never written."""


@dataclass(frozen=True)
class Ring:
    """Slots of the state, and which of the other results are asked for."""

    window: int
    sinks: int
    lse: bool
    left: bool

    @property
    def slots(self) -> int:
        """Tokens that the state holds."""
        return self.window + self.sinks

    def slot_of(self, position: Expression) -> Expression:
        """Return the slot of the token at a position."""
        ring = self.sinks + T.floormod(position - self.sinks, self.window)
        return T.if_then_else(position < self.sinks, position, ring) if self.sinks else ring


@T.inline
def hand_out(names, s, r, b, g, t, position):  # noqa: D103
    # The token that leaves as this one comes.
    if position - r.window >= r.sinks:
        for d in T.serial(s.key_dim):
            names["left_key"][b, g, t, d] = names["keys"][
                b, g, r.slot_of(position) // SLOTS, d, r.slot_of(position) % SLOTS
            ]
        for e in T.serial(s.value_dim):
            names["left_value"][b, g, t, e] = names["values"][b, g, r.slot_of(position), e]
    else:
        for d in T.serial(s.key_dim):
            names["left_key"][b, g, t, d] = T.float32(0)
        for e in T.serial(s.value_dim):
            names["left_value"][b, g, t, e] = T.float32(0)


@T.inline
def take_in(names, s, r, b, g, t, position):  # noqa: D103
    for d in T.serial(s.key_dim):
        names["keys"][b, g, r.slot_of(position) // SLOTS, d, r.slot_of(position) % SLOTS] = names["k"][b, g, t, d]
    for e in T.serial(s.value_dim):
        names["values"][b, g, r.slot_of(position), e] = names["v"][b, g, t, e]


def chunked(s: Scores, r: Ring, tile: Tile) -> Any:
    """Return ``run(names, step, b, g, tokens)``, inlined: all tokens of one key-value head, its state in place.

    ``names`` are the tensors of the op; ``step(names, b, g, t, position)`` takes a token that is in no chunk.
    """
    key_dim, value_dim, share = s.key_dim, s.value_dim, s.share
    tiles = -(-r.slots // SLOTS)
    lanes = rows_of(tile, SLOTS)
    longest = min(CHUNK, r.window)
    # Value channels in tiles that end where they do: rows of values lie side by side.
    bands: list[tuple[int, int, int]] = []
    start = 0
    for width in (tile.columns, 8, 1):
        bands.append((start, width, (value_dim - start) // width))
        start += (value_dim - start) // width * width

    @T.inline
    def measure(names, b, at, tokens):
        at[1] = T.int64(1)
        if names["positions"][b, at[0]] >= 0:
            for n in T.serial(T.min(T.int64(longest), tokens - at[0]) - 1):
                if at[1] == n + 1 and names["positions"][b, at[0] + n + 1] == names["positions"][b, at[0]] + n + 1:
                    at[1] = n + 2

    @T.inline
    def date(age, distance, first, filled):
        # How many positions before the chunk's first one each slot's token is; sinks are always young enough.
        for slot in T.serial(T.ceildiv(filled, T.int64(SLOTS)) * SLOTS):
            behind = T.Cast("int32", T.floormod(first - 1 - slot, T.int64(r.window))) + 1
            age[slot] = T.if_then_else(
                slot < filled, T.if_then_else(slot < r.sinks, T.int32(-FAR), behind), T.int32(FAR)
            )
            if s.slopes:
                distance[slot] = T.Cast(
                    "float32", T.if_then_else(slot < r.sinks, T.Cast("int32", first - slot), behind)
                )

    def score(x: Expression, row: Expression, distance: Expression, slope: Expression | None) -> Expression:
        """Return a score from a product with the scaled query."""
        capped = x if s.softcap == 0 else tanh(x / T.float32(s.softcap)) * T.float32(s.softcap)
        return capped if slope is None else capped - slope * (distance + T.Cast("float32", row))

    def slope_of(names: dict[str, Any], h: Expression) -> Expression | None:
        return names["slopes"][h] if s.slopes else None

    @T.inline
    def score_tile(names, held, b, g, h, tile, block):
        acc = T.alloc_buffer((lanes, SLOTS), "float32", scope="local")
        clear(acc, lanes, SLOTS)
        multiply(
            acc,
            lambda i, d: held["reads"][block * lanes + i, d],
            lambda d, j: names["keys"][b, g, tile, d, j],
            key_dim,
            lanes,
            SLOTS,
        )
        for i in T.unroll(lanes):
            row = T.meta_var(T.Cast("int32", block * lanes + i))
            for j in T.vectorized(SLOTS):
                held["scores"][block * lanes + i, tile * SLOTS + j] = T.Select(
                    held["age"][tile * SLOTS + j] + row < r.window,
                    score(acc[i, j], row, held["distance"][tile * SLOTS + j if s.slopes else 0], slope_of(names, h)),
                    T.float32(LOWEST),
                )

    @T.inline
    def score_own(names, held, h, first, block):
        acc = T.alloc_buffer((lanes, SLOTS), "float32", scope="local")
        clear(acc, lanes, SLOTS)
        multiply(
            acc,
            lambda i, d: held["reads"][block * lanes + i, d],
            lambda d, j: held["own"][d, j],
            key_dim,
            lanes,
            SLOTS,
        )
        for i in T.unroll(lanes):
            row = T.meta_var(T.Cast("int32", block * lanes + i))
            for j in T.vectorized(SLOTS):
                held["scores"][block * lanes + i, first + j] = T.Select(
                    j <= row,
                    score(acc[i, j], row - j, T.float32(0), slope_of(names, h)),
                    T.float32(LOWEST),
                )

    @T.inline
    def normalise(names, held, b, h, t, row, count):
        # Exponentials of ``count`` scores of a row, and what their values are to be multiplied by.
        best = T.alloc_buffer((SLOTS,), "float32", scope="local")
        sums = T.alloc_buffer((SLOTS,), "float32", scope="local")
        top = T.alloc_buffer((1,), "float32", scope="local")
        total = T.alloc_buffer((1,), "float32", scope="local")
        for j in T.vectorized(SLOTS):
            best[j] = T.float32(LOWEST)
            sums[j] = T.float32(0)
        for at in T.serial(count // SLOTS):
            for j in T.vectorized(SLOTS):
                best[j] = T.max(best[j], held["scores"][row, at * SLOTS + j])
        top[0] = names["sinks"][h] if s.sink_logits else T.float32(LOWEST)
        for j in T.serial(SLOTS):
            top[0] = T.max(top[0], best[j])
        for at in T.serial(count // SLOTS):
            for j in T.vectorized(SLOTS):
                held["scores"][row, at * SLOTS + j] = exp(held["scores"][row, at * SLOTS + j] - top[0])
            for j in T.vectorized(SLOTS):
                sums[j] = sums[j] + held["scores"][row, at * SLOTS + j]
        total[0] = exp(names["sinks"][h] - top[0]) if s.sink_logits else T.float32(0)
        for j in T.serial(SLOTS):
            total[0] = total[0] + sums[j]
        held["share"][row] = T.float32(1) / total[0]
        if r.lse:
            names["lse"][b, h, t] = top[0] + T.log(total[0])

    @T.inline
    def weigh(names, held, b, g, h, at, filled, first, start, width):
        rows = T.meta_var(rows_of(tile, width))
        acc = T.alloc_buffer((rows, width), "float32", scope="local")
        for block in T.serial(blocks_of(at[1], rows)):
            clear(acc, rows, width)
            multiply(
                acc,
                lambda i, j: held["scores"][block * rows + i, j],
                lambda j, e: names["values"][b, g, j, start + e],
                filled,
                rows,
                width,
            )
            multiply(
                acc,
                lambda i, j: held["scores"][block * rows + i, first + j],
                lambda j, e: names["v"][b, g, at[0] + j, start + e],
                T.min((block + 1) * rows, at[1]),
                rows,
                width,
            )
            for i in T.unroll(rows):
                if T.Cast("int64", block * rows + i) < at[1]:
                    for e in T.vectorized(width):
                        names["y"][b, h, at[0] + block * rows + i, start + e] = (
                            acc[i, e] * held["share"][block * rows + i]
                        )

    @T.inline
    def answer(names, held, b, g, h, at, filled):
        first = T.ceildiv(filled, T.int64(SLOTS)) * SLOTS
        for i in T.serial(T.int64(CHUNK)):
            for d in T.serial(key_dim):
                held["reads"][i, d] = names["q"][b, h, at[0] + T.min(i, at[1] - 1), d] * T.float32(s.scale)
        for block in T.serial(blocks_of(at[1], lanes)):
            for part in T.serial(T.ceildiv(filled, T.int64(SLOTS))):
                score_tile(names, held, b, g, h, part, block)
            score_own(names, held, h, first, block)
        for i in T.serial(at[1]):
            normalise(names, held, b, h, at[0] + i, i, first + SLOTS)
        for index in T.serial(bands[0][2]):
            weigh(names, held, b, g, h, at, filled, first, bands[0][0] + index * bands[0][1], bands[0][1])
        for index in T.serial(bands[1][2]):
            weigh(names, held, b, g, h, at, filled, first, bands[1][0] + index * bands[1][1], bands[1][1])
        for index in T.serial(bands[2][2]):
            weigh(names, held, b, g, h, at, filled, first, bands[2][0] + index * bands[2][1], bands[2][1])

    @T.inline
    def together(names, held, b, g, at):
        position = names["positions"][b, at[0]]
        filled = T.min(position, T.int64(r.slots))
        date(held["age"], held["distance"], position, filled)
        for j in T.serial(T.int64(CHUNK)):
            for d in T.serial(key_dim):
                held["own"][d, j] = names["k"][b, g, at[0] + T.min(j, at[1] - 1), d]
        if r.left:
            for i in T.serial(at[1]):
                hand_out(names, s, r, b, g, at[0] + i, position + i)
        for head in T.serial(share):
            answer(names, held, b, g, g * share + head, at, filled)
        for i in T.serial(at[1]):
            take_in(names, s, r, b, g, at[0] + i, position + i)

    @T.inline
    def run(names, step, b, g, tokens):
        age = T.alloc_buffer((tiles * SLOTS,), "int32")
        distance = T.alloc_buffer((tiles * SLOTS if s.slopes else 1,), "float32")
        own = T.alloc_buffer((key_dim, CHUNK), "float32")
        reads = T.alloc_buffer((CHUNK, key_dim), "float32")
        scores = T.alloc_buffer((CHUNK, (tiles + 1) * SLOTS), "float32")
        shares = T.alloc_buffer((CHUNK,), "float32")
        at = T.alloc_buffer((2,), "int64", scope="local")
        held = T.meta_var(
            {"age": age, "distance": distance, "own": own, "reads": reads, "scores": scores, "share": shares}
        )
        at[0] = T.int64(0)
        while at[0] < tokens:
            measure(names, b, at, tokens)
            if at[1] >= LEAST:
                together(names, held, b, g, at)
            else:
                for i in T.serial(at[1]):
                    step(names, b, g, at[0] + i, names["positions"][b, at[0] + i])
            at[0] = at[0] + at[1]

    return run
