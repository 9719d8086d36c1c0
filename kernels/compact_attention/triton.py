"""Kernels of compact attention: what tokens add to their pages, pages described, and attention by places.

Sizes: T tokens (``tokens``), each of which chooses for itself, H query heads, G key-value heads, N slots (``held``), of
which slot p has the token at position p, and P pages (``count``) of ``page`` tokens, each with a description and the
sum that it is made from behind it: ``pages [B,G,P,2D]``. What scores pages is a kernel of ``memc::sparse_attention``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memc.kernels.rotary.triton import turned
from memc.kernels.softmax_triton import capped, extend, load_rows
from memc.kernels.sparse_attention.triton import begin_share, clear, store_share


@triton.jit(do_not_specialize=["tokens", "count"])
def gather(
    pages, brought, positions, last, tokens, count,
    heads: tl.constexpr, groups: tl.constexpr, size: tl.constexpr, page: tl.constexpr,
    block_size: tl.constexpr, block_described: tl.constexpr, block_tokens: tl.constexpr,
):  # fmt: skip
    """Add what tokens bring, ``brought [B,H,T,D]`` averaged over a group's heads, to the sums of their pages.

    Of the tokens of one page the last adds them all, in order; ``last [B]`` is the highest of ``positions [B,T]``. A
    token that is alone in its call and starts a sequence first sets all pages to 0. Grid: (T, G, B).
    """
    end, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    p = tl.load(positions + batch * tokens + end).to(tl.int32)
    pages += (batch * groups + group) * count * (2 * size)
    if tokens == 1 and p == 0:
        clear(pages, count * (2 * size), block_described)
    if p >= 0 and ((p + 1) % page == 0 or p == tl.load(last + batch)):
        repeat: tl.constexpr = heads // groups
        c = tl.arange(0, block_size)
        total = tl.zeros([block_size], tl.float32)
        for start in range(0, end + 1, block_tokens):
            t = start + tl.arange(0, block_tokens)
            at = tl.load(positions + batch * tokens + t, mask=t <= end, other=-1).to(tl.int32)
            mine = (at >= 0) & (at // page == p // page)
            if tl.max(mine.to(tl.int32), 0) > 0:
                for head in range(repeat):
                    own = brought + (batch * heads + group * repeat + head) * tokens * size
                    total += tl.sum(load_rows(own, t, mine, size, block_size).to(tl.float32), 0)
        place = pages + (p // page) * (2 * size) + size + c
        begun = tl.where(p > 0, tl.load(place, mask=c < size, other=0.0), 0.0)
        tl.store(place, begun + total / repeat, mask=c < size)


@triton.jit(do_not_specialize=["tokens", "held", "count"])
def describe(
    pages, key, positions, tokens, held, count,
    groups: tl.constexpr, size: tl.constexpr, scale: tl.constexpr, page: tl.constexpr, follows: tl.constexpr,
    representatives: tl.constexpr, block_page: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """Describe the page that can be once a token has come, if one can, from ``key [B,G,N,D]``. Grid: (T, G, B).

    That is the page which the token completes, or the one which so many pages ``follows``. The description is the mean
    of its ``representatives``, the keys of the highest products with the sums of those behind it; with none, all keys
    by the softmax of their products with its own.
    """
    group, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    p = tl.load(positions + batch * tokens + tl.program_id(0)).to(tl.int32)
    n = (p + 1) // page - 1 - follows
    if (p + 1) % page == 0 and n >= 0:
        own = pages + ((batch * groups + group) * count + n) * (2 * size)
        keys = key + ((batch * groups + group) * held + n * page) * size
        i = tl.arange(0, block_page)
        scores = tl.zeros([block_page], tl.float32)
        for start in range(0, size, block_channels):
            c = start + tl.arange(0, block_channels)
            if representatives > 0:
                subject = tl.zeros([block_channels], tl.float32)
                for behind in range(1, follows + 1):
                    subject += tl.load(own + behind * (2 * size) + size + c, mask=c < size, other=0.0)
            else:
                subject = tl.load(own + size + c, mask=c < size, other=0.0) / page
            scores += tl.sum(_channels(keys, i, i < page, c, c < size, size) * subject[None, :], 1)
        if representatives > 0:
            weights = tl.zeros([block_page], tl.float32)
            for _ in tl.static_range(representatives):
                # Of equal ones the first.
                left = tl.where((i < page) & (weights == 0), scores, float("-inf"))
                taken = tl.min(tl.where(left == tl.max(left, 0), i, block_page), 0)
                weights = tl.where(i == taken, 1.0 / representatives, weights)
        else:
            scores = tl.where(i < page, scores * scale, float("-inf"))
            weights = tl.exp(scores - tl.max(scores, 0))
            weights = weights / tl.sum(weights, 0)
        for start in range(0, size, block_channels):
            c = start + tl.arange(0, block_channels)
            k = _channels(keys, i, i < page, c, c < size, size)
            tl.store(own + c, tl.sum(k * weights[:, None], 0), mask=c < size)


@triton.jit(do_not_specialize=["held", "tokens", "listed", "share"])
def attend(
    parts, part_lse, query, chosen, sink_logits, key, value, positions, inv_freq, held, tokens, listed, share,
    heads: tl.constexpr, groups: tl.constexpr, size: tl.constexpr, value_size: tl.constexpr,
    scale: tl.constexpr, softcap: tl.constexpr, has_sink_logits: tl.constexpr, precision: tl.constexpr,
    page: tl.constexpr, window: tl.constexpr, pairs: tl.constexpr, interleaved: tl.constexpr, scaling: tl.constexpr,
    block_rows: tl.constexpr, block_size: tl.constexpr, block_value: tl.constexpr, block_keys: tl.constexpr,
):  # fmt: skip
    """Attend to a share of the ``listed`` tokens of the pages ``chosen [B,G,T,K]``: -1 for none, then in order of time.

    Each key is rotated back by how far it is read away, which is as good as rotating the query and it: at its true
    distance, no further than ``window``, or by its place among what is read, without one. The query's own page is the
    last. ``parts [B,T,H,splits,E]`` and ``part_lse`` as in the kernel of ``memc::sparse_attention``. Grid: (splits
    times T, G, B).
    """
    group, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, split, splits = tl.program_id(0) % tokens, tl.program_id(0) // tokens, tl.num_programs(0) // tokens
    repeat: tl.constexpr = heads // groups
    r = tl.arange(0, block_rows)
    real = r < repeat
    row = batch * groups + group
    p = tl.load(positions + batch * tokens + t).to(tl.int32)
    key += row * held * size
    asks = query + ((batch * heads + group * repeat) * tokens + t) * size
    # Channels are multiplied in blocks, so that large heads need few more registers.
    block: tl.constexpr = 32 if block_size > 64 else 16
    c = tl.arange(0, block)
    top, total = begin_share(sink_logits, split, group * repeat, real, has_sink_logits, block_rows)
    acc = tl.zeros([block_rows, block_value], tl.float32)
    for start in range(split * share, tl.minimum(listed, (split + 1) * share), block_keys):
        i = start + tl.arange(0, block_keys)
        n = tl.load(chosen + (row * tokens + t) * (listed // page) + i // page, mask=i < listed, other=-1).to(tl.int32)
        j = n * page + i % page
        read = (n >= 0) & (j <= p)
        away = tl.minimum(p - j, window) if window > 0 else listed - page + p % page - i
        products = tl.zeros([block_rows, block_keys], tl.float32)
        for pair in range(0, pairs, block):
            there = pair + c < pairs
            first = (2 if interleaved else 1) * (pair + c)
            second = first + (1 if interleaved else pairs)
            frequency = tl.load(inv_freq + pair + c, mask=there, other=0.0).to(tl.float32)
            cosine, sine = turned(away.to(tl.float32)[:, None] * frequency[None, :])
            # Query and key are both to be scaled: here it is the key alone, twice.
            cosine, sine = cosine * (scaling * scaling), sine * (scaling * scaling)
            a, b = _channels(key, j, read, first, there, size), _channels(key, j, read, second, there, size)
            q = _channels(asks, r * tokens, real, first, there, size)
            products = tl.dot(q, tl.trans(a * cosine + b * sine), products, input_precision=precision)
            q = _channels(asks, r * tokens, real, second, there, size)
            products = tl.dot(q, tl.trans(b * cosine - a * sine), products, input_precision=precision)
        for channel in range(2 * pairs, size, block):
            inside = channel + c < size
            q = _channels(asks, r * tokens, real, channel + c, inside, size)
            k = _channels(key, j, read, channel + c, inside, size)
            products = tl.dot(q, tl.trans(k), products, input_precision=precision)
        scores = tl.where(read[None, :], capped(products, scale, softcap), float("-inf"))
        v = load_rows(value + row * held * value_size, j, read, value_size, block_value).to(tl.float32)
        top, total, acc = extend(top, total, acc, scores, v, precision)
    out = ((batch * tokens + t) * heads + group * repeat + r) * splits + split
    store_share(parts, part_lse, out, real, top, total, acc, value_size, block_value)


@triton.jit
def _channels(base, index, valid, channel, inside, size: tl.constexpr):
    """Load channels that are ``inside``, of rows ``index`` of ``[., size]`` that are ``valid``, in float32; else 0."""
    place = base + index[:, None] * size + channel[None, :]
    return tl.load(place, mask=valid[:, None] & inside[None, :], other=0.0).to(tl.float32)
