"""Gradients, by the log-sum-exps of the forward kernels; sizes as in the package."""

from __future__ import annotations

import triton
import triton.language as tl

from memc.kernels.attention.triton.intervals import visit
from memc.kernels.softmax_triton import LOG2E, capped, load_rows, readable, slope_of_capped, store_rows


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
    far_low, far_count, low, count = visit(intervals + (batch * tl.num_programs(0) + block) * 4, sinks)
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
