"""What a token takes from a list, in ``memc::sparse_attention`` and the like; letters as in ``sparse``."""

from __future__ import annotations

from memc.backends.onnx.attend import Scores
from memc.backends.onnx.functions import int_, ints
from memc.dialect.sparse_attention import pages_of
from memc.kernels.sparse_attention.choose import Rule

FAR = 1 << 40
"""Number of a page or token that is not there."""


def always(s: Scores, c: Rule) -> str:
    """Write ``must [B,G,F]``, the numbers of what is always taken, in order, and ``must_there``, which of them are."""
    near = max(c.window, c.page) if c.by_token else pages_of(c.window - 1, c.page) + 1
    return f"""
    {int_("near_count", near)}
    ahead = Range(zero, near_count, one)
    near_from = Max(edge, sinks_end)
    must_near = Add(near_from, ahead)
    sunk_numbers = Range(zero, sinks_end, one)
    nought = Mul(edge, zero)
    must_sunk = Add(nought, sunk_numbers)
    {ints("by_group", 1, s.groups, 1)}
    must0 = Concat<axis = 2>(must_sunk, must_near)
    must = Expand(must0, by_group)
    must_there = LessOrEqual(must, newest)
    """


def picked(c: Rule) -> str:
    """Write ``picked [B,G,M]``, in order: ``must``, then what is first in ``next_listed``; far ones for none."""
    return f"""
    listed_far = GreaterOrEqual(next_listed, sinks_end)
    listed_old = Less(next_listed, edge)
    listed_there = And(listed_far, listed_old)
    all = Concat<axis = 2>(must, next_listed)
    all_there = Concat<axis = 2>(must_there, listed_there)
    all_counted = Cast<to = 7>(all_there)
    {int_("third", 2)}
    place = CumSum(all_counted, third)
    {int_("most_taken", c.most)}
    within = LessOrEqual(place, most_taken)
    taken_there = And(all_there, within)
    {int_("far", FAR)}
    numbered = Where(taken_there, all, far)
    {ints("taken_count", c.most)}
    picked, picked_order = TopK<axis = 2, largest = 0, sorted = 1>(numbered, taken_count)
    """
