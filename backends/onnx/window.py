"""The lowered forms of ``memc::window_memory``, as ONNX functions; letters as in ``functions``."""

from __future__ import annotations

from memc.backends.onnx.attend import Scores, attend, by_group, by_rows, shape_of
from memc.backends.onnx.functions import Function, float_, function, int_, ints


def window_plan(s: Scores, window: int, sinks: int, kernel: bool) -> Function:
    """What each token reads and where it is kept, for every window of the same size.

    ``positions [B,T]`` and the held positions ``past [B,N]`` give ``mask [B,1,T,S]`` over [held; new],
    ``index [B,G,T,3]`` of the slots written and ``source [B,G,T,1]`` in [held; new] of what is written there, the next
    held positions, ``shape``, ``distance [B,1,T,S]``, ``live [B,1,T,1]`` and ``query_shape``. Tokens from a position 0
    on form another segment. A token that is not kept (padding, or a later one falls into its slot) writes to slot 0
    what slot 0 holds in the end, so that all writes to a slot are equal.

    ``query_shape [4]`` is what the kernel takes; see :func:`~memc.backends.onnx.attend.by_rows`.
    """
    near = "near = Less(gap, window)"
    if sinks:
        near = "inside = Less(gap, window)\nsunk = Less(key_at, sinks)\nnear = Or(inside, sunk)"
    body = f"""
    {shape_of(s.heads, "positions", 1)}
    {int_("zero", 0)}
    {int_("one", 1)}
    {int_("window", window)}
    {int_("sinks", sinks)}
    {int_("slots", window + sinks)}
    {int_("empty", -1)}
    {ints("first_axis", 1)}
    {ints("last_axis", 2)}
    {ints("outer", 1, 3)}
    {segments()}
    query_at = Unsqueeze(positions, last_axis)
    key_at = Unsqueeze(at, first_axis)
    causal = LessOrEqual(key_at, query_at)
    there = GreaterOrEqual(key_at, zero)
    gap = Sub(query_at, key_at)
    {near}
    mask0 = And(same, causal)
    mask1 = And(there, near)
    mask2 = And(mask0, mask1)
    mask3 = Unsqueeze(mask2, first_axis)
    {ints("single_token", 1)}
    single = Equal(tokens, single_token)
    {by_rows(s, "mask3", "single", kernel)}
    gap1 = Neg(gap)
    gap2 = Cast<to = 1>(gap1)
    distance = Unsqueeze(gap2, first_axis)
    alive = GreaterOrEqual(positions, zero)
    live = Unsqueeze(alive, outer)
    final = ReduceMax(segment, first_axis)
    last_segment = Equal(segment, final)
    current = And(alive, last_segment)
    reached0 = Where(current, positions, empty)
    reached = ReduceMax(reached0, first_axis)
    behind = Sub(reached, positions)
    recent = Less(behind, window)
    is_sink = Less(positions, sinks)
    lasting = Or(recent, is_sink)
    kept = And(current, lasting)
    beyond = Sub(positions, sinks)
    turn = Mod(beyond, window)
    ring = Add(turn, sinks)
    slot0 = Where(is_sink, positions, ring)
    slot = Where(kept, slot0, zero)
    tokens0 = Squeeze(tokens)
    end = Add(tokens0, slots)
    column = Range(slots, end, one)
    first = Equal(slot, zero)
    fills = And(first, kept)
    filler = Where(fills, column, zero)
    filled = ReduceMax(filler, first_axis)
    source2 = Where(kept, column, filled)
    restarted = Greater(final, zero)
    cleared = Where(restarted, empty, past)
    candidates = Concat<axis = 1>(cleared, positions)
    moved = GatherElements<axis = 1>(candidates, source2)
    next_past = ScatterElements<axis = 1>(cleared, slot, moved)
    {by_group(s.groups)}
    source4 = Unsqueeze(source2, outer)
    source = Add(source4, nought)
    slot4 = Unsqueeze(slot, outer)
    slot5 = Add(slot4, nought)
    index = Concat<axis = -1>(row, group, slot5)
    """
    outputs = "mask, index, source, next_past, shape, distance, live, query_shape"
    return function("WindowPlan", "positions, past", outputs, body)


def segments() -> str:
    """Write ``segment [B,T]``, ``at [B,S]`` (positions of held and new tokens), ``same [B,T,S]`` (one sequence)."""
    return """
    starts = Equal(positions, zero)
    starts_ = Cast<to = 7>(starts)
    segment = CumSum(starts_, one)
    past0 = Mul(past, zero)
    segments = Concat<axis = 1>(past0, segment)
    at = Concat<axis = 1>(past, positions)
    segment_query = Unsqueeze(segment, last_axis)
    segment_key = Unsqueeze(segments, first_axis)
    same = Equal(segment_query, segment_key)
    """


def window_memory(s: Scores, kernel: bool) -> Function:
    """Attend to ``keys``, ``values`` = [held; new], then put the tokens that are kept into their slots.

    What is written is read off ``keys`` and ``values``, so a state may be updated in place: nothing reads it later.
    """
    names = ["query", "key", "value", "past_key", "past_value", "mask", "index", "source"]
    outputs = ["output", *(["lse"] if s.lse else []), "keys", "values", "next_key", "next_value"]
    lines = [float_("absent", 0.0), ints("channel", 3)]
    if kernel and s.plain:
        # The kernel gives 0 for a row that reads nothing, as the dialect asks for padding. Scores are wanted masked.
        made = "sums, keys, values" + (", masked_scores" if s.lse else "")
        mode = ", qk_matmul_output_mode = 2" if s.lse else ""
        lines += [
            "queries = Reshape(query, query_shape)" if s.shared else "queries = Identity(query)",
            f"{made} = Attention<scale = {s.scale!r}{mode}>(queries, key, value, mask, past_key, past_value)",
            "output = Reshape(sums, shape)" if s.shared else "output = Identity(sums)",
        ]
        if s.lse:
            lines += ["log_rows = ReduceLogSumExp(masked_scores, channel)", "log = Reshape(log_rows, shape)"]
    else:
        lines += ["keys = Concat<axis = 2>(past_key, key)", "values = Concat<axis = 2>(past_value, value)"]
        lines += [attend(s, "keys", "values"), "output = Where(live, out, absent)"]
    if s.lse:
        lines += ["log0 = Where(live, log, absent)", "lse = Squeeze(log0, channel)"]
    for name in ("key", "value"):
        lines.append(f"kept_{name} = GatherND<batch_dims = 2>({name}s, source)")
        lines.append(f"next_{name} = ScatterND(past_{name}, index, kept_{name})")
    stem = "WindowMemory" if kernel and s.plain else "WindowMemoryPortable"
    inputs = ", ".join([*names, "shape", "distance", "live", "query_shape", *s.extra])
    return function(stem, inputs, ", ".join(outputs), "\n".join(lines))


def window_left_plan(groups: int, window: int, sinks: int) -> Function:
    """Which token leaves the window as each new one comes.

    Gives ``position [B,T]`` (-1: none), ``index [B,G,T,1]`` into [held; new], ``found [B,1,T,1]``.
    """
    body = f"""
    {int_("zero", 0)}
    {int_("one", 1)}
    {int_("window", window)}
    {int_("sinks", sinks)}
    {int_("absent", -1)}
    {ints("first_axis", 1)}
    {ints("last_axis", 2)}
    {segments()}
    wanted = Sub(positions, window)
    leaves = GreaterOrEqual(wanted, sinks)
    position = Where(leaves, wanted, absent)
    wanted3 = Unsqueeze(wanted, last_axis)
    key_at = Unsqueeze(at, first_axis)
    leaves3 = Unsqueeze(leaves, last_axis)
    equal0 = Equal(wanted3, key_at)
    equal1 = And(equal0, same)
    equal2 = And(equal1, leaves3)
    equal = Cast<to = 6>(equal2)
    source = ArgMax<axis = 2, keepdims = 0>(equal)
    any = ReduceMax<keepdims = 0>(equal, last_axis)
    {ints("outer", 1, 3)}
    found0 = Cast<to = 9>(any)
    found = Unsqueeze(found0, outer)
    source4 = Unsqueeze(source, outer)
    {ints("groups", 1, groups, 1, 1)}
    index = Expand(source4, groups)
    """
    return function("WindowLeftPlan", "positions, past", "position, index, found", body)


def window_left() -> Function:
    """Key and value of the token that leaves, zeros where none does."""
    body = f"""
    key0 = GatherND<batch_dims = 2>(keys, index)
    value0 = GatherND<batch_dims = 2>(values, index)
    {float_("absent", 0.0)}
    left_key = Where(found, key0, absent)
    left_value = Where(found, value0, absent)
    """
    return function("WindowLeft", "keys, values, index, found", "left_key, left_value", body)
