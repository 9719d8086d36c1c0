"""Kernels of attention in few bits: tokens and pages put into codes, candidates ranked, and attention through codes.

Sizes: T tokens (``tokens``), each of which chooses for itself, H query heads, G key-value heads; P pages (``count``) of
``page`` tokens, of which slot i of page n has the key at position n page + i; N slots of values (``slots``), of which
slot p has the value at p. What is read as it is lies in X rows (``exact``), the tails and then the call, of which the
token at position j is at ``places [B,L]`` (``length``; int32, -1: none).
"""

from __future__ import annotations

import triton
import triton.language as tl

from memc.kernels.softmax_triton import capped, extend, load_rows, store_rows
from memc.kernels.sparse_attention.triton import begin_share, load_queries, store_share

# Added and taken away again it leaves a float32 of up to 2^22 without its fraction, halves to even.
TO_WHOLE = tl.constexpr(12582912.0)


@triton.jit
def _level(x, top, low, bits: tl.constexpr):
    """Return the number of the nearest of 2^bits levels from ``low`` to ``top``."""
    highest: tl.constexpr = (1 << bits) - 1
    step = tl.div_rn(top - low, tl.full(top.shape, highest, tl.float32))
    level = tl.div_rn(x - low, tl.where(step > 0, step, 1.0) + tl.zeros(x.shape, tl.float32)) + TO_WHOLE - TO_WHOLE
    return tl.minimum(tl.maximum(level, 0.0), float(highest)).to(tl.int32)


@triton.jit
def _store_codes(codes, valid, first, second, bits: tl.constexpr):
    """Store levels as bytes: with 4 bits ``first`` in the low halves, ``second`` in the high."""
    if bits == 4:
        first += second * 16
    tl.store(codes, first.to(tl.uint8), mask=valid)


@triton.jit
def _decoded(codes, row, valid, size: tl.constexpr, bytes_: tl.constexpr, bits: tl.constexpr, block: tl.constexpr):
    """Load the levels ``[M, block]`` of rows of codes ``[., bytes_]``, in float32."""
    c = tl.arange(0, block)
    mask = valid[:, None] & (c < size)[None, :]
    raw = tl.load(codes + row[:, None] * bytes_ + (c % bytes_)[None, :], mask=mask, other=0).to(tl.int32)
    if bits == 4:
        raw = (raw >> tl.where(c >= bytes_, 4, 0)[None, :]) & 15
    return raw.to(tl.float32)


@triton.jit
def _keys(codes, pages, row, j, valid, count, size: tl.constexpr, page: tl.constexpr, bits: tl.constexpr,
          key_bytes: tl.constexpr, block: tl.constexpr):  # fmt: skip
    """Read the keys ``[M, block]`` at positions ``j`` through their codes; ``row`` is the group's of the batch."""
    c = tl.arange(0, block)
    levels = _decoded(codes + row * count * page * key_bytes, j, valid, size, key_bytes, bits, block)
    ends = pages + (row * count + j // page)[:, None] * (2 * size) + c[None, :]
    mask = valid[:, None] & (c < size)[None, :]
    low = tl.load(ends + size, mask=mask, other=0.0).to(tl.float32)
    top = tl.load(ends, mask=mask, other=0.0).to(tl.float32)
    return low + levels * ((top - low) * (1.0 / ((1 << bits) - 1)))


@triton.jit
def _values(codes, ranges, row, j, valid, slots, size: tl.constexpr, bits: tl.constexpr,
            value_bytes: tl.constexpr, block: tl.constexpr):  # fmt: skip
    """Read the values ``[M, block]`` at positions ``j`` through their codes; 0 where not ``valid``."""
    levels = _decoded(codes + row * slots * value_bytes, j, valid, size, value_bytes, bits, block)
    ends = ranges + (row * slots + j) * 2
    top = tl.load(ends, mask=valid, other=0.0).to(tl.float32)
    low = tl.load(ends + 1, mask=valid, other=0.0).to(tl.float32)
    inside = (tl.arange(0, block) < size)[None, :]
    return tl.where(inside, low[:, None] + levels * ((top - low) * (1.0 / ((1 << bits) - 1)))[:, None], 0.0)


@triton.jit(do_not_specialize=["tokens", "slots", "exact", "length", "count"])
def hold(
    codes, value_codes, pages, ranges, key_tail, value_tail, key, value, places, positions, last,
    tokens, slots, exact, length, count,
    groups: tl.constexpr, size: tl.constexpr, value_size: tl.constexpr, page: tl.constexpr, bits: tl.constexpr,
    key_bytes: tl.constexpr, value_bytes: tl.constexpr, block_page: tl.constexpr, block_size: tl.constexpr,
    block_value: tl.constexpr, block_values: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """Put a token into the state, and the page that it completes, if it does. Grid: (T, G, B).

    ``codes [B,G,P,page,.]``, ``pages [B,G,P,2D]``, ``value_codes [B,G,N,.]``, ``ranges [B,G,N,2]``, the tails
    ``[B,G,page,.]``; ``key [B,G,X,D]`` and ``value [B,G,X,E]`` are those read as they are, ``last [B]`` the highest of
    the ``positions [B,T]``.
    """
    t, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = batch * groups + group
    p = tl.load(positions + batch * tokens + t).to(tl.int32)
    end = tl.load(last + batch).to(tl.int32)
    key += row * exact * size
    value += row * exact * value_size
    if p >= 0:
        # Channels whose codes are in the high halves of the bytes.
        key_above: tl.constexpr = size - key_bytes if bits == 4 else 0
        value_above: tl.constexpr = value_size - value_bytes if bits == 4 else 0
        e = tl.arange(0, block_values)
        high = e < value_above
        own = value + (page + t) * value_size + e
        first = tl.load(own, mask=e < value_bytes, other=0.0).to(tl.float32)
        second = tl.load(own + value_bytes, mask=high, other=0.0).to(tl.float32)
        top = tl.max(tl.where(e < value_bytes, first, float("-inf")), 0)
        low = tl.min(tl.where(e < value_bytes, first, float("inf")), 0)
        top = tl.maximum(top, tl.max(tl.where(high, second, float("-inf")), 0))
        low = tl.minimum(low, tl.min(tl.where(high, second, float("inf")), 0))
        tl.store(ranges + (row * slots + p) * 2, top.to(ranges.dtype.element_ty))
        tl.store(ranges + (row * slots + p) * 2 + 1, low.to(ranges.dtype.element_ty))
        top, low = top + tl.zeros(first.shape, tl.float32), low + tl.zeros(first.shape, tl.float32)
        upper = tl.where(high, _level(second, top, low, bits), 0)
        _store_codes(value_codes + (row * slots + p) * value_bytes + e, e < value_bytes, _level(first, top, low, bits),
                     upper, bits)  # fmt: skip
        d = tl.arange(0, block_size)
        if (p // page == end // page) & ((end + 1) % page != 0):
            k = tl.load(key + (page + t) * size + d, mask=d < size, other=0.0)
            tl.store(key_tail + (row * page + p % page) * size + d, k, mask=d < size)
            tail = value_tail + (row * page + p % page) * value_size + e
            kind = value_tail.dtype.element_ty
            tl.store(tail, first.to(kind), mask=e < value_bytes)
            tl.store(tail + value_bytes, second.to(kind), mask=high)
        i = tl.arange(0, block_page)
        if p == end:
            # Behind the last token, or everywhere when that completes its page, the tails hold nothing.
            begun = (p + 1) % page + tl.zeros([block_page], tl.int32)
            free = (i < page) & (i >= begun)
            none = tl.zeros([block_page, block_size], tl.float32)
            store_rows(key_tail + row * page * size, i, none, free, size, block_size)
            none = tl.zeros([block_page, block_value], tl.float32)
            store_rows(value_tail + row * page * value_size, i, none, free, value_size, block_value)
        if (p + 1) % page == 0:
            n = p // page
            place = tl.load(places + batch * length + n * page + i, mask=i < page, other=-1)
            there = (place >= 0)[:, None]
            ends = pages + (row * count + n) * (2 * size)
            for start in range(0, key_bytes, block_channels):
                c = start + tl.arange(0, block_channels)
                inside, above = c < key_bytes, c < key_above
                rows = key + place[:, None] * size + c[None, :]
                x = tl.load(rows, mask=there & inside[None, :], other=0.0).to(tl.float32)
                y = tl.load(rows + key_bytes, mask=there & above[None, :], other=0.0).to(tl.float32)
                levels = _page_levels(ends, x, there, inside, c, size, bits)
                higher = tl.zeros(levels.shape, tl.int32)
                if bits == 4:
                    higher = _page_levels(ends, y, there, above, c + key_bytes, size, bits)
                at = codes + ((row * count + n) * page + i)[:, None] * key_bytes + c[None, :]
                _store_codes(at, there & inside[None, :], levels, tl.where(above[None, :], higher, 0), bits)


@triton.jit
def _page_levels(ends, x, there, inside, c, size: tl.constexpr, bits: tl.constexpr):
    """Store largest and smallest of each channel ``c`` of a page's keys ``x [M,C]``, and return their levels."""
    top = tl.max(tl.where(there, x, float("-inf")), 0)
    low = tl.min(tl.where(there, x, float("inf")), 0)
    tl.store(ends + c, top.to(ends.dtype.element_ty), mask=inside)
    tl.store(ends + size + c, low.to(ends.dtype.element_ty), mask=inside)
    wide = tl.zeros(x.shape, tl.float32)
    return _level(x, wide + top[None, :], wide + low[None, :], bits)


@triton.jit(do_not_specialize=["count", "tokens", "listed"])
def rank(
    scores, query, candidates, positions, codes, pages, count, tokens, listed,
    heads: tl.constexpr, groups: tl.constexpr, size: tl.constexpr, scale: tl.constexpr,
    sinks: tl.constexpr, window: tl.constexpr, dense_below: tl.constexpr, precision: tl.constexpr,
    page: tl.constexpr, bits: tl.constexpr, key_bytes: tl.constexpr,
    block_rows: tl.constexpr, block_size: tl.constexpr, block_tokens: tl.constexpr,
):  # fmt: skip
    """Score ``candidates [B,G,T,K]`` (positions, -1: none) by q.k as it is read: ``scores [B,G,T,K]``.

    inf for what must stay, among it the query's own page, which has no codes yet. Grid: (blocks of candidates times T,
    G, B).
    """
    group, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) % tokens
    row = batch * groups + group
    p = tl.load(positions + batch * tokens + t).to(tl.int32)
    q, real = load_queries(query, t, tokens, scale, heads, groups, size, block_rows, block_size)
    own = (row * tokens + t) * listed
    i = tl.program_id(0) // tokens * block_tokens + tl.arange(0, block_tokens)
    j = tl.load(candidates + own + i, mask=i < listed, other=-1)
    at = p + tl.zeros([block_tokens], tl.int32)
    must = (j < sinks) | (at - j < window) | (at < dense_below) | (j // page == at // page)
    k = _keys(codes, pages, row, j, (j >= 0) & (j // page < at // page), count, size, page, bits, key_bytes, block_size)
    found = tl.dot(q, tl.trans(k), input_precision=precision)
    best = tl.max(tl.where(real[:, None], found, float("-inf")), 0)
    best = tl.where(j >= 0, tl.where(must, float("inf"), best), float("-inf"))
    tl.store(scores + own + i, best, mask=i < listed)


@triton.jit(do_not_specialize=["count", "slots", "exact", "length", "tokens", "listed", "share"])
def attend(
    parts, part_lse, query, chosen, sink_logits, codes, pages, value_codes, ranges, key, value, places, positions,
    count, slots, exact, length, tokens, listed, share,
    heads: tl.constexpr, groups: tl.constexpr, size: tl.constexpr, value_size: tl.constexpr,
    scale: tl.constexpr, softcap: tl.constexpr, has_sink_logits: tl.constexpr, precision: tl.constexpr,
    page: tl.constexpr, bits: tl.constexpr, key_bytes: tl.constexpr, value_bytes: tl.constexpr,
    block_rows: tl.constexpr, block_size: tl.constexpr, block_value: tl.constexpr, block_keys: tl.constexpr,
):  # fmt: skip
    """Attend to a share of the tokens at ``chosen [B,G,T,K]`` (positions, -1: none) through their codes.

    The query's own page is not among them: the first share reads it as it is. ``parts [B,T,H,splits,E]`` and
    ``part_lse`` as in the kernel of ``memc::sparse_attention``. Grid: (splits times T, G, B).
    """
    group, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, split, splits = tl.program_id(0) % tokens, tl.program_id(0) // tokens, tl.num_programs(0) // tokens
    repeat: tl.constexpr = heads // groups
    r = tl.arange(0, block_rows)
    real = r < repeat
    row = batch * groups + group
    p = tl.load(positions + batch * tokens + t).to(tl.int32)
    q, real = load_queries(query, t, tokens, 1.0, heads, groups, size, block_rows, block_size)
    top, total = begin_share(sink_logits, split, group * repeat, real, has_sink_logits, block_rows)
    acc = tl.zeros([block_rows, block_value], tl.float32)
    for start in range(split * share, tl.minimum(listed, (split + 1) * share), block_keys):
        i = start + tl.arange(0, block_keys)
        j = tl.load(chosen + (row * tokens + t) * listed + i, mask=i < listed, other=-1)
        k = _keys(codes, pages, row, j, j >= 0, count, size, page, bits, key_bytes, block_size)
        scores = capped(tl.dot(q, tl.trans(k), input_precision=precision), scale, softcap)
        scores = tl.where((j >= 0)[None, :], scores, float("-inf"))
        v = _values(value_codes, ranges, row, j, j >= 0, slots, value_size, bits, value_bytes, block_value)
        top, total, acc = extend(top, total, acc, scores, v, precision)
    # A share of none of the own page's tokens for the others, so that there is one loop for all.
    first = tl.where((split == 0) & (p >= 0), p // page * page, p + 1)
    for start in range(first, p + 1, block_keys):
        j = start + tl.arange(0, block_keys)
        place = tl.load(places + batch * length + j, mask=j <= p, other=-1)
        k = load_rows(key + row * exact * size, place, place >= 0, size, block_size).to(tl.float32)
        v = load_rows(value + row * exact * value_size, place, place >= 0, value_size, block_value).to(tl.float32)
        scores = capped(tl.dot(q, tl.trans(k), input_precision=precision), scale, softcap)
        scores = tl.where((place >= 0)[None, :], scores, float("-inf"))
        top, total, acc = extend(top, total, acc, scores, v, precision)
    out = ((batch * tokens + t) * heads + group * repeat + r) * splits + split
    store_share(parts, part_lse, out, real, top, total, acc, value_size, block_value)
