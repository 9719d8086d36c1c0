"""Two levels of bounds, in ``memc::sparse_attention``; letters as in ``sparse``, N pages, M super-pages, K entered.

What is held of a super-page and its pages lies together, so that a token that comes alone fetches the pages of those
that it enters in one piece each, and no others. Blocks of U tokens score all pages in one product, of which those that
a token does not look at are then left out: the choice is the same, what is saved is not.
"""

from __future__ import annotations

from memc.backends.onnx import blocks, listed
from memc.backends.onnx.attend import Scores
from memc.backends.onnx.functions import float_, int_, ints
from memc.backends.onnx.listed import FAR, UNSEEN
from memc.dialect.sparse_attention import SPAN
from memc.kernels.sparse_attention.choose import Rule


def touched(page: int) -> str:
    """Write ``page_index [B,G,n+m,4]``, of pages in their super-pages and then of these, and ``above_slots``.

    Those are the slots ``[B,G,m SPAN page,1]`` of all of their tokens. Takes the index ``[B,G,n,3]`` of pages in a row
    as ``flat_index``: a sixteenth of them and the last lie on all of their super-pages.
    """
    return f"""
    {ints("span_parts", 2, 1)}
    flat_lead, flat_page = Split<axis = 3>(flat_index, span_parts)
    {int_("span", SPAN)}
    above_number = Div(flat_page, span)
    on_above = Mod(flat_page, span)
    below_first = Add(on_above, one)
    below_index = Concat<axis = -1>(flat_lead, above_number, below_first)
    above_first = Mul(above_number, zero)
    above_each = Concat<axis = -1>(flat_lead, above_number, above_first)
    {ints("every_from", 0)}
    {ints("last_from", -1)}
    {ints("above_end", FAR)}
    {ints("above_axis", 2)}
    {ints("above_step", SPAN)}
    above_some = Slice(above_each, every_from, above_end, above_axis, above_step)
    above_last = Slice(above_each, last_from, above_end, above_axis)
    page_index = Concat<axis = 2>(below_index, above_some, above_last)
    number_some = Slice(above_number, every_from, above_end, above_axis, above_step)
    number_last = Slice(above_number, last_from, above_end, above_axis)
    numbers_above = Concat<axis = 2>(number_some, number_last)
    {int_("above_tokens", SPAN * page)}
    above_starts = Mul(numbers_above, above_tokens)
    above_inside = Range(zero, above_tokens, one)
    above_slots0 = Add(above_starts, above_inside)
    above_slots1 = Min(above_slots0, spare)
    {ints("above_flat", 0, 0, -1, 1)}
    above_slots = Reshape(above_slots1, above_flat)
    """


def describe(size: int, page: int) -> str:
    """Write ``next_pages``: ``past_pages`` with the ``description`` of pages, and the bounds of the super-pages.

    From their keys and not from their pages, so that the state is written once and stays where it is.
    """
    return f"""
    above_keys = GatherND<batch_dims = 2>(next_key, above_slots)
    {ints("above_shape", 0, 0, -1, SPAN * page, size)}
    above_by_page = Reshape(above_keys, above_shape)
    above_top = ReduceMax<keepdims = 0>(above_by_page, last_axis)
    above_low = ReduceMin<keepdims = 0>(above_by_page, last_axis)
    above_bounds = Concat<axis = -1>(above_top, above_low)
    every_bound = Concat<axis = 2>(description, above_bounds)
    next_pages = ScatterND(past_pages, page_index, every_bound)
    """


def in_use() -> str:
    """Write ``above_in_use [B,G,M,C]``, the bounds of the super-pages in use, and ``above_numbers [M]``."""
    return f"""
    {int_("span", SPAN)}
    {int_("span_less", SPAN - 1)}
    above_rounded = Add(described, span_less)
    above_used = Div(above_rounded, span)
    {ints("above_first", 1)}
    {ints("above_level", 3)}
    {ints("level_axes", 2, 3)}
    {ints("above_begin", 0, 0)}
    above_end = Concat<axis = 0>(above_used, above_first)
    above_rows = Slice(next_pages, above_begin, above_end, level_axes)
    above_in_use = Squeeze(above_rows, above_level)
    above_used0 = Squeeze(above_used)
    above_numbers = Range(zero, above_used0, one)
    """


def pages_in_use(size: int) -> str:
    """Write ``in_use [B,G,N,C]``, whole super-pages, ``in_use_count [1]`` and ``above_descriptions [B,G,C,M]``."""
    return f"""
    {in_use()}
    above_descriptions = Transpose<perm = [0, 1, 3, 2]>(above_in_use)
    {ints("below_begin", 0, 1)}
    {ints("below_last", 1 + SPAN)}
    below_end = Concat<axis = 0>(above_used, below_last)
    below_rows = Slice(next_pages, below_begin, below_end, level_axes)
    {ints("below_flat", 0, 0, -1, 2 * size)}
    in_use = Reshape(below_rows, below_flat)
    in_use_count = Mul(above_used, span)
    """


def search(s: Scores, c: Rule) -> str:
    """Write ``found_number [B,G,L]``, the pages that one token looks at, in order, and their ``found_rank``.

    Those that it may not choose, and room for ``c.most`` behind, have the lowest rank. Takes ``q_columns [B,G,D,R]``
    and what ``tokens.always`` writes.
    """
    # The bounds of a super-page lie before those of its pages, and are fetched with them: their number is far.
    return f"""
    {blocks.features(c, "q_columns", 2)}
    above_products = MatMul(above_in_use, feature)
    above_estimate = ReduceMax<keepdims = 0>(above_products, last_axis)
    {_open(c, "edge")}
    above_rank0 = Where(above_open, above_estimate, unseen_rank)
    above_rank = Where(above_reached, forced_rank, above_rank0)
    {ints("above_most", c.entered + 1)}
    above_there = Shape(above_numbers)
    above_count = Min(above_there, above_most)
    above_best, entered0 = TopK<axis = 2, sorted = 0>(above_rank, above_count)
    entered, entered_order = TopK<axis = 2, largest = 0, sorted = 1>(entered0, above_count)
    entered_rows = Unsqueeze(entered, last_axis)
    below_each = GatherND<batch_dims = 2>(next_pages, entered_rows)
    {ints("below_flat", 0, 0, -1, 2 * s.key_dim)}
    below = Reshape(below_each, below_flat)
    below_products = MatMul(below, feature)
    below_estimate = ReduceMax<keepdims = 0>(below_products, last_axis)
    entered_first = Mul(entered_rows, span)
    {ints("below_offsets", FAR, *range(SPAN))}
    below_number0 = Add(entered_first, below_offsets)
    {ints("level_flat", 0, 0, -1)}
    below_number = Reshape(below_number0, level_flat)
    below_far = GreaterOrEqual(below_number, sinks_end)
    below_old = Less(below_number, edge)
    below_live = And(below_far, below_old)
    below_rank = Where(below_live, below_estimate, unseen_rank)
    {ints("level_pads", 0, 0, 0, 0, 0, c.most)}
    {int_("level_none", -1)}
    found_rank = Pad(below_rank, level_pads, unseen_rank)
    found_number = Pad(below_number, level_pads, level_none)
    """


def best(s: Scores, c: Rule) -> str:
    """Write ``next_listed [B,G,M]``: the pages of the highest scores, these first, -1 behind the last."""
    return f"""
    {search(s, c)}
    {ints("level_most", c.most)}
    {float_("level_least", UNSEEN / 2)}
    level_best, level_place = TopK<axis = 2, sorted = 1>(found_rank, level_most)
    level_taken = GatherElements<axis = 2>(found_number, level_place)
    level_live = Greater(level_best, level_least)
    next_listed = Where(level_live, level_taken, level_none)
    """


def looked_at(c: Rule, block: int) -> str:
    """Write ``seen_level [B,G,U,N]``, what ``block`` tokens look at of what is ``seen``, and what is ``sure``."""
    return f"""
    above_products = MatMul(feature, above_descriptions)
    above_heads = Reshape(above_products, by_head)
    above_estimate = ReduceMax<keepdims = 0>(above_heads, over_heads)
    {_open(c, "edge_page")}
    above_seen = Or(above_open, above_reached)
    {listed.first("entering", "above_estimate", "above_seen", "above_reached", c.entered + 1, block)}
    above_column = Unsqueeze(entering_taken, final)
    {ints("above_wide", 1, 1, 1, 1, SPAN)}
    above_each = Expand(above_column, above_wide)
    {ints("above_flat", 0, 0, 0, -1)}
    below_open = Reshape(above_each, above_flat)
    below_taken = Or(below_open, sure)
    seen_level = And(below_taken, seen)
    """


def _open(c: Rule, edge: str) -> str:
    """Write ``above_reached``, the super-page of page ``edge``, and ``above_open``, those before it to choose among."""
    return f"""
    above_edge = Div({edge}, span)
    {int_("above_sunk", -(-c.sinks // c.page) // SPAN)}
    above_reached = Equal(above_numbers, above_edge)
    above_behind = Less(above_numbers, above_edge)
    above_free = GreaterOrEqual(above_numbers, above_sunk)
    above_open = And(above_behind, above_free)
    """
