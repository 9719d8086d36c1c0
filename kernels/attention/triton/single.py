"""One token: shares of the keys, and their join; sizes as in the package."""

from __future__ import annotations

import triton
import triton.language as tl

from memc.kernels.softmax_triton import LN2, LOG2E, capped, extend, load_rows, log_sum_exp, readable, store_rows


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
