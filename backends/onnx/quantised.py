"""The lowered forms of ``memc::quantised_attention``, as ONNX functions; letters as in ``sparse``, P tokens of a page.

Codes and ranges are buffers written in place, the tails small states that are swapped. What a call reads as it is, its
tails and its new tokens, is laid out by the pages that it touches: page f of a row is page ``first_page`` + f of its
sequence. Few tokens of a call go one after the other through a Scan, many in blocks that read everything under masks.
"""

from __future__ import annotations

from memc.backends.onnx import blocks, codes
from memc.backends.onnx.attend import Scores, by_group, weigh
from memc.backends.onnx.functions import Function, flat, float_, function, int_, ints
from memc.backends.onnx.places import token_slots, touched_pages
from memc.backends.onnx.tokens import page_estimates, start
from memc.kernels.sparse_attention.choose import Rule

PLAN = (
    *("index", "local", "page_index", "touched", "tail_page"),
    *("first_page", "exact_slots", "here", "alive", "described", "as_blocks"),
)
"""What :func:`quantised_plan` gives and :func:`quantised_attention` takes."""

_FAR = 1 << 30
"""More than any position or page number."""


def quantised_plan(groups: int, page: int) -> Function:
    """Where the new tokens go, which pages they touch, and how they are read.

    ``positions [B,T]``, a buffer ``[B,G,C,E]`` whose slot is the position (the last one takes padding) and ``pages
    [B,G,M,2D]`` give ``index [B,G,T,3]`` of the slots written; for F pages that hold every new token of a row, their
    places among all ``page_index [B,G,F,3]`` and among those laid out ``touched [B,G,F,1]``; of the F + 1 pages laid
    out the slot of each token ``local [B,G,T,3]`` (the last page takes padding), the number of the first
    ``first_page [B,1]``, that of the next tail ``tail_page [B,G,1,1]`` among them, and the positions of their slots
    ``exact_slots [B,1,1,(F+1)P]``; whether a row has any token ``here [B,1,1,1]`` and which it has ``alive
    [B,1,T,1]``; ``described [1]`` pages in use, and whether tokens go in blocks, ``as_blocks``.
    """
    body = f"""
    {token_slots(groups, page)}
    {int_("far", _FAR)}
    start0 = Where(padding, far, positions)
    start1 = ReduceMin(start0, time)
    here0 = Less(start1, far)
    start = Where(here0, start1, zero)
    first_page = Div(start, page)
    {touched_pages(groups, page)}
    base = Mul(first_page, page)
    local0 = Sub(positions, base)
    laid = Mul(count, page)
    local1 = Where(padding, laid, local0)
    local2 = Unsqueeze(local1, slot_axes)
    local3 = Add(local2, nought)
    local = Concat<axis = -1>(row, group, local3)
    touched0 = Sub(page1, first_page)
    touched1 = Unsqueeze(touched0, slot_axes)
    touched = Add(touched1, nought_page)
    last0 = ReduceMax(positions, time)
    last1 = Add(last0, one)
    last2 = Div(last1, page)
    last3 = Sub(last2, first_page)
    last4 = Max(last3, zero)
    {by_group(groups, "last4", "_tail")}
    last5 = Unsqueeze(last4, slot_axes)
    tail_page = Add(last5, nought_tail)
    more = Add(laid, page)
    more0 = Squeeze(more)
    inside = Range(zero, more0, one)
    exact0 = Add(base, inside)
    {ints("row_axes_", 1, 2)}
    exact_slots = Unsqueeze(exact0, row_axes_)
    {ints("flag_axes", 2, 3)}
    here = Unsqueeze(here0, flag_axes)
    held = Not(padding)
    alive = Unsqueeze(held, slot_axes)
    {ints("few", blocks.FEW)}
    count_few = Greater(tokens, few)
    many = Squeeze(count_few)
    {int_("reach", blocks.REACH["bounds"])}
    near_enough = Less(highest, reach)
    as_blocks = And(many, near_enough)
    """
    return function("QuantisedPlan", "positions, buffer, pages", ", ".join(PLAN), body)


def quantised_attention(s: Scores, c: Rule, bits: int) -> Function:
    """Write codes, ranges and tails into the state, then attend."""
    made = ("output", *(["lse"] if s.lse else []))
    states = ("key", "value", "pages", "ranges", "key_tail", "value_tail")
    names = ["query", "key", "value", *(f"past_{name}" for name in states), "positions", *PLAN, *s.extra]
    results = [f"part_{name}" for name in made]
    sizes = [s.value_dim, *([1] if s.lse else [])]

    def branch(name: str, body: str) -> str:
        outputs = (f"float[B,{s.heads},U,{size}] {name}_{what}" for what, size in zip(results, sizes, strict=True))
        return f"{name}_branch () => ({', '.join(outputs)}) {{ {flat(body)} }}"

    body = f"""
    {ints("ones", 1)}
    {ints("origin", 0)}
    {int_("zero", 0)}
    {int_("one", 1)}
    {ints("along", 2)}
    {ints("last_axis", 3)}
    {float_("absent", 0.0)}
    {int_("page", c.page)}
    {_write(s, c, bits)}
    batch = Shape<start = 0, end = 1>(query)
    {ints("heads", s.heads)}
    sparse_query = Identity(query)
    sparse_at = Identity(positions)
    count_sparse = Shape<start = 2, end = 3>(query)
    {", ".join(results)} = If<then_branch = {branch("block", blocks.scan(s, c, results, _held(s, c, bits)))},
    else_branch = {branch("token", _scan(s, c, bits, results))}>(as_blocks)
    output = Where(alive, part_output, absent)
    """
    if s.lse:
        body += "lse4 = Where(alive, part_lse, absent)\nlse = Squeeze(lse4, last_axis)"
    return function(
        "QuantisedAttention", ", ".join(names), ", ".join([*made, *(f"next_{name}" for name in states)]), body
    )


def _write(s: Scores, c: Rule, bits: int) -> str:
    """Write the next states, and the pages laid out as they are, ``paged_key [B,G,F+1,P,D]`` and ``paged_value``.

    Pages that a call touches are coded anew, whole or not: those that are not whole are not read through their codes.
    A row without a token writes back what it holds.
    """

    def lay_out(name: str, size: int) -> str:
        return f"""
        {ints(f"{name}_groups", s.groups)}
        {ints(f"{name}_channels", size)}
        {name}_rest_shape = Concat<axis = 0>(rows, {name}_groups, laid, {name}_channels)
        {name}_rest = ConstantOfShape({name}_rest_shape)
        {name}_room = Concat<axis = 2>(past_{name}_tail, {name}_rest)
        exact_{name} = ScatterND({name}_room, local, {name})
        {ints(f"{name}_paged", 0, 0, -1, c.page, size)}
        paged_{name} = Reshape(exact_{name}, {name}_paged)
        {name}_tail0 = GatherND<batch_dims = 2>(paged_{name}, tail_page)
        {name}_tail1 = Squeeze({name}_tail0, along)
        next_{name}_tail = Where(here, {name}_tail1, past_{name}_tail)
        """

    return f"""
    rows = Shape<start = 0, end = 1>(query)
    touched_count = Shape<start = 2, end = 3>(touched)
    laid = Mul(touched_count, page)
    {lay_out("key", s.key_dim)}
    {lay_out("value", s.value_dim)}
    value_top = ReduceMax(value, last_axis)
    value_low = ReduceMin(value, last_axis)
    {codes.encode("fresh_value", "value", "value_top", "value_low", bits, s.value_dim)}
    fresh_ranges = Concat<axis = -1>(value_top, value_low)
    next_value = ScatterND(past_value, index, fresh_value_codes)
    next_ranges = ScatterND(past_ranges, index, fresh_ranges)
    fresh_keys = GatherND<batch_dims = 2>(paged_key, touched)
    key_top = ReduceMax(fresh_keys, last_axis)
    key_low = ReduceMin(fresh_keys, last_axis)
    {codes.encode("fresh_key", "fresh_keys", "key_top", "key_low", bits, s.key_dim)}
    fresh_pages0 = Concat<axis = -1>(key_top, key_low)
    fresh_pages1 = Squeeze(fresh_pages0, last_axis)
    old_pages = GatherND(past_pages, page_index)
    fresh_pages = Where(here, fresh_pages1, old_pages)
    old_codes = GatherND(past_key, page_index)
    {ints("fifth", 4)}
    here_page = Unsqueeze(here, fifth)
    fresh_codes = Where(here_page, fresh_key_codes, old_codes)
    next_pages = ScatterND(past_pages, page_index, fresh_pages)
    next_key = ScatterND(past_key, page_index, fresh_codes)
    """


def _held(s: Scores, c: Rule, bits: int) -> str:
    """Write what all blocks read: keys and values through their codes, then the pages that are laid out as they are."""
    return f"""
    reached = ReduceMax<keepdims = 0>(positions)
    end = Add(reached, one)
    end1 = Reshape(end, ones)
    used_codes = Slice(next_key, origin, described, along)
    {blocks.pages_in_use(s, c)}
    {codes.decode("coded", "used_codes", "in_use", bits, s.key_dim, 3)}
    {ints("in_tokens", 0, 0, -1, s.key_dim)}
    coded_tokens = Reshape(coded, in_tokens)
    coded_keys = Slice(coded_tokens, origin, end1, along)
    held_keys = Concat<axis = 2>(coded_keys, exact_key)
    keys = Transpose<perm = [0, 1, 3, 2]>(held_keys)
    used_values = Slice(next_value, origin, end1, along)
    used_ranges = Slice(next_ranges, origin, end1, along)
    {codes.decode("coded_values", "used_values", "used_ranges", bits, s.value_dim)}
    values = Concat<axis = 2>(coded_values, exact_value)
    coded_slots = Range(zero, end, one)
    {ints("row_axis", 2, 3)}
    first_page4 = Unsqueeze(first_page, row_axis)
    row_zero = Mul(first_page4, zero)
    coded_slots4 = Add(row_zero, coded_slots)
    slots = Concat<axis = 3>(coded_slots4, exact_slots)
    coded_kind = Mul(coded_slots4, zero)
    exact_kind0 = Mul(exact_slots, zero)
    exact_kind = Add(exact_kind0, one)
    kind = Concat<axis = 3>(coded_kind, exact_kind)
    exact = Greater(kind, zero)
    exact_count = Shape<start = 3, end = 4>(exact_slots)
    """


def _scan(s: Scores, c: Rule, bits: int, results: list[str]) -> str:
    """Write a Scan over the tokens of a call."""
    outputs = [f"float[B,{s.heads},{s.value_dim}] o", *([f"float[B,{s.heads},1] l"] if s.lse else [])]
    inputs = f"float[B,{s.heads},{s.key_dim}] q, int64[B] at"
    step = f"step ({inputs}) => ({', '.join(outputs)}) {{ {flat(_step(s, c, bits))} }}"
    axes = f"scan_input_axes = [2, 1], scan_output_axes = [{', '.join('2' for _ in outputs)}]"
    scanned = ", ".join(f"token_{name}" for name in results)
    groups = ", ".join("0" for _ in range(s.groups))
    return f"""
    in_use = Slice(next_pages, origin, described, along)
    described0 = Squeeze(described)
    numbers = Range(zero, described0, one)
    pages_held = Shape<start = 2, end = 3>(next_pages)
    last_page = Sub(pages_held, ones)
    slots_held = Shape<start = 2, end = 3>(next_value)
    spare = Sub(slots_held, ones)
    inside = Range(zero, page, one)
    {int_("two", 2)}
    first_page3 = Unsqueeze(first_page, two)
    group_zero = Constant<value = int64[{s.groups}] {{{groups}}}>()
    {ints("beside_groups", 0, 2)}
    group_zeros = Unsqueeze(group_zero, beside_groups)
    no_group = Less(group_zeros, zero)
    {scanned} = Scan<num_scan_inputs = 2, {axes}, body = {step}>(sparse_query, sparse_at)
    """


def _step(s: Scores, c: Rule, bits: int) -> str:
    """Write the choice and the attention of one token: ``q [B,H,D]`` at ``at [B]`` gives ``o [B,H,E]``."""
    size = s.heads // s.groups
    return f"""
    {start(s, c)}
    own = Div(p, page)
    {int_("dense_below", c.dense_below)}
    dense = Less(p, dense_below)
    {page_estimates(c)}
    {_pages(c)}
    {_keys(s, bits)}
    {_own_page()}
    {_tokens(c)}
    slot0 = Min(chosen, spare)
    slot = Unsqueeze(slot0, last_axis)
    value_codes = GatherND<batch_dims = 2>(next_value, slot)
    value_ranges = GatherND<batch_dims = 2>(next_ranges, slot)
    {codes.decode("coded_values", "value_codes", "value_ranges", bits, s.value_dim)}
    every_value = Concat<axis = 2>(coded_values, own_values)
    every_score = Concat<axis = 2>(scores, own_scores)
    every_live = Concat<axis = 2>(live, own_live)
    score0 = Transpose<perm = [0, 1, 3, 2]>(every_score)
    mask = Unsqueeze(every_live, along)
    {weigh(s, (1, s.groups, size, 1))}
    sums = MatMul(weight, every_value)
    {ints("joined_heads", 0, s.heads, s.value_dim)}
    o = Reshape(sums, joined_heads)
    {f"{ints('log_shape', 0, s.heads, 1)} l = Reshape(log, log_shape)" if s.lse else ""}
    """


def _pages(c: Rule) -> str:
    """Write ``picked [B,G,M]``, the numbers of the pages of the highest estimates, in order, far ones for none."""
    return f"""
    {int_("back", c.window - 1)}
    edge0 = Sub(p, back)
    edge1 = Max(edge0, zero)
    edge = Div(edge1, page)
    {int_("sinks_end", -(-c.sinks // c.page))}
    near = GreaterOrEqual(numbers, edge)
    sunk = Less(numbers, sinks_end)
    taken = Or(near, sunk)
    seen = LessOrEqual(numbers, own)
    rank0 = Where(taken, forced_rank, estimate)
    rank1 = Where(seen, rank0, unseen_rank)
    {ints("most", c.rerank * c.budget // c.page)}
    page_most = Where(dense, described, most)
    page_limit = Min(page_most, described)
    page_limit_most = ReduceMax<keepdims = 0>(page_limit)
    page_count = Reshape(page_limit_most, ones)
    ranks, picked0 = TopK<axis = 2, sorted = 1>(rank1, page_count)
    page_order = Range(zero, page_limit_most, one)
    page_within = Less(page_order, page_limit)
    {int_("far", _FAR)}
    picked1 = Where(page_within, picked0, far)
    picked, picked_order = TopK<axis = 2, largest = 0>(picked1, page_count)
    """


def _keys(s: Scores, bits: int) -> str:
    """Write ``candidates [B,G,M P]``, the positions on those pages, and their ``products [B,G,M P,R]``.

    Steps and lows are taken to the side of the query, so that codes are multiplied as they are.
    """
    return f"""
    page_at0 = Min(picked, last_page)
    page_at = Unsqueeze(page_at0, last_axis)
    page_codes = GatherND<batch_dims = 2>(next_key, page_at)
    {codes.read_levels("page_codes", "page_codes", bits, s.key_dim)}
    page_ranges = GatherND<batch_dims = 2>(next_pages, page_at)
    page_top, page_low = Split<axis = -1, num_outputs = 2>(page_ranges)
    {codes.step("page", "page_top", "page_low", bits)}
    {ints("q_axis", 2)}
    q_pages = Unsqueeze(q_columns, q_axis)
    {ints("step_axis", 4)}
    step_column = Unsqueeze(page_step, step_axis)
    q_steps = Mul(q_pages, step_column)
    above_low = MatMul(page_codes_level, q_steps)
    low_product = MatMul(page_low, q_columns)
    low_products = Unsqueeze(low_product, last_axis)
    page_products = Add(above_low, low_products)
    {ints("by_token", 0, 0, -1, s.heads // s.groups)}
    products = Reshape(page_products, by_token)
    picked_start = Mul(picked, page)
    picked_column = Unsqueeze(picked_start, last_axis)
    candidates0 = Add(picked_column, inside)
    {ints("in_row", 0, 0, -1)}
    candidates = Reshape(candidates0, in_row)
    candidate_page = Div(candidates, page)
    live0 = Less(candidate_page, own)
    """


def _own_page() -> str:
    """Write ``own_scores [B,G,P,R]``, ``own_values [B,G,P,E]`` and ``own_live [B,G,P]`` of the token's own page."""
    return f"""
    own_laid0 = Sub(own, first_page3)
    own_laid1 = Max(own_laid0, zero)
    own_laid2 = Add(own_laid1, group_zeros)
    own_laid = Unsqueeze(own_laid2, last_axis)
    {ints("page_axis", 2)}
    own_keys0 = GatherND<batch_dims = 2>(paged_key, own_laid)
    own_keys = Squeeze(own_keys0, page_axis)
    own_values0 = GatherND<batch_dims = 2>(paged_value, own_laid)
    own_values = Squeeze(own_values0, page_axis)
    own_scores = MatMul(own_keys, q_columns)
    own_start = Mul(own, page)
    own_slots = Add(own_start, inside)
    own_live0 = LessOrEqual(own_slots, p)
    own_live = Or(own_live0, no_group)
    """


def _tokens(c: Rule) -> str:
    """Write ``chosen [B,G,K]``, the positions that are read through codes, ``live`` of them, and their ``scores``."""
    if c.rerank == 1:
        return "chosen = Identity(candidates)\nlive = Identity(live0)\nscores = Identity(products)"
    return f"""
    best = ReduceMax<keepdims = 0>(products, last_axis)
    apart = Sub(p, candidates)
    token_near = Less(apart, window)
    token_sunk = Less(candidates, sinks)
    token_taken = Or(token_near, token_sunk)
    token_rank0 = Where(token_taken, forced_rank, best)
    token_rank = Where(live0, token_rank0, unseen_rank)
    on_own0 = Sub(p, own_start)
    on_own = Add(on_own0, one)
    {ints("budget", c.budget)}
    left = Sub(budget, on_own)
    found = Shape<start = 2, end = 3>(candidates)
    token_most = Where(dense, found, left)
    token_limit = Min(token_most, found)
    token_limit_most = ReduceMax<keepdims = 0>(token_limit)
    token_count = Reshape(token_limit_most, ones)
    token_ranks, kept = TopK<axis = 2, sorted = 1>(token_rank, token_count)
    token_order = Range(zero, token_limit_most, one)
    token_within = Less(token_order, token_limit)
    chosen = GatherElements<axis = 2>(candidates, kept)
    live1 = GatherElements<axis = 2>(live0, kept)
    live = And(live1, token_within)
    kept_index = Unsqueeze(kept, last_axis)
    scores = GatherND<batch_dims = 2>(products, kept_index)
    """
