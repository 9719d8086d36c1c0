"""Prompts: a block of queries against the keys that it may read; sizes as in the package."""

from __future__ import annotations

import triton
import triton.language as tl

from memc.kernels.attention.triton.intervals import visit
from memc.kernels.softmax_triton import LN2, LOG2E, LOWEST, capped, extend, load_rows, log_sum_exp, readable, store_rows


@triton.jit(do_not_specialize=["tokens", "held", "bias_batch", "bias_head", "bias_query", "bias_key"])
def prompt(
    out, lse, query, key, value, query_positions, query_numbers, positions, numbers, intervals, slopes,
    sink_logits, bias, tokens, held, bias_batch, bias_head, bias_query, bias_key,
    heads: tl.constexpr, groups: tl.constexpr, size: tl.constexpr, value_size: tl.constexpr,
    scale: tl.constexpr, softcap: tl.constexpr,
    window: tl.constexpr, chunk: tl.constexpr, prefix: tl.constexpr, sinks: tl.constexpr,
    has_slopes: tl.constexpr, has_sink_logits: tl.constexpr, has_bias: tl.constexpr, precision: tl.constexpr,
    block_size: tl.constexpr, block_value: tl.constexpr, block_queries: tl.constexpr, block_keys: tl.constexpr,
):  # fmt: skip
    """Attend with a block of queries of one head: ``out [B,H,T,E]`` and the natural ``lse [B,H,T]``, 0 for padding.

    ``query [B,H,T,D]``, ``key [B,G,N,D]``, ``value [B,G,N,E]``, ``bias [B,H,T,N]`` by its strides, 0 where all
    share it. Grid: (blocks of queries, H, B).
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
    if has_bias:
        bias += batch * bias_batch + head.to(tl.int64) * bias_head
        bias_rows = bias + t[:, None].to(tl.int64) * bias_query
    top = tl.full([block_queries], float("-inf"), tl.float32)
    total = tl.zeros([block_queries], tl.float32)
    if has_sink_logits:
        top = tl.zeros([block_queries], tl.float32) + tl.load(sink_logits + head).to(tl.float32) * LOG2E
        total += 1.0
    acc = tl.zeros([block_queries, block_value], tl.float32)
    far_low, far_count, low, count = visit(intervals + (batch * tl.num_programs(0) + block) * 4, sinks)
    for n in range(far_count + count):
        s = tl.where(n < far_count, far_low + n, low + n - far_count) * block_keys + tl.arange(0, block_keys)
        j = tl.load(positions + s, mask=s < held, other=-1)
        same = number[:, None] == tl.load(numbers + s, mask=s < held, other=-1)[None, :]
        seen = readable(p[:, None], j[None, :], same, window, chunk, prefix, sinks)
        k = load_rows(key, s, j >= 0, size, block_size)
        scores = capped(tl.dot(q, tl.trans(k), input_precision=precision), scale, softcap)
        if has_slopes:
            scores += slope * (j[None, :] - p[:, None]).to(tl.float32)
        if has_bias:
            there = (t < tokens)[:, None] & (s < held)[None, :]
            added = tl.load(bias_rows + s[None, :].to(tl.int64) * bias_key, mask=there, other=0.0).to(tl.float32)
            # A mask of the lowest number, not of -inf, leaves a row that is all masked its mean.
            scores += tl.where(added == float("-inf"), added, tl.maximum(added, LOWEST / LOG2E) * LOG2E)
        scores = tl.where(seen, scores, float("-inf"))
        v = load_rows(value, s, j >= 0, value_size, block_value)
        top, total, acc = extend(top, total, acc, scores, v, precision)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    store_rows(out + row * value_size, t, acc, t < tokens, value_size, block_value)
    logarithm = tl.where((p >= 0) & (total > 0), log_sum_exp(top, total) * LN2, 0.0)
    tl.store(lse + row + t, logarithm, mask=t < tokens)
