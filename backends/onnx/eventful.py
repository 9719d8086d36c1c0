"""Tokens ranked by the events that they belong to, in ``memc::sparse_attention``; letters as in ``sparse``, N tokens.

A token's row in a table of N + 2 is one more than the number of its event, 0 for none: the table is filled by
ScatterElements that keep the highest.
"""

from __future__ import annotations

from memc.backends.onnx.functions import float_, int_, ints
from memc.backends.onnx.listed import FAR, UNSEEN
from memc.kernels.sparse_attention.choose import Rule


def known(c: Rule) -> str:
    """Write ``event_rows [B,S+page]``, the table rows of what was numbered before the call, 0 for all else."""
    return f"""
    {int_("event_never", FAR)}
    event_there = GreaterOrEqual(positions, zero)
    event_at = Where(event_there, positions, event_never)
    event_first = ReduceMin(event_at, time)
    event_count0 = Shape<start = 1, end = 2>(events)
    event_count = Squeeze(event_count0)
    event_slots = Range(zero, event_count, one)
    event_old = Less(event_slots, event_first)
    event_row0 = Add(events, one)
    event_row1 = Where(event_old, event_row0, zero)
    {ints("event_pads", 0, 0, 0, c.page)}
    event_rows = Pad(event_row1, event_pads)
    """


def rows(end: str) -> str:
    """Write ``event_row [B,N]``, those of the first tokens up to ``end [1]``."""
    return f"event_row = Slice(event_rows, origin, {end}, time)"


def whole(c: Rule, numbers: str, heads: tuple[int, ...]) -> str:
    """Write ``estimate``, for ``own_estimate`` of each token, along the last axis, the highest of its event.

    ``numbers`` are the tokens', ``heads`` the shape by which table rows are expanded to all heads. And ``event_place``,
    the rows that a query sees, and ``event_in``, whether there is any.
    """
    axis = len(heads) - 1
    return f"""
    {int_("event_delay", c.delay)}
    event_reach = Sub(p, event_delay)
    event_far = LessOrEqual({numbers}, event_reach)
    {ints("event_axes", *range(1, axis))}
    event_wide = Unsqueeze(event_row, event_axes)
    event_seen = Where(event_far, event_wide, zero)
    {ints("event_heads", *heads)}
    event_place = Expand(event_seen, event_heads)
    event_in = Greater(event_place, zero)
    {ints("event_two", *[0] * (axis + 1), *[0] * axis, 2)}
    event_table = Pad(own_estimate, event_two)
    event_blank0 = Sub(event_table, event_table)
    event_blank = Add(event_blank0, unseen_rank)
    {_highest("event_best", "own_estimate", axis)}
    event_own = GatherElements<axis = {axis}>(event_best, event_place)
    estimate = Where(event_in, event_own, own_estimate)
    """


def beside(rank: str, taken: str, axis: int) -> str:
    """Write ``beside_rank``, the higher of the events beside, of those whose tokens are ``taken`` for their ``rank``.

    ``beside_any`` tells where there is one.
    """
    return f"""
    {float_("beside_unseen", UNSEEN / 2)}
    beside_of = And({taken}, event_in)
    beside_score = Where(beside_of, {rank}, unseen_rank)
    {_highest("beside_best", "beside_score", axis)}
    beside_before0 = Sub(event_place, one)
    beside_before1 = Max(beside_before0, zero)
    beside_behind1 = Add(event_place, one)
    beside_before = GatherElements<axis = {axis}>(beside_best, beside_before1)
    beside_behind = GatherElements<axis = {axis}>(beside_best, beside_behind1)
    beside_rank = Max(beside_before, beside_behind)
    beside_some = Greater(beside_rank, beside_unseen)
    beside_any = And(beside_some, event_in)
    """


def _highest(made: str, scores: str, axis: int) -> str:
    return f'{made} = ScatterElements<axis = {axis}, reduction = "max">(event_blank, event_place, {scores})'


def best(c: Rule) -> str:
    """Write ``picked [B,G,M]`` of one token, in order: the best by ``rank1``, then those beside; far ones for none."""
    return f"""
    {ints("alike_most", c.alike)}
    alike_count = Min(number_count, alike_most)
    alike_ranks, alike_at = TopK<axis = 2, sorted = 0>(rank1, alike_count)
    alike_real = Equal(alike_ranks, alike_ranks)
    alike_none = Less(rank1, rank1)
    alike_taken0 = ScatterElements<axis = 2>(alike_none, alike_at, alike_real)
    alike_open0 = Not(taken)
    alike_open = And(alike_open0, seen)
    alike_taken = And(alike_taken0, alike_open)
    {beside("rank1", "alike_taken", 2)}
    beside_open = Where(beside_any, beside_rank, unseen_rank)
    beside_sure = Or(taken, alike_taken)
    beside_rank0 = Where(beside_sure, forced_rank, beside_open)
    beside_rank1 = Where(seen, beside_rank0, unseen_rank)
    ranks, picked0 = TopK<axis = 2, sorted = 0>(beside_rank1, count)
    picked_real = Greater(ranks, beside_unseen)
    {int_("beyond", FAR)}
    picked_there = Where(picked_real, picked0, beyond)
    picked, picked_order = TopK<axis = 2, largest = 0>(picked_there, count)
    """
