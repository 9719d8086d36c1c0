"""The tree search of one new token over pages, in ``memc::sparse_attention``; letters as in ``sparse``, K ranges."""

from __future__ import annotations

from memc.backends.onnx.attend import Scores
from memc.backends.onnx.functions import flat, int_, ints
from memc.dialect.sparse_attention import pages_of
from memc.kernels.sparse_attention.choose import Rule

_ROUNDS = 64
"""More rounds of halving than any range of pages takes."""


def search(s: Scores, c: Rule) -> str:
    """Write ``tree_found [B,G,K]``, the pages that the search finds, in order, -1 behind the last.

    Takes ``q_columns [B,G,D,R]`` and what ``tokens.always`` writes. Of the descriptions it fetches those of the pages
    in the middle of the halves, and no others.
    """
    ranges = most_found(c)
    held = f"int64[B,{s.groups},{ranges}]"
    body = f"halve (int64 round, bool going, {held} l, {held} r) => (bool more, {held} l1, {held} r1)"
    return f"""
    {int_("tree_most", c.most)}
    tree_start = Min(edge, sinks_end)
    tree_span = Sub(edge, tree_start)
    tree_near = Sub(own, edge)
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
    {_bound("left", "tree_number", s)}
    {_bound("right", "tree_next", s)}
    {int_("tree_two", 2)}
    {int_("tree_halves", 2 * ranges)}
    {int_("tree_last", 2 * ranges - 1)}
    {ints("tree_kept", ranges)}
    {ints("tree_joined", 0, 0, -1)}
    tree_longest = ReduceMax<keepdims = 0>(tree_span)
    tree_go = Greater(tree_longest, zero)
    {int_("tree_rounds", _ROUNDS)}
    found_left, found_right = Loop<body = {body} {{ {flat(_round())} }}>(tree_rounds, tree_go, tree_left, tree_right)
    {int_("tree_none", -1)}
    tree_found = Where(tree_live, found_left, tree_none)
    """


def most_found(c: Rule) -> int:
    """Return how many pages a search finds at most: where there are any to find, sinks and window take the others."""
    return max(1, c.most - int(pages_of(c.sinks, c.page) + pages_of(c.window, c.page)))


def scores() -> str:
    """Write ``tree_found_score [B,G,K]``, those of what was found."""
    return _scores("found_left", "tree_found")


def _bound(name: str, number: str, s: Scores) -> str:
    """Write ``tree_NAME [B,G,K]``, one end of the ranges that the search starts with."""
    return f"""
    {name}_whole = Mul(tree_span, {number})
    {name}_part = Div({name}_whole, tree_pieces)
    {name}_at = Add(tree_start, {name}_part)
    {name}_live = Where(tree_live, {name}_at, zero)
    {ints(f"{name}_groups", 1, s.groups, 1)}
    tree_{name} = Expand({name}_live, {name}_groups)
    """


def _scores(pages: str, made: str) -> str:
    return f"""
    {made}_rows = Unsqueeze({pages}, last_axis)
    {made}_described = GatherND<batch_dims = 2>(next_pages, {made}_rows)
    {made}_products = MatMul({made}_described, q_columns)
    {made}_score = ReduceMax<keepdims = 0>({made}_products, last_axis)
    """


def _round() -> str:
    """Write a round of the search: halves of all ranges from ``l`` to ``r``, the best of them, in order."""

    def joined(made: str, first: str, second: str) -> str:
        return f"""
        {made}0 = Unsqueeze({first}, last_axis)
        {made}1 = Unsqueeze({second}, last_axis)
        {made}2 = Concat<axis = 3>({made}0, {made}1)
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
    {_scores("centre", "half_page")}
    empty = Equal(starts, ends)
    half_rank = Where(empty, unseen_rank, half_page_score)
    half_best, half_place = TopK<axis = 2, sorted = 1>(half_rank, tree_kept)
    half_live = Where(tree_live, half_place, tree_halves)
    in_order, order_of = TopK<axis = 2, largest = 0, sorted = 1>(half_live, tree_kept)
    there_still = Less(in_order, tree_halves)
    half_at = Min(in_order, tree_last)
    l0 = GatherElements<axis = 2>(starts, half_at)
    l1 = Where(there_still, l0, zero)
    r0 = GatherElements<axis = 2>(ends, half_at)
    r1 = Where(there_still, r0, zero)
    left_long = Sub(r1, l1)
    longest = ReduceMax<keepdims = 0>(left_long)
    more = Greater(longest, one)
    """
