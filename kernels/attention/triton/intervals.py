"""Which blocks of keys a block of queries visits, and the other way round."""

from __future__ import annotations

import triton
import triton.language as tl

from memc.kernels.softmax_triton import readable


@triton.jit(do_not_specialize=["tokens", "held"])
def visits(
    intervals, query_positions, query_numbers, positions, numbers, tokens, held,
    window: tl.constexpr, chunk: tl.constexpr, prefix: tl.constexpr, sinks: tl.constexpr,
    block_queries: tl.constexpr, block_keys: tl.constexpr,
):  # fmt: skip
    """Find the blocks of keys that each block of queries reads, for all heads at once.

    ``intervals [B, blocks of queries, 4]``: from and to which block of keys it reads sinks beyond the window, then the
    rest; the two do not overlap. Grid: (blocks of queries, B).
    """
    block, batch = tl.program_id(0), tl.program_id(1)
    query_positions += batch.to(tl.int64) * tokens
    query_numbers += batch.to(tl.int64) * tokens
    positions += batch.to(tl.int64) * held
    numbers += batch.to(tl.int64) * held
    t = block * block_queries + tl.arange(0, block_queries)
    p = tl.load(query_positions + t, mask=t < tokens, other=-1)[:, None]
    number = tl.load(query_numbers + t, mask=t < tokens, other=-1)[:, None]
    blocks = tl.cdiv(held, block_keys)
    far_low, far_high, low, high = blocks, 0, blocks, 0
    for n in range(blocks):
        s = n * block_keys + tl.arange(0, block_keys)
        j = tl.load(positions + s, mask=s < held, other=-1)[None, :]
        same = number == tl.load(numbers + s, mask=s < held, other=-1)[None, :]
        seen = readable(p, j, same, window, chunk, prefix, sinks)
        if sinks > 0:
            far = seen & (p - j >= window)
            seen = seen & (p - j < window)
            some = tl.max(tl.max(far.to(tl.int32), 1), 0) > 0
            far_low = tl.where(some, tl.minimum(far_low, n), far_low)
            far_high = tl.where(some, n + 1, far_high)
        some = tl.max(tl.max(seen.to(tl.int32), 1), 0) > 0
        low = tl.where(some, tl.minimum(low, n), low)
        high = tl.where(some, n + 1, high)
    if sinks > 0:
        # Sequences that follow one another in a block of queries may mix the two up: then read all from the first on.
        mixed = (far_high > low) & (far_high > 0)
        low = tl.where(mixed, tl.minimum(low, far_low), low)
        high = tl.where(mixed, tl.maximum(high, far_high), high)
        far_high = tl.where(mixed, 0, far_high)
    intervals += (batch.to(tl.int64) * tl.num_programs(0) + block) * 4
    tl.store(intervals, tl.minimum(far_low, far_high))
    tl.store(intervals + 1, far_high)
    tl.store(intervals + 2, tl.minimum(low, high))
    tl.store(intervals + 3, high)


@triton.jit(do_not_specialize=["tokens", "held"])
def visitors(
    intervals, query_positions, query_numbers, positions, numbers, tokens, held,
    window: tl.constexpr, chunk: tl.constexpr, prefix: tl.constexpr, sinks: tl.constexpr,
    block_queries: tl.constexpr, block_keys: tl.constexpr,
):  # fmt: skip
    """Find from and to which block of queries each block of keys is read: ``intervals [B, blocks of keys, 2]``.

    Grid: (blocks of keys, B).
    """
    block, batch = tl.program_id(0), tl.program_id(1)
    query_positions += batch.to(tl.int64) * tokens
    query_numbers += batch.to(tl.int64) * tokens
    positions += batch.to(tl.int64) * held
    numbers += batch.to(tl.int64) * held
    s = block * block_keys + tl.arange(0, block_keys)
    j = tl.load(positions + s, mask=s < held, other=-1)[:, None]
    number = tl.load(numbers + s, mask=s < held, other=-1)[:, None]
    blocks = tl.cdiv(tokens, block_queries)
    low, high = blocks, 0
    for m in range(blocks):
        t = m * block_queries + tl.arange(0, block_queries)
        p = tl.load(query_positions + t, mask=t < tokens, other=-1)[None, :]
        same = number == tl.load(query_numbers + t, mask=t < tokens, other=-1)[None, :]
        seen = readable(p, j, same, window, chunk, prefix, sinks)
        some = tl.max(tl.max(seen.to(tl.int32), 1), 0) > 0
        low = tl.where(some, tl.minimum(low, m), low)
        high = tl.where(some, m + 1, high)
    intervals += (batch.to(tl.int64) * tl.num_programs(0) + block) * 2
    tl.store(intervals, tl.minimum(low, high))
    tl.store(intervals + 1, high)


@triton.jit
def visit(interval, sinks: tl.constexpr):
    """Return where a block of queries begins to read sinks and the rest, and how many blocks of each it reads."""
    low, high = tl.load(interval + 2), tl.load(interval + 3)
    far_low, far_count = low, 0
    if sinks > 0:
        far_low = tl.load(interval)
        far_count = tl.load(interval + 1) - far_low
    return far_low, far_count, low, high - low
