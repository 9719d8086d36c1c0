"""The choice and the attention of turns, in ``memc::refreshed_attention``; letters as in ``sparse``.

A turn is the U = ``refresh`` tokens that share a list. A step of the Scan takes K turns of every row: the first query
of each scores what is held, all K in one product; then what the tokens of a turn may read, sinks, what its list holds
beside and the window of them all, is fetched once, N tokens, and multiplied with all of their queries, each of which
has a mask of its own. So what a step makes has an entry for each pair of a query and a candidate, whatever is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from memc.backends.onnx import blocks, landmarks, listed, tokens, tree, turn_reads
from memc.backends.onnx.attend import Scores, weigh
from memc.backends.onnx.functions import flat, float_, int_, ints
from memc.backends.onnx.listed import FAR, FORCED, UNSEEN
from memc.backends.onnx.turn_reads import Turns
from memc.kernels.sparse_attention.choose import Rule


def scan(s: Scores, c: Rule, made: Sequence[str]) -> str:
    """Write a Scan over turns of ``sparse_query [B,H,n,D]`` at ``sparse_at [B,n]``; ``turn_NAME`` of what is made.

    It starts with the list ``choice [B,G,M]``, and leaves ``turn_choice``. Rows stand at different places in their
    turns, and may be padded: each token is moved to where it stands in the turns of its row, and its results back.
    """
    turns = Turns.of(c)
    size = turns.count * c.refresh
    held = f"int64[B,{s.groups},{c.most}]"
    inputs = f"{held} listed, float[B,{s.heads},{size},{s.key_dim}] q, int64[B,{size}] at, int64[B,{turns.count}] start"
    sizes = (s.value_dim, *([1] if s.lse else []))
    outputs = [f"{held} next_listed"]
    outputs += [f"float[B,{s.heads},{size},{each}] {name}" for name, each in zip("ol", sizes, strict=False)]
    axes = f"scan_input_axes = [2, 1, 1], scan_output_axes = [{', '.join('2' for _ in made)}]"
    body = f"step ({inputs}) => ({', '.join(outputs)}) {{ {flat(_step(s, c, turns))} }}"
    scanned = ", ".join(f"steps_{name}" for name in made)
    back = "\n".join(
        f"""
        {ints(f"joined_{name}", 0, s.heads, -1, each)}
        all_{name} = Reshape(steps_{name}, joined_{name})
        turn_{name} = GatherND<batch_dims = 2>(all_{name}, place_index)
        """
        for name, each in zip(made, sizes, strict=True)
    )
    return f"""
    {int_("dense_below", c.dense_below)}
    {int_("refresh", c.refresh)}
    {int_("far", FAR)}
    {int_("step_size", size)}
    {ints("step_column", size)}
    in_turn = GreaterOrEqual(sparse_at, dense_below)
    since = Sub(sparse_at, dense_below)
    since_there = Where(in_turn, since, far)
    since_least = ReduceMin(since_there, time)
    row_any = Less(since_least, far)
    since_first = Where(row_any, since_least, zero)
    past_turn = Mod(since_first, refresh)
    turn_first = Sub(since_first, past_turn)
    from_first = Sub(since, turn_first)
    place0 = Where(in_turn, from_first, zero)
    last_place = ReduceMax<keepdims = 0>(place0)
    whole_steps = Div(last_place, step_size)
    steps = Add(whole_steps, one)
    grid = Mul(steps, step_size)
    grid1 = Reshape(grid, ones)
    place_or_spare = Where(in_turn, from_first, grid)
    grid_room = Add(grid1, ones)
    blank_shape = Concat<axis = 0>(batch, grid_room)
    blank = ConstantOfShape<value = int64[1] {{-1}}>(blank_shape)
    count_sparse0 = Squeeze(count_sparse)
    columns = Range(zero, count_sparse0, one)
    columns_by_row = Expand(columns, sparse_at_shape)
    columns_placed = ScatterElements<axis = 1>(blank, place_or_spare, columns_by_row)
    column = Slice(columns_placed, origin, grid1, time)
    grid_places = Range(zero, grid, one)
    first_at = Add(turn_first, dense_below)
    at_place = Add(first_at, grid_places)
    column_there = GreaterOrEqual(column, zero)
    at_or_none = Where(column_there, at_place, no_number)
    {ints("by_step", 0, -1, size)}
    ats = Reshape(at_or_none, by_step)
    {ints("every_turn", c.refresh)}
    starts_all = Slice(at_place, origin, grid1, time, every_turn)
    {ints("starts_by_step", 0, -1, turns.count)}
    turn_starts = Reshape(starts_all, starts_by_step)
    {ints("index_axes", 1, 3)}
    {ints("index_heads", 1, s.heads, 1, 1)}
    column0 = Max(column, zero)
    column1 = Unsqueeze(column0, index_axes)
    column_index = Expand(column1, index_heads)
    placed_query = GatherND<batch_dims = 2>(sparse_query, column_index)
    {ints("query_by_step", 0, s.heads, -1, size, s.key_dim)}
    queries = Reshape(placed_query, query_by_step)
    place1 = Unsqueeze(place0, index_axes)
    place_index = Expand(place1, index_heads)
    {_held(s, c)}
    turn_choice, {scanned} = Scan<num_scan_inputs = 3, {axes}, body = {body}>(choice, queries, ats, turn_starts)
    {back}
    """


def _held(s: Scores, c: Rule) -> str:
    """Write what all turns score, the pages in use or ``numbers [L]`` of tokens, and the buffers by rows."""
    return f"""
    {int_("page", c.page)}
    {tokens.numbers(c) if c.by_token else blocks.pages_in_use(s, c)}
    {ints("rows_of_keys", -1, s.key_dim)}
    key_rows = Reshape(next_key, rows_of_keys)
    {ints("rows_of_values", -1, s.value_dim)}
    value_rows = Reshape(next_value, rows_of_values)
    slots_held = Shape<start = 2, end = 3>(next_key)
    spare = Sub(slots_held, ones)
    batch0 = Squeeze(batch)
    {int_("group_count", s.groups)}
    buffer_count = Mul(batch0, group_count)
    buffer_numbers = Range(zero, buffer_count, one)
    buffer_first = Mul(buffer_numbers, slots_held)
    {ints("by_buffer", -1, s.groups, 1, 1)}
    buffer_starts = Reshape(buffer_first, by_buffer)
    """


def _step(s: Scores, c: Rule, turns: Turns) -> str:
    """Write K turns: ``q [B,H,KU,D]`` at ``at [B,KU]``, of turns from ``start [B,K]`` on, give ``o`` and ``l``."""
    size, width = s.heads // s.groups, turns.width
    per_head = (1, s.groups, 1, size, 1, 1)
    numbers = ("turn_pages", "sinks_end", "edge_each")
    weighed = f"""
    {landmarks.capped(s, "score")}
    score0 = Add(capped_score, bias_heads)
    {weigh(replace(s, mask=False, softcap=0.0), per_head)}
    """
    grouped = f"""
    {float_("half_unseen", UNSEEN / 2)}
    mask0 = Greater(all_bias, half_unseen)
    {landmarks.of_block(s, c, turn_reads.masked("read", "masked_score"), per_head, numbers)}
    """
    return f"""
    {float_("forced_rank", FORCED)}
    {float_("unseen_rank", UNSEEN)}
    {float_("factor", s.scale)}
    {float_("one_float", 1.0)}
    {ints("final", -1)}
    {int_("sinks", c.sinks)}
    {int_("back", c.window - 1)}
    {int_("sinks_end", turns.sunk)}
    {ints("in_turns", 0, s.groups, size, turns.count, c.refresh, s.key_dim)}
    q_in_turns = Reshape(q, in_turns)
    q_scaled = Mul(q_in_turns, factor)
    {ints("at_turns", 0, turns.count, c.refresh)}
    at_by_turn = Reshape(at, at_turns)
    {_lists(s, c, turns)}
    {turn_reads.candidates(s, c, turns)}
    q_turned = Transpose<perm = [0, 1, 3, 2, 4, 5]>(q_scaled)
    {ints("turn_rows", 0, s.groups, turns.count, size * c.refresh, s.key_dim)}
    q_turn = Reshape(q_turned, turn_rows)
    slot_index = Add(turn_slots, buffer_starts)
    turn_keys = Gather<axis = 0>(key_rows, slot_index)
    turn_keys_turned = Transpose<perm = [0, 1, 2, 4, 3]>(turn_keys)
    products = MatMul(q_turn, turn_keys_turned)
    {ints("products_by_head", 0, s.groups, turns.count, size, c.refresh, width)}
    score = Reshape(products, products_by_head)
    {ints("heads_at", 3)}
    {turn_reads.ranked_again(c, turns) if c.rerank > 1 else turn_reads.joined("bias")}
    bias_heads = Unsqueeze(all_bias, heads_at)
    {grouped if c.grouped else weighed}
    {ints("weights_by_turn", 0, s.groups, turns.count, size * c.refresh, width)}
    weights = Reshape(weight, weights_by_turn)
    turn_values = Gather<axis = 0>(value_rows, slot_index)
    sums = MatMul(weights, turn_values)
    {_by_head(s, c, turns, "sums", "o", s.value_dim)}
    {_by_head(s, c, turns, "log", "l", 1) if s.lse else ""}
    """


def _by_head(s: Scores, c: Rule, turns: Turns, source: str, made: str, size: int) -> str:
    """Write ``made [B,H,KU,size]`` of what lies as ``[B,G,K,R,U,size]``."""
    return f"""
    {ints(f"{made}_turns", 0, s.groups, turns.count, s.heads // s.groups, c.refresh, size)}
    {made}_by_turn = Reshape({source}, {made}_turns)
    {made}_turned = Transpose<perm = [0, 1, 3, 2, 4, 5]>({made}_by_turn)
    {ints(f"{made}_heads", 0, s.heads, turns.count * c.refresh, size)}
    {made} = Reshape({made}_turned, {made}_heads)
    """


def _lists(s: Scores, c: Rule, turns: Turns) -> str:
    """Write ``lists [B,G,K,M]``, those that the first tokens of turns make, or ``listed`` where it is not at hand.

    And ``next_listed``, that of the last token.
    """
    if c.by_token:
        scored, seen, sure = _token_scores(s, c, turns), "seen_token", "sure_token"
    else:
        found = tree.taken(s, c, turns.count) if c.by_tree else ""
        scored, sure = f"{blocks.page_scores(c, turns.count)}\n{found}", "sure"
        seen = "page_taken" if c.by_tree else "seen_level" if c.by_level else "seen"
    return f"""
    q_first = Gather<axis = 4>(q_scaled, zero)
    {ints("grouped", 0, s.groups, -1, s.key_dim)}
    q_rows = Reshape(q_first, grouped)
    {ints("by_head", 0, s.groups, s.heads // s.groups, turns.count, -1)}
    {ints("turn_axes", 1, 3)}
    at_first = Gather<axis = 2>(at_by_turn, zero)
    p = Unsqueeze(at_first, turn_axes)
    edge = Sub(p, back)
    own = Div(p, page)
    {scored}
    list_sure = Where({sure}, forced_rank, absent)
    list_bias = Where({seen}, list_sure, unseen_rank)
    list_rank = Add(estimate, list_bias)
    list_length = Shape<start = 3, end = 4>(list_rank)
    {ints("list_most", c.most)}
    list_count = Min(list_length, list_most)
    list_best, list_number = TopK<axis = 3, sorted = 1>(list_rank, list_count)
    {"needed = Greater(list_best, unseen_rank)" if c.mass == 1 else listed.needed(c, "list_rank", "list_best", 3)}
    needed_1 = Cast<to = 7>(needed)
    list_next = Add(list_number, one)
    list_next_taken = Mul(list_next, needed_1)
    list_taken = Sub(list_next_taken, one)
    list_room = Sub(list_most, list_count)
    {ints("list_no_pads", *[0] * 7)}
    list_pads = Concat<axis = 0>(list_no_pads, list_room)
    list_made = Pad(list_taken, list_pads, no_number)
    list_at_hand = GreaterOrEqual(p, zero)
    {ints("list_axis", 2)}
    list_before = Unsqueeze(listed, list_axis)
    list_at_hand_1 = Cast<to = 7>(list_at_hand)
    list_change = Sub(list_made, list_before)
    list_changed = Mul(list_change, list_at_hand_1)
    lists = Add(list_before, list_changed)
    turn_latest = ReduceMax<keepdims = 0>(at_by_turn, list_axis)
    turn_real = GreaterOrEqual(turn_latest, zero)
    {int_("turn_count", turns.count)}
    turn_numbers = Range(zero, turn_count, one)
    real_number = Where(turn_real, turn_numbers, no_number)
    last_number = ReduceMax(real_number, time)
    last_column = Unsqueeze(last_number, list_axis)
    last_real = GreaterOrEqual(last_column, zero)
    last_turn = Max(last_column, zero)
    {ints("by_group", 1, s.groups, 1)}
    last_index = Expand(last_turn, by_group)
    last_list = GatherND<batch_dims = 2>(lists, last_index)
    next_listed = Where(last_real, last_list, listed)
    """


def _token_scores(s: Scores, c: Rule, turns: Turns) -> str:
    """Write ``estimate [B,G,K,L]`` by each query's channels, and of what is ``seen_token`` what is ``sure_token``."""
    size = s.heads // s.groups
    return f"""
    {ints("split_heads", 0, s.groups, size, turns.count, s.key_dim)}
    q_heads = Reshape(q_first, split_heads)
    magnitudes = Abs(q_heads)
    {ints("summed", 2)}
    strength = ReduceSum<keepdims = 0>(magnitudes, summed)
    {ints("count_", c.channels)}
    strongest, channel = TopK<axis = 3>(strength, count_)
    channel_column = Unsqueeze(channel, final)
    q_columns = Transpose<perm = [0, 1, 3, 4, 2]>(q_heads)
    part = GatherND<batch_dims = 3>(q_columns, channel_column)
    part_rows = Transpose<perm = [0, 1, 2, 4, 3]>(part)
    {ints("row_axes", 4, 5)}
    channel_at = Unsqueeze(channel, row_axes)
    {ints("of_channel", 0, 1)}
    channel_part = Mul(channel_at, of_channel)
    row_index = Add(channel_part, page_part)
    channel_rows = GatherND<batch_dims = 2>(next_pages, row_index)
    {ints("row_shape", 0, 0, 0, 0, -1)}
    channel_row = Reshape(channel_rows, row_shape)
    estimates = MatMul(part_rows, channel_row)
    {ints("over_heads", 3)}
    estimate = ReduceMax<keepdims = 0>(estimates, over_heads)
    own_start = Mul(own, page)
    always_from = Min(edge, own_start)
    near_token = GreaterOrEqual(numbers, always_from)
    sunk_token = Less(numbers, sinks)
    always_token = Or(near_token, sunk_token)
    seen_token = LessOrEqual(numbers, p)
    sure_token = And(always_token, seen_token)
    """
