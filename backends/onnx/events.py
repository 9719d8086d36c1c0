"""The lowered form of ``memc::events``, as an ONNX function; letters as its dialect page has them.

Surprises are made at once. A Scan finds the ends of events, token after token, and cuts a graph of keys only where one
ends; the numbers of all slots follow from how many cuts lie before each.
"""

from __future__ import annotations

from memc.backends.onnx.functions import Function, flat, float_, function, int_, ints
from memc.dialect.events import NEAR
from memc.kernels.events.rule import LEAST, Segmentation

NO_GAIN = -1e30
"""Gain of a cut that is none: finite, so that nothing becomes NaN."""


def events(e: Segmentation) -> Function:
    """Write ``surprise [B,T]`` and the next states; ``past_events [B,S]`` has the slot of each position."""
    keys, ring = f"float[B,{e.groups},{e.longest + 1},{e.size}]", f"float[B,{e.history}]"
    given = f"int64[B] start, {ring} ring, {keys} held, int64[B] p, float[B] s, float[B,{e.groups},{e.size}] k"
    made = f"int64[B] start_next, {ring} ring_next, {keys} held_next, int64[B] cut"
    axes = "scan_input_axes = [1, 1, 2], scan_output_axes = [1]"
    step = f"step ({given}) => ({made}) {{ {flat(_step(e))} }}"
    body = f"""
    {int_("zero", 0)}
    {int_("one", 1)}
    {int_("none", -1)}
    {ints("ones", 1)}
    {ints("time", 1)}
    {ints("last_axis", 2)}
    {ints("key_axis", 3)}
    {float_("nought", 0.0)}
    {float_("least", LEAST)}
    {_surprises()}
    restarts0 = Cast<to = 7>(starts)
    restarts1 = ReduceMax(restarts0, time)
    restarts = Greater(restarts1, zero)
    past = Where(restarts, none, past_events)
    numbered = GreaterOrEqual(past, zero)
    numbered_one = Cast<to = 7>(numbered)
    start0 = ReduceSum(numbered_one, time)
    start_row = Squeeze(start0, time)
    number0 = ReduceMax(past, time)
    number1 = Add(number0, one)
    ring_slots = Constant<value_ints = [{", ".join(map(str, range(e.history)))}]>()
    key_slots = Constant<value_ints = [{", ".join(map(str, range(e.longest + 1)))}]>()
    start_end, next_surprises, next_keys, cuts =
    Scan<num_scan_inputs = 3, {axes}, body = {step}>
    (start_row, past_surprises, past_keys, positions, surprise, key)
    slots_held = Shape<start = 1, end = 2>(past_events)
    slots_count = Squeeze(slots_held)
    spare = Sub(slots_count, one)
    is_cut = GreaterOrEqual(cuts, zero)
    cut_at = Where(is_cut, cuts, spare)
    cut_one = Cast<to = 7>(is_cut)
    blank = Sub(past, past)
    marks = ScatterElements<axis = 1, reduction = "add">(blank, cut_at, cut_one)
    cuts_before = CumSum(marks, one)
    numbers = Add(cuts_before, number1)
    slot_numbers = Range(zero, slots_count, one)
    end_column = Unsqueeze(start_end, time)
    behind_start = GreaterOrEqual(slot_numbers, start0)
    before_end = Less(slot_numbers, end_column)
    is_new = And(behind_start, before_end)
    next_events = Where(is_new, numbers, past)
    """
    names = "logits, tokens, positions, key, past_logits, past_surprises, past_keys, past_events"
    return function("Events", names, "surprise, next_logits, next_surprises, next_keys, next_events", body)


def _surprises() -> str:
    """Write ``surprise [B,T]``, what each token's is by the logits before it, and ``next_logits``."""
    return f"""
    past_row = Unsqueeze(past_logits, time)
    expected = Concat<axis = 1>(past_row, logits)
    sums = ReduceLogSumExp<keepdims = 0>(expected, last_axis)
    there = GreaterOrEqual(positions, zero)
    starts = Equal(positions, zero)
    tokens_count0 = Shape<start = 1, end = 2>(positions)
    tokens_count = Squeeze(tokens_count0)
    columns = Range(zero, tokens_count, one)
    columns_next = Add(columns, one)
    there_one = Cast<to = 7>(there)
    order_rank = CumSum<exclusive = 1>(there_one, one)
    order_at = Where(there, order_rank, tokens_count)
    order_none = Sub(positions, positions)
    {ints("order_pads", 0, 0, 0, 1)}
    order_blank = Pad(order_none, order_pads)
    order_column = Add(order_none, columns_next)
    order = ScatterElements<axis = 1>(order_blank, order_at, order_column)
    order_rank_before = Sub(order_rank, one)
    order_before = Max(order_rank_before, zero)
    before_found = GatherElements<axis = 1>(order, order_before)
    before_any = Greater(order_rank, zero)
    before = Where(before_any, before_found, zero)
    {ints("wide", 2)}
    before_column = Unsqueeze(before, wide)
    token_column = Unsqueeze(tokens, wide)
    said_at = Concat<axis = 2>(before_column, token_column)
    said = GatherND<batch_dims = 1>(expected, said_at)
    sum_before = GatherElements<axis = 1>(sums, before)
    surprise0 = Sub(sum_before, said)
    follows = Greater(positions, zero)
    surprise = Where(follows, surprise0, nought)
    last0 = Where(there, columns_next, zero)
    last = ReduceMax(last0, time)
    next_logits = GatherND<batch_dims = 1>(expected, last)
    """


def _step(e: Segmentation) -> str:
    """Write what one token does: ``cut [B]``, before which position an event ends, -1 for none, and what is held."""
    refined = "behind_refined = Identity(p)" if e.refine == "none" else _refined(e)
    return f"""
    live = GreaterOrEqual(p, zero)
    known = Greater(p, zero)
    first = Equal(p, zero)
    start_now = Where(first, zero, start)
    p_column = Unsqueeze(p, ones)
    s_column = Unsqueeze(s, ones)
    known_column = Unsqueeze(known, ones)
    {int_("history", e.history)}
    p_before = Sub(p_column, one)
    ring_away0 = Sub(p_before, ring_slots)
    ring_away = Mod(ring_away0, history)
    ring_at = Sub(p_before, ring_away)
    ring_there = GreaterOrEqual(ring_at, one)
    ring_one = Cast<to = 1>(ring_there)
    ring_count0 = ReduceSum(ring_one, time)
    {float_("unit", 1.0)}
    ring_count = Max(ring_count0, unit)
    ring_seen = Where(ring_there, ring, nought)
    ring_sum = ReduceSum(ring_seen, time)
    ring_mean = Div(ring_sum, ring_count)
    ring_off = Sub(ring, ring_mean)
    ring_square = Mul(ring_off, ring_off)
    ring_square_seen = Where(ring_there, ring_square, nought)
    ring_square_sum = ReduceSum(ring_square_seen, time)
    ring_variance = Div(ring_square_sum, ring_count)
    ring_spread = Sqrt(ring_variance)
    {float_("gamma", e.gamma)}
    ring_far = Mul(ring_spread, gamma)
    ring_limit = Add(ring_mean, ring_far)
    over0 = Greater(s_column, ring_limit)
    over = Squeeze(over0, time)
    late = Greater(p, one)
    surprised = And(over, late)
    since = Sub(p, start_now)
    {int_("longest", e.longest)}
    long = GreaterOrEqual(since, longest)
    ends0 = Or(surprised, long)
    ends = And(ends0, known)
    ring_slot = Mod(p_column, history)
    ring_hit0 = Equal(ring_slots, ring_slot)
    ring_hit = And(ring_hit0, known_column)
    ring_next = Where(ring_hit, s_column, ring)
    {int_("key_count", e.longest + 1)}
    key_slot = Mod(p_column, key_count)
    key_hit0 = Equal(key_slots, key_slot)
    live_column = Unsqueeze(live, ones)
    key_hit1 = And(key_hit0, live_column)
    {ints("hit_axes", 1, 3)}
    key_hit = Unsqueeze(key_hit1, hit_axes)
    k_row = Unsqueeze(k, last_axis)
    held_next = Where(key_hit, k_row, held)
    ends_one = Cast<to = 7>(ends)
    ends_any0 = ReduceMax<keepdims = 0>(ends_one)
    ends_any = Greater(ends_any0, zero)
    behind = If<
    then_branch = cutting () => (int64[B] behind_refined) {{ {flat(refined)} }},
    else_branch = going () => (int64[B] behind_same) {{ behind_same = Identity(p) }}
    >(ends_any)
    start_next = Where(ends, behind, start_now)
    cut = Where(ends, behind, none)
    """


def _refined(e: Segmentation) -> str:
    """Write ``behind_refined [B]``, the position before which the keys are best cut."""
    gain = """
    within = Mul(ahead_sum, behind_sum)
    across = Mul(cut_sum, cut_sum)
    gain_above = Sub(within, across)
    gain_below0 = Add(cut_sum, cut_sum)
    gain_below1 = Add(gain_below0, ahead_sum)
    gain_below2 = Add(gain_below1, behind_sum)
    gain_below = Max(gain_below2, least)
    gain_squared = Mul(gain_below, gain_below)
    gain_half = Div(gain_above, gain_squared)
    gain = Add(gain_half, gain_half)
    """
    if e.refine == "conductance":
        gain = f"""
        side_least = Min(ahead_sum, behind_sum)
        volume = Add(side_least, cut_sum)
        volume_any = Greater(volume, least)
        volume_least = Max(volume, least)
        gain_turned = Div(cut_sum, volume_least)
        gain_found = Neg(gain_turned)
        {float_("gain_worst", -1.0)}
        gain = Where(volume_any, gain_found, gain_worst)
        """
    return f"""
    node_away0 = Sub(p_column, key_slots)
    node_away = Mod(node_away0, key_count)
    node_at = Sub(p_column, node_away)
    start_column = Unsqueeze(start_now, ones)
    node_inside = GreaterOrEqual(node_at, start_column)
    {ints("there_axes", 1, 3)}
    node_there = Unsqueeze(node_inside, there_axes)
    node_one = Cast<to = 1>(node_there)
    node_count0 = ReduceSum(node_one, last_axis)
    node_count = Max(node_count0, unit)
    node_keys = Where(node_there, held_next, nought)
    node_sum = ReduceSum(node_keys, last_axis)
    node_mean = Div(node_sum, node_count)
    away = Sub(held_next, node_mean)
    away_square = Mul(away, away)
    away_sum = ReduceSum(away_square, key_axis)
    away_length0 = Sqrt(away_sum)
    away_length = Max(away_length0, least)
    away_unit = Div(away, away_length)
    away_turned = Transpose<perm = [0, 1, 3, 2]>(away_unit)
    cosines = MatMul(away_unit, away_turned)
    cosine = ReduceMean<keepdims = 0>(cosines, time)
    cosine_above = Max(cosine, nought)
    at_row = Unsqueeze(node_at, time)
    at_column = Unsqueeze(node_at, last_axis)
    inside_row = Unsqueeze(node_inside, time)
    inside_column = Unsqueeze(node_inside, last_axis)
    itself = Equal(at_row, at_column)
    another = Not(itself)
    edge0 = And(inside_row, inside_column)
    edge1 = And(edge0, another)
    edge = Cast<to = 1>(edge1)
    alike = Mul(cosine_above, edge)
    node_before0 = Less(at_row, at_column)
    node_before = And(node_before0, inside_row)
    node_behind0 = Not(node_before)
    node_behind = And(node_behind0, inside_row)
    side_ahead = Cast<to = 1>(node_before)
    side_behind = Cast<to = 1>(node_behind)
    from_ahead = MatMul(side_ahead, alike)
    from_behind = MatMul(side_behind, alike)
    ahead_each = Mul(from_ahead, side_ahead)
    cut_each = Mul(from_ahead, side_behind)
    behind_each = Mul(from_behind, side_behind)
    ahead_sum = ReduceSum<keepdims = 0>(ahead_each, last_axis)
    cut_sum = ReduceSum<keepdims = 0>(cut_each, last_axis)
    behind_sum = ReduceSum<keepdims = 0>(behind_each, last_axis)
    {gain}
    {float_("no_gain", NO_GAIN)}
    may_end = Greater(node_at, start_column)
    gain_open = Where(may_end, gain, no_gain)
    gain_best = ReduceMax(gain_open, time)
    {float_("gain_near", NEAR)}
    gain_least = Sub(gain_best, gain_near)
    is_best0 = GreaterOrEqual(gain_open, gain_least)
    is_best = And(is_best0, may_end)
    best_at = Where(is_best, node_at, none)
    behind_refined = ReduceMax<keepdims = 0>(best_at, time)
    """
