"""Kernels of softmax attention over a state and a call: prompts, one token, and gradients.

Sizes: H query heads, G key-value heads, R = H / G; T queries (``tokens``) and N keys (``held``). ``positions`` and
``numbers [B,N]`` are int32: where each key stands in its sequence (-1: padding, or nothing in its slot), and which
sequence of the row it belongs to; ``query_positions`` and ``query_numbers [B,T]`` say so of the queries. Options are
those of the op, 0 for none; ``sinks`` are first tokens that stay readable past the window.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memc.kernels.softmax_triton import (
    LN2,
    LOG2E,
    capped,
    extend,
    load_rows,
    log_sum_exp,
    readable,
    slope_of_capped,
    store_rows,
)


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
def _visit(interval, sinks: tl.constexpr):
    """Return where a block of queries begins to read sinks and the rest, and how many blocks of each it reads."""
    low, high = tl.load(interval + 2), tl.load(interval + 3)
    far_low, far_count = low, 0
    if sinks > 0:
        far_low = tl.load(interval)
        far_count = tl.load(interval + 1) - far_low
    return far_low, far_count, low, high - low


@triton.jit(do_not_specialize=["tokens", "held"])
def prompt(
    out, lse, query, key, value, query_positions, query_numbers, positions, numbers, intervals, slopes,
    sink_logits, tokens, held,
    heads: tl.constexpr, groups: tl.constexpr, size: tl.constexpr, value_size: tl.constexpr,
    scale: tl.constexpr, softcap: tl.constexpr,
    window: tl.constexpr, chunk: tl.constexpr, prefix: tl.constexpr, sinks: tl.constexpr,
    has_slopes: tl.constexpr, has_sink_logits: tl.constexpr, precision: tl.constexpr,
    block_size: tl.constexpr, block_value: tl.constexpr, block_queries: tl.constexpr, block_keys: tl.constexpr,
):  # fmt: skip
    """Attend with a block of queries of one head: ``out [B,H,T,E]`` and the natural ``lse [B,H,T]``, 0 for padding.

    ``query [B,H,T,D]``, ``key [B,G,N,D]``, ``value [B,G,N,E]``. Grid: (blocks of queries, H, B).
    """
    # The last block reads most: it goes first, so that the short ones fill the gaps at the end.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    query_positions += batch * tokens
    query_numbers += batch * tokens
    positions += batch * held
    numbers += batch * held
    row = (batch * heads + head) * tokens
    group = (batch * groups + head // (heads // groups)) * held
    key += group * size
    value += group * value_size
    t = block * block_queries + tl.arange(0, block_queries)
    p = tl.load(query_positions + t, mask=t < tokens, other=-1)
    number = tl.load(query_numbers + t, mask=t < tokens, other=-1)
    q = load_rows(query + row * size, t, p >= 0, size, block_size)
    slope = tl.load(slopes + head).to(tl.float32) * LOG2E if has_slopes else 0.0
    top = tl.full([block_queries], float("-inf"), tl.float32)
    total = tl.zeros([block_queries], tl.float32)
    if has_sink_logits:
        top = tl.zeros([block_queries], tl.float32) + tl.load(sink_logits + head).to(tl.float32) * LOG2E
        total += 1.0
    acc = tl.zeros([block_queries, block_value], tl.float32)
    far_low, far_count, low, count = _visit(intervals + (batch * tl.num_programs(0) + block) * 4, sinks)
    for n in range(far_count + count):
        s = tl.where(n < far_count, far_low + n, low + n - far_count) * block_keys + tl.arange(0, block_keys)
        j = tl.load(positions + s, mask=s < held, other=-1)
        same = number[:, None] == tl.load(numbers + s, mask=s < held, other=-1)[None, :]
        seen = readable(p[:, None], j[None, :], same, window, chunk, prefix, sinks)
        k = load_rows(key, s, j >= 0, size, block_size)
        scores = capped(tl.dot(q, tl.trans(k), input_precision=precision), scale, softcap)
        if has_slopes:
            scores += slope * (j[None, :] - p[:, None]).to(tl.float32)
        scores = tl.where(seen, scores, float("-inf"))
        v = load_rows(value, s, j >= 0, value_size, block_value)
        top, total, acc = extend(top, total, acc, scores, v, precision)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    store_rows(out + row * value_size, t, acc, t < tokens, value_size, block_value)
    logarithm = tl.where((p >= 0) & (total > 0), log_sum_exp(top, total) * LN2, 0.0)
    tl.store(lse + row + t, logarithm, mask=t < tokens)


@triton.jit(do_not_specialize=["past", "share"])
def step(
    out, lse, next_key, next_value, next_positions, left_key, left_value, left_positions,
    query, key, value, positions, past_key, past_value, past_positions, slopes, sink_logits, past, share,
    heads: tl.constexpr, groups: tl.constexpr, size: tl.constexpr, value_size: tl.constexpr,
    scale: tl.constexpr, softcap: tl.constexpr,
    window: tl.constexpr, chunk: tl.constexpr, prefix: tl.constexpr, sinks: tl.constexpr,
    has_slopes: tl.constexpr, has_sink_logits: tl.constexpr,
    ring: tl.constexpr, in_place: tl.constexpr, partial: tl.constexpr,
    precision: tl.constexpr,
    block_rows: tl.constexpr, block_size: tl.constexpr, block_value: tl.constexpr, block_keys: tl.constexpr,
):  # fmt: skip
    """Attend with one token, the heads of a group at once, to a share of the state; copy that share to the next state.

    A state is read once, for the softmax and for the copy. It grows by the token, or with ``ring`` keeps its slots, the
    token takes one and what was there leaves; or ``in_place`` the next state is the state, its slots are positions, and
    the token is written to its own. Without ``partial`` one program has all of a group: ``out [B,H,E]`` and the natural
    ``lse [B,H]``; else each has ``share`` keys, and :func:`merge` joins ``out [B,H,splits,E]`` and ``lse [B,H,splits]``
    to base 2. ``positions`` and ``past_positions`` are int64. Grid: (splits, G, B).
    """
    split, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    repeat: tl.constexpr = heads // groups
    r = tl.arange(0, block_rows)
    d, e = tl.arange(0, block_size), tl.arange(0, block_value)
    token = batch * groups + group
    following = past if ring or in_place else past + 1
    past_key += token * past * size
    past_value += token * past * value_size
    past_positions += batch * past
    next_key += token * following * size
    next_value += token * following * value_size
    next_positions += batch * following
    p = tl.load(positions + batch).to(tl.int32)
    slot = past
    if ring:
        slot = tl.where(p < sinks, p, sinks + (p - sinks) % window)
    elif in_place:
        slot = p
    q = load_rows(query + (batch * heads + group * repeat) * size, r, r < repeat, size, block_size)
    slope = tl.zeros([block_rows], tl.float32)
    if has_slopes:
        slope += tl.load(slopes + group * repeat + r, mask=r < repeat, other=0.0).to(tl.float32) * LOG2E
    top = tl.full([block_rows], float("-inf"), tl.float32)
    total = tl.zeros([block_rows], tl.float32)
    acc = tl.zeros([block_rows, block_value], tl.float32)
    if split == 0:
        k = tl.load(key + token * size + d, mask=d < size, other=0.0)
        v = tl.load(value + token * value_size + e, mask=e < value_size, other=0.0)
        if ring:
            leaves = (p >= 0) & (p - window >= sinks)
            leaves = leaves & (tl.load(past_positions + slot, mask=leaves, other=-1) == p - window)
            gone_k = tl.load(past_key + slot * size + d, mask=d < tl.where(leaves, size, 0), other=0.0)
            gone_v = tl.load(past_value + slot * value_size + e, mask=e < tl.where(leaves, value_size, 0), other=0.0)
            tl.store(left_key + token * size + d, gone_k, mask=d < size)
            tl.store(left_value + token * value_size + e, gone_v, mask=e < value_size)
            if group == 0:
                tl.store(left_positions + batch, tl.where(leaves, p - window, -1).to(tl.int64))
        kept = p >= (0 if ring or in_place else -1)
        tl.store(next_key + slot * size + d, k, mask=d < tl.where(kept, size, 0))
        tl.store(next_value + slot * value_size + e, v, mask=e < tl.where(kept, value_size, 0))
        if group == 0:
            tl.store(next_positions + slot, p.to(tl.int64), mask=kept)
        # The token reads itself, whatever the options; padding reads nothing and may hold anything.
        alone = capped(tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1), scale, softcap)
        alone = tl.where(p >= 0, alone, float("-inf"))
        if has_sink_logits:
            sink = tl.load(sink_logits + group * repeat + r, mask=r < repeat, other=0.0).to(tl.float32) * LOG2E
            top = tl.maximum(alone, sink)
            total = tl.exp2(sink - top)
        else:
            top = tl.where(p >= 0, alone, 0.0)
        own = tl.exp2(alone - top)
        total += own
        acc += tl.where(p >= 0, own[:, None] * v.to(tl.float32)[None, :], 0.0)
        if not has_sink_logits:
            top = tl.where(p >= 0, top, float("-inf"))
    for start in range(split * share, tl.minimum(past, (split + 1) * share), block_keys):
        s = start + tl.arange(0, block_keys)
        there = s < past
        j = tl.load(past_positions + s, mask=there, other=-1).to(tl.int32)
        at = p + tl.zeros([block_keys], tl.int32)
        # A token at position 0 clears the state.
        j = tl.where(at == 0, -1, j)
        if in_place:
            # What lies in the token's own slot is about to be written, or has been.
            seen = readable(at, j, there & (s != slot), window, chunk, prefix, sinks)
            k = load_rows(past_key, s, seen, size, block_size)
            v = load_rows(past_value, s, seen, value_size, block_value)
            if group == 0:
                tl.store(next_positions + s, j.to(tl.int64), mask=there & (s != slot) & (at == 0))
        else:
            seen = readable(at, j, there, window, chunk, prefix, sinks)
            stays, kept = there, there
            if ring:
                stays = there & ((s != slot) | (at < 0))
                kept = there & (at != 0)
            k = load_rows(past_key, s, kept, size, block_size)
            v = load_rows(past_value, s, kept, value_size, block_value)
            store_rows(next_key, s, k, stays, size, block_size)
            store_rows(next_value, s, v, stays, value_size, block_value)
            if group == 0:
                tl.store(next_positions + s, j.to(tl.int64), mask=stays)
        k = tl.where(seen[:, None], k, 0.0)
        v = tl.where(seen[:, None], v, 0.0)
        scores = capped(tl.dot(q, tl.trans(k), input_precision=precision), scale, softcap)
        if has_slopes:
            scores += slope[:, None] * (j - p).to(tl.float32)[None, :]
        scores = tl.where(seen[None, :], scores, float("-inf"))
        top, total, acc = extend(top, total, acc, scores, v, precision)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    row = batch * heads + group * repeat + r
    logarithm = log_sum_exp(top, total)
    if partial:
        row = row * tl.num_programs(0) + split
    else:
        logarithm = tl.where((p >= 0) & (total > 0), logarithm * LN2, 0.0)
    store_rows(out, row, acc, r < repeat, value_size, block_value)
    tl.store(lse + row, logarithm, mask=r < repeat)


@triton.jit(do_not_specialize=["splits"])
def merge(
    out, lse, parts, part_lse, positions, splits,
    heads: tl.constexpr, value_size: tl.constexpr, block_value: tl.constexpr, block_splits: tl.constexpr,
):  # fmt: skip
    """Join the shares of :func:`step`: ``parts [B,H,splits,E]`` and ``part_lse [B,H,splits]`` to base 2.

    Gives ``out [B,H,E]`` and the natural ``lse [B,H]``, 0 for padding. Grid: (H, B).
    """
    head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = batch * heads + head
    e = tl.arange(0, block_value)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([block_value], tl.float32)
    for start in range(0, splits, block_splits):
        s = start + tl.arange(0, block_splits)
        logarithm = tl.load(part_lse + row * splits + s, mask=s < splits, other=float("-inf"))
        part = load_rows(parts + row * splits * value_size, s, s < splits, value_size, block_value)
        higher = tl.maximum(top, tl.max(logarithm, 0))
        origin = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logarithm - origin)
        shrink = tl.exp2(top - origin)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(weights[:, None] * part, 0)
        top = higher
    acc = acc / tl.where(total > 0, total, 1.0)
    tl.store(out + row * value_size + e, acc.to(out.dtype.element_ty), mask=e < value_size)
    read = (tl.load(positions + batch) >= 0) & (total > 0)
    tl.store(lse + row + tl.arange(0, 1), tl.where(read, log_sum_exp(top, total) * LN2, 0.0))


@triton.jit(do_not_specialize=["tokens", "held"])
def query_gradient(
    grad_query, distances, grad_out, common, lse, query, key, value, query_positions,
    query_numbers, positions, numbers, intervals, slopes, tokens, held,
    heads: tl.constexpr, groups: tl.constexpr, size: tl.constexpr, value_size: tl.constexpr,
    scale: tl.constexpr, softcap: tl.constexpr,
    window: tl.constexpr, chunk: tl.constexpr, prefix: tl.constexpr, sinks: tl.constexpr,
    has_slopes: tl.constexpr, precision: tl.constexpr,
    block_size: tl.constexpr, block_value: tl.constexpr, block_queries: tl.constexpr, block_keys: tl.constexpr,
):  # fmt: skip
    """Make the gradient ``[B,H,T,D]`` of the queries and, with slopes, ``distances [B,H,T]`` = sum ds (j - p).

    ``common [B,H,T]`` is d lse - D, D = do.o; ``lse`` is natural. Grid: (blocks of queries, H, B).
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    query_positions += batch * tokens
    query_numbers += batch * tokens
    positions += batch * held
    numbers += batch * held
    row = (batch * heads + head) * tokens
    group = (batch * groups + head // (heads // groups)) * held
    key += group * size
    value += group * value_size
    t = block * block_queries + tl.arange(0, block_queries)
    p = tl.load(query_positions + t, mask=t < tokens, other=-1)
    number = tl.load(query_numbers + t, mask=t < tokens, other=-1)
    q = load_rows(query + row * size, t, p >= 0, size, block_size)
    grad = load_rows(grad_out + row * value_size, t, p >= 0, value_size, block_value)
    shared = tl.load(common + row + t, mask=p >= 0, other=0.0)
    logarithm = tl.load(lse + row + t, mask=p >= 0, other=0.0) * LOG2E
    slope = tl.load(slopes + head).to(tl.float32) * LOG2E if has_slopes else 0.0
    far = tl.zeros([block_queries], tl.float32)
    acc = tl.zeros([block_queries, block_size], tl.float32)
    far_low, far_count, low, count = _visit(intervals + (batch * tl.num_programs(0) + block) * 4, sinks)
    for n in range(far_count + count):
        s = tl.where(n < far_count, far_low + n, low + n - far_count) * block_keys + tl.arange(0, block_keys)
        j = tl.load(positions + s, mask=s < held, other=-1)
        same = number[:, None] == tl.load(numbers + s, mask=s < held, other=-1)[None, :]
        seen = readable(p[:, None], j[None, :], same, window, chunk, prefix, sinks)
        k = load_rows(key, s, j >= 0, size, block_size)
        v = load_rows(value, s, j >= 0, value_size, block_value)
        plain = capped(tl.dot(q, tl.trans(k), input_precision=precision), scale, softcap)
        scores = plain
        if has_slopes:
            scores += slope * (j[None, :] - p[:, None]).to(tl.float32)
        weights = tl.exp2(tl.where(seen, scores - logarithm[:, None], float("-inf")))
        grad_scores = weights * (tl.dot(grad, tl.trans(v), input_precision=precision) + shared[:, None])
        if has_slopes:
            far += tl.sum(grad_scores * (j[None, :] - p[:, None]).to(tl.float32), 1)
        raw = grad_scores * slope_of_capped(plain, scale, softcap)
        acc = tl.dot(raw.to(k.dtype), k, acc, input_precision=precision)
    store_rows(grad_query + row * size, t, acc, t < tokens, size, block_size)
    if has_slopes:
        tl.store(distances + row + t, far, mask=t < tokens)


@triton.jit(do_not_specialize=["tokens", "held"])
def key_gradient(
    grad_key, grad_value, copied_key, copied_value, grad_out, common, lse,
    query, key, value, query_positions,
    query_numbers, positions, numbers, intervals, slopes, tokens, held,
    heads: tl.constexpr, groups: tl.constexpr, size: tl.constexpr, value_size: tl.constexpr,
    scale: tl.constexpr, softcap: tl.constexpr,
    window: tl.constexpr, chunk: tl.constexpr, prefix: tl.constexpr, sinks: tl.constexpr,
    has_slopes: tl.constexpr, precision: tl.constexpr,
    block_size: tl.constexpr, block_value: tl.constexpr, block_queries: tl.constexpr, block_keys: tl.constexpr,
):  # fmt: skip
    """Make the gradients ``[B,G,N,D]`` and ``[B,G,N,E]`` of keys and values, those of their copies added.

    ``common [B,H,T]`` is d lse - D, D = do.o; ``lse`` is natural. Grid: (blocks of keys, G, B).
    """
    block, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    repeat: tl.constexpr = heads // groups
    query_positions += batch * tokens
    query_numbers += batch * tokens
    positions += batch * held
    numbers += batch * held
    own = (batch * groups + group) * held
    s = block * block_keys + tl.arange(0, block_keys)
    j = tl.load(positions + s, mask=s < held, other=-1)
    number = tl.load(numbers + s, mask=s < held, other=-1)
    k = load_rows(key + own * size, s, j >= 0, size, block_size)
    v = load_rows(value + own * value_size, s, j >= 0, value_size, block_value)
    acc_k = load_rows(copied_key + own * size, s, s < held, size, block_size).to(tl.float32)
    acc_v = load_rows(copied_value + own * value_size, s, s < held, value_size, block_value).to(tl.float32)
    interval = intervals + (batch * tl.num_programs(0) + block) * 2
    low, count = tl.load(interval), tl.load(interval + 1) - tl.load(interval)
    # One loop over heads and blocks of queries, so that it is pipelined across heads too.
    for n in range(repeat * count):
        head = group * repeat + n // count
        row = (batch * heads + head) * tokens
        t = (low + n % count) * block_queries + tl.arange(0, block_queries)
        p = tl.load(query_positions + t, mask=t < tokens, other=-1)
        same = number[:, None] == tl.load(query_numbers + t, mask=t < tokens, other=-1)[None, :]
        seen = readable(p[None, :], j[:, None], same, window, chunk, prefix, sinks)
        q = load_rows(query + row * size, t, p >= 0, size, block_size)
        grad = load_rows(grad_out + row * value_size, t, p >= 0, value_size, block_value)
        shared = tl.load(common + row + t, mask=p >= 0, other=0.0)
        logarithm = tl.load(lse + row + t, mask=p >= 0, other=0.0) * LOG2E
        plain = capped(tl.dot(k, tl.trans(q), input_precision=precision), scale, softcap)
        scores = plain
        if has_slopes:
            slope = tl.load(slopes + head).to(tl.float32) * LOG2E
            scores += slope * (j[:, None] - p[None, :]).to(tl.float32)
        weights = tl.exp2(tl.where(seen, scores - logarithm[None, :], float("-inf")))
        acc_v = tl.dot(weights.to(grad.dtype), grad, acc_v, input_precision=precision)
        grad_scores = weights * (tl.dot(v, tl.trans(grad), input_precision=precision) + shared[None, :])
        raw = grad_scores * slope_of_capped(plain, scale, softcap)
        acc_k = tl.dot(raw.to(q.dtype), q, acc_k, input_precision=precision)
    store_rows(grad_key + own * size, s, acc_k, s < held, size, block_size)
    store_rows(grad_value + own * value_size, s, acc_v, s < held, value_size, block_value)
