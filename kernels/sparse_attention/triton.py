"""Kernels of sparse attention: pages described and scored, tokens ranked, and attention to those that are chosen.

Sizes: T tokens (``tokens``), each of which chooses for itself, H query heads, G key-value heads, N keys held
(``held``), of which the token at position j is at ``places [B,L]`` (``length``; int32, -1: none), and P pages
(``count``) of ``page`` tokens. What is chosen from scores, between these kernels, is sorting.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memc.kernels.softmax_triton import LOG2E, capped, extend, load_rows, log_sum_exp, store_rows


@triton.jit
def load_queries(query, t, tokens, scale: tl.constexpr, heads: tl.constexpr, groups: tl.constexpr, size: tl.constexpr,
             block_rows: tl.constexpr, block_size: tl.constexpr):  # fmt: skip
    """Load a group's heads of token ``t`` of ``query [B,H,T,D]``, times the scale, in float32; 0 beyond them."""
    group, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    r = tl.arange(0, block_rows)
    repeat: tl.constexpr = heads // groups
    first = query + ((batch * heads + group * repeat) * tokens + t) * size
    q = load_rows(first, r * tokens, r < repeat, size, block_size)
    return q.to(tl.float32) * scale, r < repeat


@triton.jit
def _write_page(page_of, first, second, c, size: tl.constexpr, method: tl.constexpr):
    """Write a description that has one or two values for each channel."""
    kind = page_of.dtype.element_ty
    tl.store(page_of + c, first.to(kind), mask=c < size)
    if method != "hcam" and method != "hip":
        tl.store(page_of + size + c, second.to(kind), mask=c < size)


@triton.jit
def clear(pages, numbers, block_described: tl.constexpr):
    """Set ``pages``, so many ``numbers``, to 0 before any thread of the program goes on."""
    for start in range(0, numbers, block_described):
        d = start + tl.arange(0, block_described)
        tl.store(pages + d, tl.zeros([block_described], pages.dtype.element_ty), mask=d < numbers)
    tl.debug_barrier()


@triton.jit
def page_row(n, span: tl.constexpr):
    """Return in which row page ``n`` is described: where ``span`` of them share a super-page, behind its own row."""
    return n if span == 0 else n // span * (span + 1) + 1 + n % span


@triton.jit
def _describe_above(
    pages, key, places, n, highest, lowest, size: tl.constexpr, page: tl.constexpr, method: tl.constexpr,
    span: tl.constexpr, block_page: tl.constexpr, block_size: tl.constexpr,
):  # fmt: skip
    """Write the bounds of the super-page that page ``n`` completes, if it does; its own are ``highest`` and ``lowest``.

    ``pages`` and ``key`` of one key-value head, ``places`` of one row.
    """
    if (n + 1) % span == 0:
        i = tl.arange(0, block_page)
        # From the keys again: other programs may write the pages before just now.
        for m in range(1, span):
            place = tl.load(places + (n - m) * page + i, mask=i < page, other=-1)
            k = load_rows(key, place, place >= 0, size, block_size).to(tl.float32)
            inside = (place >= 0)[:, None]
            highest = tl.maximum(highest, tl.max(tl.where(inside, k, float("-inf")), 0))
            lowest = tl.minimum(lowest, tl.min(tl.where(inside, k, float("inf")), 0))
        above = (n // span).to(tl.int64) * ((span + 1) * 2 * size)
        _write_page(pages + above, highest, lowest, tl.arange(0, block_size), size, method)


@triton.jit(do_not_specialize=["tokens", "held", "length", "count"])
def describe(
    pages, key, places, positions, tokens, held, length, count,
    groups: tl.constexpr, size: tl.constexpr, page: tl.constexpr, method: tl.constexpr, described: tl.constexpr,
    span: tl.constexpr, block_page: tl.constexpr, block_size: tl.constexpr, block_described: tl.constexpr,
):  # fmt: skip
    """Write the description of the page that a token completes, if it does, to ``pages [B,G,P,...]``. Grid: (T, G, B).

    A token that is alone in its call and starts a sequence first sets all to 0. ``key [B,G,N,D]``; ``positions [B,T]``
    is int64; ``described`` is the numbers to a page, or to a super-page and its ``span`` pages.
    """
    group, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    p = tl.load(positions + batch * tokens + tl.program_id(0)).to(tl.int32)
    pages += (batch * groups + group) * count * described
    kind = pages.dtype.element_ty
    if tokens == 1 and p == 0:
        clear(pages, count * described, block_described)
    if (p + 1) % page == 0 and p >= 0:
        n = p // page
        i, c = tl.arange(0, block_page), tl.arange(0, block_size)
        place = tl.load(places + batch * length + n * page + i, mask=i < page, other=-1)
        k = load_rows(key + (batch * groups + group) * held * size, place, place >= 0, size, block_size).to(tl.float32)
        inside = (place >= 0)[:, None]
        first = pages
        pages += page_row(n, span).to(tl.int64) * (described if span == 0 else 2 * size)
        if method == "lowbit":
            tl.store(pages + c[None, :] * page + i[:, None], k.to(kind), mask=inside & (c < size)[None, :])
        elif method == "bounds" or method == "bounds2":
            highest = tl.max(tl.where(inside, k, float("-inf")), 0)
            lowest = tl.min(tl.where(inside, k, float("inf")), 0)
            _write_page(pages, highest, lowest, c, size, method)
            if span > 0:
                own = key + (batch * groups + group) * held * size
                row = places + batch * length
                _describe_above(first, own, row, n, highest, lowest, size, page, method, span, block_page, block_size)
        elif method == "hip":
            centre = tl.sum(tl.where((i == page // 2)[:, None], k, 0.0), 0)
            _write_page(pages, centre, centre, c, size, method)
        else:
            tl.static_assert(method == "moments" or method == "hcam")
            mean = tl.sum(k, 0) / page
            off = tl.where(inside, k - mean[None, :], 0.0)
            _write_page(pages, mean, tl.sum(off * off, 0) / page, c, size, method)


@triton.jit(do_not_specialize=["tokens", "count"])
def score_pages(
    scores, query, pages, positions, entered, tokens, count,
    heads: tl.constexpr, groups: tl.constexpr, size: tl.constexpr, scale: tl.constexpr, page: tl.constexpr,
    sinks: tl.constexpr, window: tl.constexpr, dense_below: tl.constexpr, method: tl.constexpr,
    precision: tl.constexpr, span: tl.constexpr, above: tl.constexpr,
    block_rows: tl.constexpr, block_size: tl.constexpr, block_pages: tl.constexpr,
):  # fmt: skip
    """Score ``pages [B,G,P,...]``: ``scores [B,G,T,P]``, inf for those that must be taken, -inf for those to come.

    Where ``span`` of them share a super-page it is these, all of them, with ``above``, and else the pages of those
    that are ``entered [B,G,T,P/span]`` (uint8); others are not read and get -inf.

    Grid: (blocks of pages times T, G, B).
    """
    group, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) % tokens
    p = tl.load(positions + batch * tokens + t).to(tl.int32)
    n = tl.program_id(0) // tokens * block_pages + tl.arange(0, block_pages)
    c = tl.arange(0, block_size)
    at = p + tl.zeros([block_pages], tl.int32)
    seen = (at >= 0) & (n <= at // page) & (n < count)
    must = (n >= tl.maximum(at - window + 1, 0) // page) | (n * page < sinks) | (at < dense_below)
    group_of = batch * groups + group
    if above:
        seen = n < count
        must = must & (n < 0)
        pages += group_of * count * (span + 1) * 2 * size
        row = n * (span + 1)
    elif span > 0:
        opened = tl.load(entered + (group_of * tokens + t) * (count // span) + n // span, mask=seen, other=0)
        seen = seen & (must | (opened > 0))
        pages += group_of * (count // span) * (span + 1) * 2 * size
        row = page_row(n, span)
    else:
        row = group_of * count + n
    q, real = load_queries(query, t, tokens, scale, heads, groups, size, block_rows, block_size)
    each: tl.constexpr = size if method == "hcam" or method == "hip" else 2 * size
    place = pages + row[:, None].to(tl.int64) * each + c[None, :]
    inside = seen[:, None] & (c < size)[None, :]
    one = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if method == "bounds" or method == "bounds2":
        found = tl.dot(tl.maximum(q, 0.0), tl.trans(one), input_precision=precision)
        two = tl.load(place + size, mask=inside, other=0.0).to(tl.float32)
        found = tl.dot(tl.minimum(q, 0.0), tl.trans(two), found, input_precision=precision)
    else:
        tl.static_assert(
            method == "moments" or method == "hcam" or method == "hip" or method == "longheads" or method == "infllm"
        )
        found = tl.dot(q, tl.trans(one), input_precision=precision)
        if method == "moments":
            two = tl.load(place + size, mask=inside, other=0.0).to(tl.float32)
            found = tl.dot(0.5 * q * q, tl.trans(two), found, input_precision=precision)
    best = tl.max(tl.where(real[:, None], found, float("-inf")), 0)
    best = tl.where(seen, tl.where(must, float("inf"), best), float("-inf"))
    tl.store(scores + ((batch * groups + group) * tokens + t) * count + n, best, mask=n < count)


@triton.jit(do_not_specialize=["tokens", "count"])
def score_tokens(
    scores, query, pages, positions, tokens, count,
    heads: tl.constexpr, groups: tl.constexpr, size: tl.constexpr, scale: tl.constexpr, page: tl.constexpr,
    sinks: tl.constexpr, window: tl.constexpr, dense_below: tl.constexpr, channels: tl.constexpr,
    precision: tl.constexpr,
    block_rows: tl.constexpr, block_size: tl.constexpr, block_tokens: tl.constexpr,
):  # fmt: skip
    """Score tokens by the ``channels`` of the highest magnitudes: ``scores [B,G,T,L]`` of ``pages [B,G,P,D,page]``.

    Only those channels are read, of P pages times ``page`` tokens. Grid: (blocks of those times T, G, B).
    """
    group, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) % tokens
    p = tl.load(positions + batch * tokens + t).to(tl.int32)
    q, real = load_queries(query, t, tokens, scale, heads, groups, size, block_rows, block_size)
    c = tl.arange(0, block_size)
    strength = tl.where(c < size, tl.sum(tl.abs(q), 0), -1.0)
    # A channel's place in the order: how many are stronger, of equals those at lower indices.
    level = strength[:, None] == strength[None, :]
    before = (strength[:, None] > strength[None, :]) | (level & (c[:, None] < c[None, :]))
    kept = tl.sum(before.to(tl.int32), 0) < channels
    j = tl.program_id(0) // tokens * block_tokens + tl.arange(0, block_tokens)
    at = p + tl.zeros([block_tokens], tl.int32)
    seen = (at >= 0) & (j <= at) & (j < count * page)
    row = (batch * groups + group) * count
    place = (row + j // page)[None, :] * (size * page) + c[:, None] * page + (j % page)[None, :]
    inside = (kept & (c < size))[:, None] & seen[None, :]
    k = tl.load(pages + place, mask=inside, other=0.0).to(tl.float32)
    found = tl.dot(q, k, input_precision=precision)
    best = tl.max(tl.where(real[:, None], found, float("-inf")), 0)
    # The page of the query itself may not be complete, and is not described before it is.
    must = (j < sinks) | (at - j < window) | (j // page == at // page) | (at < dense_below)
    best = tl.where(seen, tl.where(must, float("inf"), best), float("-inf"))
    row = (batch * groups + group) * tokens + t
    tl.store(scores + row * count * page + j, best, mask=j < count * page)


@triton.jit(do_not_specialize=["held", "length", "tokens", "listed"])
def rank(
    scores, query, candidates, positions, key, places, held, length, tokens, listed,
    heads: tl.constexpr, groups: tl.constexpr, size: tl.constexpr, scale: tl.constexpr,
    sinks: tl.constexpr, window: tl.constexpr, dense_below: tl.constexpr, precision: tl.constexpr,
    block_rows: tl.constexpr, block_size: tl.constexpr, block_tokens: tl.constexpr,
):  # fmt: skip
    """Score ``candidates [B,G,T,K]`` (positions, -1: none) by q.k: ``scores [B,G,T,K]``, inf for what must stay.

    ``key [B,G,N,D]``, ``places [B,L]``. Grid: (blocks of candidates times T, G, B).
    """
    group, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) % tokens
    p = tl.load(positions + batch * tokens + t).to(tl.int32)
    q, real = load_queries(query, t, tokens, scale, heads, groups, size, block_rows, block_size)
    own = ((batch * groups + group) * tokens + t) * listed
    i = tl.program_id(0) // tokens * block_tokens + tl.arange(0, block_tokens)
    j = tl.load(candidates + own + i, mask=i < listed, other=-1)
    place = tl.load(places + batch * length + j, mask=j >= 0, other=-1)
    k = load_rows(key + (batch * groups + group) * held * size, place, place >= 0, size, block_size).to(tl.float32)
    found = tl.dot(q, tl.trans(k), input_precision=precision)
    best = tl.max(tl.where(real[:, None], found, float("-inf")), 0)
    at = p + tl.zeros([block_tokens], tl.int32)
    must = (j < sinks) | (at - j < window) | (at < dense_below)
    best = tl.where(j >= 0, tl.where(must, float("inf"), best), float("-inf"))
    tl.store(scores + own + i, best, mask=i < listed)


@triton.jit
def begin_share(sink_logits, split, head, real, has_sink_logits: tl.constexpr, block_rows: tl.constexpr):
    """Return highest score and sum of weights to begin a share with; the first one has the sink logits."""
    top = tl.full([block_rows], float("-inf"), tl.float32)
    total = tl.zeros([block_rows], tl.float32)
    if has_sink_logits and split == 0:
        r = tl.arange(0, block_rows)
        top = tl.load(sink_logits + head + r, mask=real, other=0.0).to(tl.float32) * LOG2E
        total += 1.0
    return top, total


@triton.jit
def store_share(parts, part_lse, row, real, top, total, acc, value_size: tl.constexpr, block_value: tl.constexpr):
    """Store a share's output and log-sum-exp, to base 2, in ``row [M]``."""
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    store_rows(parts, row, acc, real, value_size, block_value)
    tl.store(part_lse + row, log_sum_exp(top, total), mask=real)


@triton.jit(do_not_specialize=["held", "tokens", "listed", "share"])
def attend(
    parts, part_lse, query, chosen, sink_logits, key, value, held, tokens, listed, share,
    heads: tl.constexpr, groups: tl.constexpr, size: tl.constexpr, value_size: tl.constexpr,
    scale: tl.constexpr, softcap: tl.constexpr, has_sink_logits: tl.constexpr, precision: tl.constexpr,
    block_rows: tl.constexpr, block_size: tl.constexpr, block_value: tl.constexpr, block_keys: tl.constexpr,
):  # fmt: skip
    """Attend to a share of the keys at ``chosen [B,G,T,K]``, -1 for none: ``parts [B,T,H,splits,E]`` and ``part_lse``.

    That is to base 2; the kernel ``merge`` of ``memc::attention`` joins the shares. Grid: (splits times T, G, B).
    """
    group, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, split, splits = tl.program_id(0) % tokens, tl.program_id(0) // tokens, tl.num_programs(0) // tokens
    repeat: tl.constexpr = heads // groups
    r = tl.arange(0, block_rows)
    row = batch * groups + group
    first = query + ((batch * heads + group * repeat) * tokens + t) * size
    q = load_rows(first, r * tokens, r < repeat, size, block_size)
    real = r < repeat
    top, total = begin_share(sink_logits, split, group * repeat, real, has_sink_logits, block_rows)
    acc = tl.zeros([block_rows, block_value], tl.float32)
    for start in range(split * share, tl.minimum(listed, (split + 1) * share), block_keys):
        i = start + tl.arange(0, block_keys)
        place = tl.load(chosen + (row * tokens + t) * listed + i, mask=i < listed, other=-1)
        k = load_rows(key + row * held * size, place, place >= 0, size, block_size)
        v = load_rows(value + row * held * value_size, place, place >= 0, value_size, block_value)
        scores = capped(tl.dot(q, tl.trans(k), input_precision=precision), scale, softcap)
        scores = tl.where((place >= 0)[None, :], scores, float("-inf"))
        top, total, acc = extend(top, total, acc, scores, v, precision)
    out = ((batch * tokens + t) * heads + group * repeat + r) * splits + split
    store_share(parts, part_lse, out, real, top, total, acc, value_size, block_value)
