"""The choice and the attention of a block of new tokens, in ``memc::sparse_attention``; letters as in ``sparse``.

Every token of a block chooses for itself, as one that comes alone does. Scores of the whole block are one product with
everything that is held, and what each token has chosen is a mask ``[B,G,U,L]`` of U queries and L held tokens: products
of many rows are so much faster than fetching keys for each row that reading all of them pays, up to a length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from memc.backends.onnx import eventful, landmarks, levels, listed, tree
from memc.backends.onnx.attend import Scores, weigh
from memc.backends.onnx.functions import flat, float_, int_, ints
from memc.backends.onnx.listed import FORCED, UNSEEN
from memc.dialect.selectors import SELECTORS
from memc.kernels.sparse_attention.choose import Rule

FEW = 8
"""Most tokens of a call that choose one by one."""

BLOCK = 32
"""Tokens of a block."""

PAGES = ("bounds", "bounds2", "moments", "hcam", "hip")

REACH = {"lowbit": 8192, **dict.fromkeys(PAGES, 6144), "landmark": 4096, "em": 8192}
"""Most held tokens that blocks read, by method; past it fetching what each token has chosen is faster."""


def features(c: Rule, query: str, axis: int) -> str:
    """Write ``feature``, whose product with a description is its score, of a query with its channels along ``axis``."""
    if SELECTORS[c.method].scorer == "product":
        return f"feature = Identity({query})"
    halves = f"feature0 = Max({query}, absent)\nfeature1 = Min({query}, absent)"
    if c.method == "moments":
        halves = f"""
        feature0 = Identity({query})
        squared = Mul({query}, {query})
        {float_("half_", 0.5)}
        feature1 = Mul(squared, half_)
        """
    return f"{halves}\nfeature = Concat<axis = {axis}>(feature0, feature1)"


def scan(s: Scores, c: Rule, made: Sequence[str], held: str) -> str:
    """Write a Scan over blocks of ``sparse_query [B,H,n,D]`` at ``sparse_at [B,n]``; ``block_NAME`` of what is made.

    ``held`` writes what all blocks read, as :func:`held` does.
    """
    types = [f"float[B,{s.heads},{BLOCK},{s.value_dim}] o", *([f"float[B,{s.heads},{BLOCK},1] l"] if s.lse else [])]
    inputs = f"float[B,{s.heads},{BLOCK},{s.key_dim}] q, int64[B,{BLOCK}] at"
    outputs = ", ".join(f"blocks_{name}" for name in made)
    axes = f"scan_input_axes = [2, 1], scan_output_axes = [{', '.join('2' for _ in made)}]"
    scanned = (
        f"Scan<num_scan_inputs = 2, {axes}, body = block ({inputs}) => ({', '.join(types)}) {{ {flat(_block(s, c))} }}>"
    )
    joined = "\n".join(
        f"""
        {ints(f"joined_{name}", 0, s.heads, -1, size)}
        all_{name} = Reshape(blocks_{name}, joined_{name})
        block_{name} = Slice(all_{name}, origin, count_sparse, along)
        """
        for name, size in zip(made, (s.value_dim, 1), strict=False)
    )
    return f"""
    {ints("block_size", BLOCK)}
    over = Mod(count_sparse, block_size)
    lack0 = Sub(block_size, over)
    lack = Mod(lack0, block_size)
    {ints("key_size", s.key_dim)}
    pad_shape = Concat<axis = 0>(batch, heads, lack, key_size)
    pad = ConstantOfShape(pad_shape)
    padded = Concat<axis = 2>(sparse_query, pad)
    {ints("in_blocks", 0, s.heads, -1, BLOCK, s.key_dim)}
    queries = Reshape(padded, in_blocks)
    at_shape = Concat<axis = 0>(batch, lack)
    at_pad = ConstantOfShape<value = int64[1] {{-1}}>(at_shape)
    at_padded = Concat<axis = 1>(sparse_at, at_pad)
    {ints("at_blocks", 0, -1, BLOCK)}
    ats = Reshape(at_padded, at_blocks)
    {held}
    {outputs} = {scanned}(queries, ats)
    {joined}
    """


def held(s: Scores, c: Rule) -> str:
    """Write what all blocks read: ``keys [B,G,D,L]``, ``values [B,G,L,E]``, ``slots [L]`` and the pages in use.

    Where pages are read through landmarks, L is whole pages, the last one with zeros past the buffers.
    """
    whole = f"""
    end1 = Mul(described, page)
    end = Squeeze(end1)
    {ints("before_pad", 0, 0, 0, 0, 0, 0)}
    {ints("behind_pad", 0)}
    used_keys = Slice(next_key, origin, end1, along)
    used_values = Slice(next_value, origin, end1, along)
    used_slots = Shape<start = 2, end = 3>(used_keys)
    lacking = Sub(end1, used_slots)
    page_pads = Concat<axis = 0>(before_pad, lacking, behind_pad)
    held_keys = Pad(used_keys, page_pads)
    values = Pad(used_values, page_pads)
    """
    part = """
    reached = ReduceMax<keepdims = 0>(positions)
    end = Add(reached, one)
    end1 = Reshape(end, ones)
    held_keys = Slice(next_key, origin, end1, along)
    values = Slice(next_value, origin, end1, along)
    """
    return f"""
    {int_("page", c.page)}
    {whole if c.grouped else part}
    keys = Transpose<perm = [0, 1, 3, 2]>(held_keys)
    slots = Range(zero, end, one)
    {eventful.rows("end1") if c.by_event else ""}
    {"" if c.by_token else pages_in_use(s, c)}
    """


def pages_in_use(s: Scores, c: Rule) -> str:
    """Write ``in_use [B,G,N,C]``, its ``descriptions [B,G,C,N]`` and what spreads pages over their tokens."""
    one_level = "in_use = Slice(next_pages, origin, described, along)\nin_use_count = Identity(described)"
    return f"""
    {levels.pages_in_use(s.key_dim) if c.by_level else one_level}
    descriptions = Transpose<perm = [0, 1, 3, 2]>(in_use)
    described0 = Squeeze(in_use_count)
    page_numbers = Range(zero, described0, one)
    {ints("page_length", c.page)}
    {ints("leading", 1, 1, 1, 1)}
    expanded = Concat<axis = 0>(leading, page_length)
    """


def _block(s: Scores, c: Rule) -> str:
    """Write what a block reads: ``q [B,H,U,D]`` at ``at [B,U]`` gives ``o [B,H,U,E]`` and ``l [B,H,U,1]``."""
    size = s.heads // s.groups
    again = f"""
    {ints("heads_axis", 2)}
    best = ReduceMax<keepdims = 0>(score, heads_axis)
    {listed.first("again", "best", "candidate", "forced", c.budget, BLOCK)}
    mask_sparse = Identity(again_taken)
    """
    dense = f"""
    {int_("dense_below", c.dense_below)}
    dense = Less(p, dense_below)
    mask_dense = And(dense, seen_token)
    mask0 = Or(mask_sparse, mask_dense)
    """
    per_head = (1, s.groups, size, 1, 1)
    weighed = f"""
    {_capped_behind() if s.softcap else _masked("score", "mask0", "score0")}
    {weigh(replace(s, mask=bool(s.softcap)), per_head)}
    """
    grouped = landmarks.of_block(s, c, _masked("capped_score", "read", "masked_score"), per_head)
    return f"""
    {ints("grouped", 0, s.groups, -1, s.key_dim)}
    q_group = Reshape(q, grouped)
    {float_("factor", s.scale)}
    q_rows = Mul(q_group, factor)
    products = MatMul(q_rows, keys)
    {ints("by_head", 0, s.groups, size, BLOCK, -1)}
    score = Reshape(products, by_head)
    {float_("forced_rank", FORCED)}
    {float_("unseen_rank", UNSEEN)}
    {ints("final", -1)}
    {ints("at_axes", 1, 3)}
    p = Unsqueeze(at, at_axes)
    {int_("sinks", c.sinks)}
    {int_("back", c.window - 1)}
    edge = Sub(p, back)
    own = Div(p, page)
    {_seen(c)}
    near_token = GreaterOrEqual(slots, edge)
    sunk_token = Less(slots, sinks)
    forced0 = Or(near_token, sunk_token)
    {"always = Or(forced0, own_token)" if c.own_page else "always = Identity(forced0)"}
    forced = And(always, seen_token)
    {_tokens(s, c) if c.by_token else _pages(s, c)}
    {again if c.rerank > 1 else "mask_sparse = Identity(candidate)"}
    {dense if c.own_page else "mask0 = Identity(mask_sparse)"}
    {grouped if c.grouped else weighed}
    {ints("weight_rows", 0, s.groups, size * BLOCK, -1)}
    weights = Reshape(weight, weight_rows)
    sums = MatMul(weights, values)
    {ints("joined_heads", 0, s.heads, BLOCK, s.value_dim)}
    o = Reshape(sums, joined_heads)
    {f"{ints('log_shape', 0, s.heads, BLOCK, 1)} l = Reshape(log, log_shape)" if s.lse else ""}
    """


def _seen(c: Rule) -> str:
    """Write ``seen_token [B,1,U,L]``: what a token may read; with ``own_page`` its own page as it is, others coded."""
    if not c.own_page:
        return "seen_token = LessOrEqual(slots, p)"
    return """
    before_token = LessOrEqual(slots, p)
    slot_pages = Div(slots, page)
    own_token = Equal(slot_pages, own)
    right_kind = Equal(own_token, exact)
    seen_token = And(before_token, right_kind)
    """


def _capped_behind() -> str:
    """Write ``score0`` and ``mask`` where soft-capping goes before masking."""
    return f"""
    {ints("mask_axis", 2)}
    mask = Unsqueeze(mask0, mask_axis)
    score0 = Identity(score)
    """


def _masked(score: str, read: str, made: str) -> str:
    """Write ``made``, the ``score`` of what is ``read`` and far less for the rest; adding is faster than Where."""
    return f"""
    {float_("one_float", 1.0)}
    {float_("far", FORCED)}
    mask1 = Cast<to = 1>({read})
    behind0 = Sub(mask1, one_float)
    behind1 = Mul(behind0, far)
    {ints("mask_axis", 2)}
    behind = Unsqueeze(behind1, mask_axis)
    {made} = Add({score}, behind)
    """


def _tokens(s: Scores, c: Rule) -> str:
    """Write ``candidate [B,G,U,L]``: the tokens of the highest scores by the strongest channels of each query."""
    plain = f"""
    {_taken(c, "token", "seen_token", "sure_token")}
    candidate = Identity(token_taken)
    """
    return f"""
    {ints("split_heads", 0, s.groups, s.heads // s.groups, BLOCK, s.key_dim)}
    q_heads = Reshape(q_rows, split_heads)
    magnitudes = Abs(q_heads)
    {ints("summed", 2)}
    strength = ReduceSum(magnitudes, summed)
    {ints("count_", c.channels)}
    strongest, channel = TopK<axis = 4>(strength, count_)
    nothing_read = Sub(strength, strength)
    ones_read0 = Sub(strongest, strongest)
    {float_("unit", 1.0)}
    ones_read = Add(ones_read0, unit)
    read = ScatterElements<axis = 4>(nothing_read, channel, ones_read)
    q_read = Mul(q_heads, read)
    q_read_rows = Reshape(q_read, grouped)
    partial = MatMul(q_read_rows, keys)
    partial_heads = Reshape(partial, by_head)
    {"own_estimate" if c.by_event else "estimate"} = ReduceMax<keepdims = 0>(partial_heads, summed)
    page_start = Mul(own, page)
    on_own = GreaterOrEqual(slots, page_start)
    forced1 = Or(forced, on_own)
    sure_token = And(forced1, seen_token)
    {_events(s, c) if c.by_event else plain}
    """


def _events(s: Scores, c: Rule) -> str:
    """Write ``candidate [B,G,U,L]``: tokens by the scores of their events, then those of the events beside."""
    return f"""
    {eventful.whole(c, "slots", (1, s.groups, 1, 1))}
    {listed.first("token", "estimate", "seen_token", "sure_token", c.alike, BLOCK)}
    token_free = Not(sure_token)
    token_alike = And(token_taken, token_free)
    {eventful.beside("estimate", "token_alike", 3)}
    around_rank = Where(beside_any, beside_rank, estimate)
    around_any = Or(beside_any, token_taken)
    around_seen = And(around_any, seen_token)
    {listed.first("around", "around_rank", "around_seen", "token_taken", c.most, BLOCK)}
    candidate = Identity(around_taken)
    """


def _pages(s: Scores, c: Rule) -> str:
    """Write ``candidate [B,G,U,L]``: the tokens of the pages of the highest scores."""
    exact = f"""
    {ints("no_pads", *[0] * 7)}
    pads = Concat<axis = 0>(no_pads, exact_count)
    padded_tokens = Pad(page_tokens, pads)
    taken_tokens = Or(padded_tokens, exact)
    """
    return f"""
    {page_scores(c, BLOCK)}
    {tree.taken(s, c, BLOCK) if c.by_tree else _taken(c, "page", "seen_level" if c.by_level else "seen", "sure")}
    page_column = Unsqueeze(page_taken, final)
    page_wide = Expand(page_column, expanded)
    {ints("by_token", 0, 0, 0, -1)}
    page_flat = Reshape(page_wide, by_token)
    {ints("last_axis3", 3)}
    page_tokens = Slice(page_flat, origin, end1, last_axis3)
    {exact if c.own_page else "taken_tokens = Identity(page_tokens)"}
    candidate = And(taken_tokens, seen_token)
    """


def page_scores(c: Rule, block: int) -> str:
    """Write ``estimate [B,G,U,N]`` of ``block`` queries, and of what is ``seen`` what is ``sure``.

    In two levels also ``seen_level``, what of it they look at.
    """
    return f"""
    {features(c, "q_rows", -1)}
    bounds = MatMul(feature, descriptions)
    bounds_heads = Reshape(bounds, by_head)
    {ints("over_heads", 2)}
    estimate = ReduceMax<keepdims = 0>(bounds_heads, over_heads)
    {int_("sink_pages", -(-c.sinks // c.page))}
    edge0 = Max(edge, zero)
    edge_page = Div(edge0, page)
    seen_page = LessOrEqual(page_numbers, own)
    seen_here = GreaterOrEqual(p, zero)
    seen = And(seen_page, seen_here)
    near = GreaterOrEqual(page_numbers, edge_page)
    sunk = Less(page_numbers, sink_pages)
    sure0 = Or(near, sunk)
    sure = And(sure0, seen)
    {levels.looked_at(c, block) if c.by_level else ""}
    """


def _taken(c: Rule, name: str, seen: str, sure: str) -> str:
    """Write ``NAME_taken [B,G,U,N]``: what queries take by ``estimate``, all of the budget or what holds the mass."""
    if c.mass == 1:
        return listed.first(name, "estimate", seen, sure, c.most, BLOCK)
    return f"""
    {name}_sure_rank = Where({sure}, forced_rank, estimate)
    {name}_rank = Where({seen}, {name}_sure_rank, unseen_rank)
    {name}_there = Shape<start = 3, end = 4>({name}_rank)
    {ints(f"{name}_most", c.most)}
    {name}_count = Min({name}_there, {name}_most)
    {name}_best, {name}_at = TopK<axis = 3, sorted = 1>({name}_rank, {name}_count)
    {listed.needed(c, f"{name}_rank", f"{name}_best", 3)}
    {name}_none = Less({name}_rank, {name}_rank)
    {name}_marked = ScatterElements<axis = 3>({name}_none, {name}_at, needed)
    {name}_taken = And({name}_marked, {seen})
    """
