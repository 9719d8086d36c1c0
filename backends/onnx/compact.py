"""The lowered form of ``memc::compact_attention``, as an ONNX function; letters as in ``sparse``, n pages touched.

Keys are held before rotation and rotated as they are read. Tokens below ``dense_below`` read everything in products of
whole blocks; the others choose pages one after the other through a Scan, whose keys TopK gives in order of time, so
that the place of a token among what is read is its place in the list.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from memc.backends.onnx import tokens
from memc.backends.onnx.attend import Scores, shape_of, weigh
from memc.backends.onnx.functions import Function, flat, float_, function, int_, ints
from memc.backends.onnx.sparse import PLAN, optional
from memc.dialect.compact_attention import REPRESENTATIVES
from memc.dialect.selectors import SELECTORS
from memc.kernels.sparse_attention.choose import Rule


@dataclass(frozen=True)
class Turn:
    """How a node rotates: ``size`` channels of a head."""

    size: int
    interleaved: bool
    scaling: float

    def write(self, x: str, places: str, made: str, channels: int) -> str:
        """Write ``made``, ``x [...,channels]`` rotated by the float ``places [...,1]``."""
        half, n = self.size // 2, made
        lines = [f"{n}_angle = Mul({places}, inv_freq)", f"{n}_cos0 = Cos({n}_angle)", f"{n}_sin0 = Sin({n}_angle)"]
        lines += [float_(f"{n}_f", self.scaling), f"{n}_c = Mul({n}_cos0, {n}_f)", f"{n}_s = Mul({n}_sin0, {n}_f)"]
        step, second = (2, 1) if self.interleaved else (1, half)
        ends = (self.size, self.size) if self.interleaved else (half, self.size)
        for part, start, end in (("a", 0, ends[0]), ("b", second, ends[1])):
            lines += [ints(f"{n}_{part}_from", start), ints(f"{n}_{part}_to", end), ints(f"{n}_{part}_step", step)]
            lines.append(f"{n}_{part} = Slice({x}, {n}_{part}_from, {n}_{part}_to, tail, {n}_{part}_step)")
        lines += [f"{n}_ac = Mul({n}_a, {n}_c)", f"{n}_bs = Mul({n}_b, {n}_s)", f"{n}_left = Sub({n}_ac, {n}_bs)"]
        lines += [f"{n}_bc = Mul({n}_b, {n}_c)", f"{n}_as = Mul({n}_a, {n}_s)", f"{n}_right = Add({n}_bc, {n}_as)"]
        turned = made if self.size == channels else f"{n}_turned"
        if self.interleaved:
            lines += [f"{n}_l = Unsqueeze({n}_left, tail)", f"{n}_r = Unsqueeze({n}_right, tail)"]
            lines += [f"{n}_both = Concat<axis = -1>({n}_l, {n}_r)", f"{n}_lead = Shape<end = -1>({n}_left)"]
            lines += [ints(f"{n}_size", self.size), f"{n}_shape = Concat<axis = 0>({n}_lead, {n}_size)"]
            lines.append(f"{turned} = Reshape({n}_both, {n}_shape)")
        else:
            lines.append(f"{turned} = Concat<axis = -1>({n}_left, {n}_right)")
        if self.size < channels:
            lines += [ints(f"{n}_rest_from", self.size), ints(f"{n}_rest_to", channels)]
            lines.append(f"{n}_rest = Slice({x}, {n}_rest_from, {n}_rest_to, tail)")
            lines.append(f"{made} = Concat<axis = -1>({turned}, {n}_rest)")
        return "\n".join(lines)


def compact_attention(s: Scores, c: Rule, turn: Turn) -> Function:
    """Write keys, values and what is held of the pages they touch into the state, then attend.

    Columns are shared out between what reads everything and what chooses as in ``sparse``.
    """
    made = ("output", *(["lse"] if s.lse else []))
    names = ["query", "key", "value", "past_key", "past_value", "past_pages", "positions", *PLAN, "inv_freq", *s.extra]
    sizes = [("output", s.value_dim), *([("lse", 1)] if s.lse else [])]
    body = f"""
    {ints("ones", 1)}
    {ints("origin", 0)}
    {ints("tail", -1)}
    {int_("zero", 0)}
    {int_("one", 1)}
    {ints("time", 1)}
    {ints("along", 2)}
    {ints("last_axis", 3)}
    {ints("slot_axes", 1, 3)}
    {float_("absent", 0.0)}
    {ints("key_size", s.key_dim)}
    {ints("row_size", 2 * s.key_dim)}
    {int_("page_length", c.page)}
    next_key = ScatterND(past_key, index, key)
    next_value = ScatterND(past_value, index, value)
    offset_of = Range(zero, page_length, one)
    held_slots = Shape<start = 2, end = 3>(next_key)
    last_slot = Sub(held_slots, ones)
    {_sums(s, c, turn)}
    {_describe(s, c)}
    batch = Shape<start = 0, end = 1>(query)
    {ints("heads", s.heads)}
    width = Shape<start = 2, end = 3>(query)
    after_dense = Sub(width, dense_to)
    {ints("output_size", s.value_dim)}
    {ints("lse_size", 1)}
    {optional("dense", "is_dense", sizes, s.heads, _dense(s, c, turn))}
    {optional("sparse", "is_sparse", sizes, s.heads, _sparse(s, c, turn))}
    """
    for name in made:
        whole = "output" if name == "output" else "lse4"
        body += f"""
        {name}_mixed = Where(choosing, sparse_{name}, dense_{name})
        {whole} = Where(alive, {name}_mixed, absent)
        """
    if s.lse:
        body += "lse = Squeeze(lse4, last_axis)"
    results = [*made, "next_key", "next_value", "next_pages"]
    return function("CompactAttention", ", ".join(names), ", ".join(results), body)


def _sums(s: Scores, c: Rule, turn: Turn) -> str:
    """Write ``sum [B,G,n,D]`` of the pages touched, with what the new tokens bring, and ``old_description``.

    A page may be named twice, or in vain: what is written is the same however often, and that of a page with no new
    token stays.
    """
    representatives = SELECTORS[c.method].descriptor == "representatives"
    return f"""
    {_queries(s) if representatives else _own(s, c, turn)}
    brought = Where(alive, brought0, absent)
    {ints("two", 2)}
    {ints("three", 3)}
    number = Slice(page_index, two, three, last_axis)
    first_number = Slice(number, origin, ones, along)
    slot = Slice(index, two, three, last_axis)
    slot_page = Div(slot, page_length)
    local0 = Sub(slot_page, first_number)
    local1 = Max(local0, zero)
    touched_count = Shape<start = 2, end = 3>(page_index)
    last_local = Sub(touched_count, ones)
    local = Min(local1, last_local)
    token_lead = Slice(index, origin, two, last_axis)
    token_index = Concat<axis = -1>(token_lead, local)
    lead_shape = Shape<end = 3>(page_index)
    sums_shape = Concat<axis = 0>(lead_shape, key_size)
    nothing_yet = ConstantOfShape(sums_shape)
    by_local = ScatterND<reduction = "add">(nothing_yet, token_index, brought)
    page_local = Sub(number, first_number)
    page_lead = Slice(page_index, origin, two, last_axis)
    local_index = Concat<axis = -1>(page_lead, page_local)
    more = GatherND(by_local, local_index)
    number_of_row = Slice(number, origin, ones, time)
    held_there = GreaterOrEqual(positions, zero)
    known_at = Where(held_there, positions, last_slot)
    first_new = ReduceMin(known_at, time)
    first_new4 = Unsqueeze(first_new, slot_axes)
    page_start = Mul(number_of_row, page_length)
    began = Less(page_start, first_new4)
    old = GatherND(past_pages, page_index)
    old_description = Slice(old, origin, key_size, last_axis)
    old_sum0 = Slice(old, key_size, row_size, last_axis)
    old_sum = Where(began, old_sum0, absent)
    sum = Add(old_sum, more)
    """


def _queries(s: Scores) -> str:
    """Write ``brought0 [B,G,T,D]``, the queries averaged over the heads that share a key-value head."""
    return f"""
    {ints("by_group_shape", 0, s.groups, s.heads // s.groups, -1, s.key_dim)}
    query_by_group = Reshape(query, by_group_shape)
    brought0 = ReduceMean<keepdims = 0>(query_by_group, along)
    """


def _own(s: Scores, c: Rule, turn: Turn) -> str:
    """Write ``brought0 [B,G,T,D]``, what tokens get from attention to their own pages: a Scan over all of them."""
    plain = replace(s, sink_logits=False, lse=False)
    step = f"""
    own_offset0 = Mod(own_at, page_length)
    own_start0 = Sub(own_at, own_offset0)
    own_start = Unsqueeze(own_start0, ones)
    own_slots0 = Add(own_start, offset_of)
    own_slots1 = Max(own_slots0, zero)
    own_slots2 = Min(own_slots1, last_slot)
    own_slots3 = Unsqueeze(own_slots2, slot_axes)
    own_slots = Add(own_slots3, each_group)
    own_keys0 = GatherND<batch_dims = 2>(next_key, own_slots)
    {turn.write("own_keys0", "inside_places", "own_keys", s.key_dim)}
    own_values = GatherND<batch_dims = 2>(next_value, own_slots)
    {ints("own_grouped", 0, s.groups, s.heads // s.groups, s.key_dim)}
    own_rows = Reshape(own_q, own_grouped)
    own_columns = Transpose<perm = [0, 1, 3, 2]>(own_keys)
    own_products = MatMul(own_rows, own_columns)
    {float_("own_factor", s.scale)}
    score0 = Mul(own_products, own_factor)
    {ints("own_axes", 1, 2, 3)}
    own_offset = Unsqueeze(own_offset0, own_axes)
    mask = LessOrEqual(offset_of, own_offset)
    {weigh(plain, ())}
    own_sums = MatMul(weight, own_values)
    own_out = ReduceMean<keepdims = 0>(own_sums, along)
    """
    inputs = f"float[B,{s.heads},{s.key_dim}] own_q, int64[B] own_at"
    outputs = f"float[B,{s.groups},{s.key_dim}] own_out"
    body = f"own_step ({inputs}) => ({outputs}) {{ {flat(step)} }}"
    axes = "scan_input_axes = [2, 1], scan_output_axes = [2]"
    zeros = ", ".join("0" for _ in range(s.groups))
    return f"""
    each_group0 = Constant<value = int64[{s.groups}] {{{zeros}}}>()
    {ints("group_axes", 0, 2, 3)}
    each_group = Unsqueeze(each_group0, group_axes)
    inside_float = Cast<to = 1>(offset_of)
    inside_places = Unsqueeze(inside_float, ones)
    offsets0 = Mod(positions, page_length)
    offsets1 = Cast<to = 1>(offsets0)
    offsets = Unsqueeze(offsets1, slot_axes)
    {turn.write("query", "offsets", "query_inside", s.key_dim)}
    brought0 = Scan<num_scan_inputs = 2, {axes}, body = {body}>(query_inside, positions)
    """


def _describe(s: Scores, c: Rule) -> str:
    """Write ``next_pages``: the sums of the pages touched, and the descriptions that they give."""
    if SELECTORS[c.method].descriptor != "representatives":
        return f"""
        fresh = GatherND<batch_dims = 2>(next_key, touched)
        {ints("paged", 0, 0, -1, c.page, s.key_dim)}
        by_page = Reshape(fresh, paged)
        {float_("mean_factor", s.scale / c.page)}
        subject = Mul(sum, mean_factor)
        subject_column = Unsqueeze(subject, tail)
        asked = MatMul(by_page, subject_column)
        share = Softmax<axis = 3>(asked)
        shared = Mul(share, by_page)
        description = ReduceSum<keepdims = 0>(shared, last_axis)
        described_row = Concat<axis = -1>(description, sum)
        next_pages = ScatterND(past_pages, page_index, described_row)
        """
    after, count = c.window // c.page, min(REPRESENTATIVES, c.page)
    return f"""
    summed_row = Concat<axis = -1>(old_description, sum)
    summed_pages = ScatterND(past_pages, page_index, summed_row)
    {ints("pages_after", 0, 0, after)}
    behind0 = Sub(page_index, pages_after)
    behind = Max(behind0, zero)
    pages_held = Shape<start = 2, end = 3>(past_pages)
    last_page = Sub(pages_held, ones)
    {ints("no_bound", 1 << 40, 1 << 40)}
    bound = Concat<axis = 0>(no_bound, last_page)
    steps = Constant<value = int64[{after},3] {{{", ".join(f"0, 0, {n + 1}" for n in range(after))}}}>()
    behind_column = Unsqueeze(behind, last_axis)
    following0 = Add(behind_column, steps)
    following = Min(following0, bound)
    following_rows = GatherND(summed_pages, following)
    following_all = ReduceSum<keepdims = 0>(following_rows, last_axis)
    wanted = Slice(following_all, key_size, row_size, last_axis)
    {ints("number_of", 2)}
    behind_page = Gather<axis = 3>(behind, number_of)
    behind_start = Mul(behind_page, page_length)
    behind_each0 = Add(behind_start, offset_of)
    behind_each1 = Min(behind_each0, last_slot)
    {ints("listed", 0, 0, -1, 1)}
    behind_slots = Reshape(behind_each1, listed)
    behind_keys = GatherND<batch_dims = 2>(next_key, behind_slots)
    {ints("paged", 0, 0, -1, c.page, s.key_dim)}
    by_page = Reshape(behind_keys, paged)
    wanted_column = Unsqueeze(wanted, tail)
    asked0 = MatMul(by_page, wanted_column)
    asked = Squeeze(asked0, tail)
    {ints("represent", count)}
    most_asked, which0 = TopK<axis = 3>(asked, represent)
    which = Unsqueeze(which0, tail)
    representative = GatherND<batch_dims = 3>(by_page, which)
    description = ReduceMean<keepdims = 0>(representative, last_axis)
    behind_rows = GatherND(summed_pages, behind)
    behind_sum = Slice(behind_rows, key_size, row_size, last_axis)
    described_row = Concat<axis = -1>(description, behind_sum)
    next_pages = ScatterND(summed_pages, behind, described_row)
    """


def _dense(s: Scores, c: Rule, turn: Turn) -> str:
    """Write attention of the first columns over all of the first tokens, zeros for the other columns."""
    clipped = SELECTORS[c.method].positioner == "clipped"
    far = f"""
    {float_("longest", c.window)}
    {turn.write("dense_query", "longest", "far_query", s.key_dim)}
    far_rows = Reshape(far_query, dense_grouped)
    far_columns = Transpose<perm = [0, 1, 3, 2]>(held_key0)
    far_products = MatMul(far_rows, far_columns)
    far_scores = Reshape(far_products, shape)
    apart = Sub(dense_p, dense_places)
    {int_("dense_window", c.window)}
    near = Less(apart, dense_window)
    products = Where(near, true_scores, far_scores)
    """
    log = """
    lse_rest_shape = Concat<axis = 0>(batch, heads, after_dense, lse_size)
    lse_rest = ConstantOfShape(lse_rest_shape)
    dense_lse_yes = Concat<axis = 2>(log, lse_rest)
    """
    return f"""
    dense_query = Slice(query, origin, dense_to, along)
    dense_at = Slice(positions, origin, dense_to, time)
    dense_p = Unsqueeze(dense_at, slot_axes)
    dense_p_float = Cast<to = 1>(dense_p)
    {turn.write("dense_query", "dense_p_float", "true_query", s.key_dim)}
    held_key0 = Slice(next_key, origin, reach, along)
    held_value = Slice(next_value, origin, reach, along)
    reach_ = Squeeze(reach)
    dense_places = Range(zero, reach_, one)
    dense_places_float = Cast<to = 1>(dense_places)
    dense_column = Unsqueeze(dense_places_float, ones)
    {turn.write("held_key0", "dense_column", "held_key", s.key_dim)}
    {shape_of(s.heads, "dense_query", 2)}
    {ints("dense_grouped", 0, s.groups, -1, s.key_dim)}
    true_rows = Reshape(true_query, dense_grouped)
    true_columns = Transpose<perm = [0, 1, 3, 2]>(held_key)
    true_products = MatMul(true_rows, true_columns)
    true_scores = Reshape(true_products, shape)
    {far if clipped else "products = Identity(true_scores)"}
    {float_("dense_factor", s.scale)}
    score0 = Mul(products, dense_factor)
    mask = Identity(dense_mask)
    {weigh(s, (1, s.heads, 1, 1))}
    {ints("weight_rows", 0, s.groups, -1, 0)}
    weights = Reshape(weight, weight_rows)
    sums = MatMul(weights, held_value)
    out = Reshape(sums, shape)
    rest_shape = Concat<axis = 0>(batch, heads, after_dense, output_size)
    rest = ConstantOfShape(rest_shape)
    dense_output_yes = Concat<axis = 2>(out, rest)
    {log if s.lse else ""}
    """


def _sparse(s: Scores, c: Rule, turn: Turn) -> str:
    """Write the attention of the last columns, zeros for those before: a Scan over tokens."""
    made = ["sparse_part", *(["sparse_log"] if s.lse else [])]
    outputs = [f"float[B,{s.heads},{s.value_dim}] o", *([f"float[B,{s.heads},1] l"] if s.lse else [])]
    inputs = f"float[B,{s.heads},{s.key_dim}] q, int64[B] at"
    step = f"step ({inputs}) => ({', '.join(outputs)}) {{ {flat(_step(s, c, turn))} }}"
    axes = f"scan_input_axes = [2, 1], scan_output_axes = [{', '.join('2' for _ in outputs)}]"
    lines = [
        "sparse_query = Slice(query, sparse_from, width, along)",
        "sparse_at = Slice(positions, sparse_from, width, time)",
        "page_rows = Slice(next_pages, origin, described, along)",
        "in_use = Slice(page_rows, origin, key_size, last_axis)",
        "described0 = Squeeze(described)",
        "numbers = Range(zero, described0, one)",
        f"{', '.join(made)} = Scan<num_scan_inputs = 2, {axes}, body = {step}>(sparse_query, sparse_at)",
    ]
    for what, part in zip(("output", "lse"), made, strict=False):
        lines += [
            f"{what}_before_shape = Concat<axis = 0>(batch, heads, sparse_from, {what}_size)",
            f"{what}_before = ConstantOfShape({what}_before_shape)",
            f"sparse_{what}_yes = Concat<axis = 2>({what}_before, {part})",
        ]
    return "\n".join(lines)


def _step(s: Scores, c: Rule, turn: Turn) -> str:
    """Write the choice and the attention of one token: ``q [B,H,D]`` at ``at [B]`` gives ``o [B,H,E]``."""
    return f"""
    {tokens.start(s, c)}
    estimates = MatMul(in_use, q_columns)
    estimate = ReduceMax<keepdims = 0>(estimates, last_axis)
    {tokens.candidates(c)}
    live = LessOrEqual(candidates, p)
    {_places(c)}
    chosen = Unsqueeze(candidates, last_axis)
    keys0 = GatherND<batch_dims = 2>(next_key, chosen)
    {turn.write("keys0", "key_places", "keys", s.key_dim)}
    {turn.write("q_scaled", "query_places", "q_turned", s.key_dim)}
    turned_columns = Transpose<perm = [0, 1, 3, 2]>(q_turned)
    scores = MatMul(keys, turned_columns)
    score0 = Transpose<perm = [0, 1, 3, 2]>(scores)
    mask = Unsqueeze(live, along)
    {weigh(s, (1, s.groups, s.heads // s.groups, 1))}
    values = GatherND<batch_dims = 2>(next_value, chosen)
    sums = MatMul(weight, values)
    {ints("joined_heads", 0, s.heads, s.value_dim)}
    o = Reshape(sums, joined_heads)
    {tokens.log(s)}
    """


def _places(c: Rule) -> str:
    """Write ``key_places [B,G,M,1]`` and ``query_places [B,G,1,1]`` of the M ``candidates``."""
    if SELECTORS[c.method].positioner == "clipped":
        return f"""
        away0 = Sub(p, candidates)
        away1 = Max(away0, zero)
        away = Min(away1, window)
        key_place0 = Sub(window, away)
        key_place = Cast<to = 1>(key_place0)
        key_places = Unsqueeze(key_place, last_axis)
        {float_("query_places", c.window)}
        """
    return """
    read_count = Shape<start = 2, end = 3>(candidates)
    read_end = Squeeze(read_count)
    key_place0 = Range(zero, read_end, one)
    key_place = Cast<to = 1>(key_place0)
    key_places = Unsqueeze(key_place, ones)
    live_each = Cast<to = 1>(live)
    live_count = ReduceSum(live_each, along)
    one_float = Cast<to = 1>(one)
    query_place = Sub(live_count, one_float)
    query_places = Unsqueeze(query_place, last_axis)
    """
