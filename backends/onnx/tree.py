"""The tree search over pages, in ``memc::sparse_attention``; letters as in ``sparse``, K ranges.

A token that comes alone fetches the descriptions of the pages in the middle of the halves, and no others. Blocks of U
tokens have scored all pages in one product, and look the scores up.
"""

from __future__ import annotations

from collections.abc import Callable

from memc.backends.onnx.attend import Scores
from memc.backends.onnx.functions import flat, int_, ints
from memc.dialect.sparse_attention import pages_of
from memc.kernels.sparse_attention.choose import Rule

_ROUNDS = 64
"""More rounds of halving than any range of pages takes."""


def search(s: Scores, c: Rule) -> str:
    """Write ``tree_found [B,G,K]``, the pages that the search of one token finds, in order, -1 behind the last.

    Takes ``q_columns [B,G,D,R]`` and what ``tokens.always`` writes.
    """
    return f"""
    {_search(c, f"int64[B,{s.groups},{most_found(c)}]", ("edge", "sinks_end"), (1, s.groups, 1), _round(_fetched, 2))}
    {int_("tree_none", -1)}
    tree_found = Where(tree_live, found_left, tree_none)
    """


def found(s: Scores, c: Rule) -> str:
    """Write ``next_listed``, the pages that one token finds, of which nobody asks for the order."""
    return f"{search(s, c)}\nnext_listed = Identity(tree_found)"


def listed(s: Scores, c: Rule) -> str:
    """Write ``found_number [B,G,K]``, the pages that one token finds, and ``found_rank``, their scores."""
    return f"""
    {search(s, c)}
    {scores()}
    found_rank = Where(tree_live, tree_found_score, unseen_rank)
    found_number = Identity(tree_found)
    """


def scores() -> str:
    """Write ``tree_found_score [B,G,K]``, those of what was found."""
    return _fetched("found_left", "tree_found")


def taken(s: Scores, c: Rule, block: int) -> str:
    """Write ``page_taken [B,G,U,N]``: what ``block`` tokens find by ``estimate``, and what is ``sure``."""
    held, groups = f"int64[B,{s.groups},{block},{most_found(c)}]", (1, s.groups, 1, 1)
    return f"""
    {_search(c, held, ("edge_page", "sink_pages"), groups, _round(_looked_up, 3))}
    tree_mark0 = Expand(tree_live, tree_groups)
    tree_mark = Cast<to = 1>(tree_mark0)
    tree_blank = Sub(estimate, estimate)
    tree_marks = ScatterElements<axis = 3, reduction = "add">(tree_blank, found_left, tree_mark)
    tree_marked = Greater(tree_marks, absent)
    page_taken = Or(tree_marked, sure)
    """


def most_found(c: Rule) -> int:
    """Return how many pages a search finds at most: where there are any to find, sinks and window take the others."""
    return max(1, c.most - int(pages_of(c.sinks, c.page) + pages_of(c.window, c.page)))


def _search(c: Rule, held: str, ends: tuple[str, str], groups: tuple[int, ...], body: str) -> str:
    """Write ``found_left``, the pages found, of which ``tree_live``; ``held`` is the type of the ranges' ends.

    ``ends`` name the page that the window begins on, and the end of the sinks; ``groups`` is the shape by which what
    all key-value heads share is expanded to each.
    """
    edge, sinks = ends
    ranges = most_found(c)
    halve = f"halve (int64 round, bool going, {held} l, {held} r) => (bool more, {held} l1, {held} r1)"
    return f"""
    {int_("tree_most", c.most)}
    tree_start = Min({edge}, {sinks})
    tree_span = Sub({edge}, tree_start)
    tree_near = Sub(own, {edge})
    tree_must0 = Add(tree_near, tree_start)
    tree_must = Add(tree_must0, one)
    tree_room0 = Sub(tree_most, tree_must)
    tree_room = Max(tree_room0, zero)
    tree_count = Min(tree_room, tree_span)
    tree_pieces = Max(tree_count, one)
    {int_("tree_ranges", ranges)}
    tree_number = Range(zero, tree_ranges, one)
    tree_next = Add(tree_number, one)
    tree_live = Less(tree_number, tree_count)
    {ints("tree_groups", *groups)}
    {_bound("left", "tree_number")}
    {_bound("right", "tree_next")}
    {int_("tree_two", 2)}
    {int_("tree_halves", 2 * ranges)}
    {int_("tree_last", 2 * ranges - 1)}
    {ints("tree_kept", ranges)}
    {ints("tree_column", -1)}
    {ints("tree_joined", *[0] * (len(groups) - 1), -1)}
    tree_longest = ReduceMax<keepdims = 0>(tree_span)
    tree_go = Greater(tree_longest, zero)
    {int_("tree_rounds", _ROUNDS)}
    found_left, found_right = Loop<body = {halve} {{ {flat(body)} }}>(tree_rounds, tree_go, tree_left, tree_right)
    """


def _bound(name: str, number: str) -> str:
    """Write ``tree_NAME``, one end of the ranges that the search starts with."""
    return f"""
    {name}_whole = Mul(tree_span, {number})
    {name}_part = Div({name}_whole, tree_pieces)
    {name}_at = Add(tree_start, {name}_part)
    {name}_live = Where(tree_live, {name}_at, zero)
    tree_{name} = Expand({name}_live, tree_groups)
    """


def _fetched(pages: str, made: str) -> str:
    """Write ``MADE_score`` of ``pages [B,G,K]``, whose descriptions are fetched."""
    return f"""
    {made}_rows = Unsqueeze({pages}, last_axis)
    {made}_described = GatherND<batch_dims = 2>(next_pages, {made}_rows)
    {made}_products = MatMul({made}_described, q_columns)
    {made}_score = ReduceMax<keepdims = 0>({made}_products, last_axis)
    """


def _looked_up(pages: str, made: str) -> str:
    """Write ``MADE_score`` of ``pages [B,G,U,K]``, which have been scored; those past the end are empty."""
    return f"""
    {made}_count = Shape<start = 3, end = 4>(estimate)
    {made}_last = Sub({made}_count, one)
    {made}_at = Min({pages}, {made}_last)
    {made}_score = GatherElements<axis = 3>(estimate, {made}_at)
    """


def _round(score: Callable[[str, str], str], axis: int) -> str:
    """Write a round of the search: halves of all ranges from ``l`` to ``r``, the best of them, in order."""

    def joined(made: str, first: str, second: str) -> str:
        return f"""
        {made}0 = Unsqueeze({first}, tree_column)
        {made}1 = Unsqueeze({second}, tree_column)
        {made}2 = Concat<axis = -1>({made}0, {made}1)
        {made} = Reshape({made}2, tree_joined)
        """

    return f"""
    length = Sub(r, l)
    half = Div(length, tree_two)
    middle = Add(l, half)
    {joined("starts", "l", "middle")}
    {joined("ends", "middle", "r")}
    lengths = Sub(ends, starts)
    to_centre = Div(lengths, tree_two)
    centre = Add(starts, to_centre)
    {score("centre", "half_page")}
    empty = Equal(starts, ends)
    half_rank = Where(empty, unseen_rank, half_page_score)
    half_best, half_place = TopK<axis = {axis}, sorted = 1>(half_rank, tree_kept)
    half_live = Where(tree_live, half_place, tree_halves)
    in_order, order_of = TopK<axis = {axis}, largest = 0, sorted = 1>(half_live, tree_kept)
    there_still = Less(in_order, tree_halves)
    half_at = Min(in_order, tree_last)
    l0 = GatherElements<axis = {axis}>(starts, half_at)
    l1 = Where(there_still, l0, zero)
    r0 = GatherElements<axis = {axis}>(ends, half_at)
    r1 = Where(there_still, r0, zero)
    left_long = Sub(r1, l1)
    longest = ReduceMax<keepdims = 0>(left_long)
    more = Greater(longest, one)
    """
