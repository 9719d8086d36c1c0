"""What a token takes from a list, in ``memc::sparse_attention`` and the like; letters as in ``sparse``."""

from __future__ import annotations

from memc.backends.onnx.attend import Scores
from memc.backends.onnx.functions import float_, int_, ints
from memc.dialect.sparse_attention import pages_of
from memc.kernels.sparse_attention.choose import Rule

FORCED, UNSEEN = 1e30, -1e30
"""Ranks of what is always taken and of what is not there."""

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


def needed(c: Rule, rank: str, best: str, axis: int) -> str:
    """Write ``needed``: which of the ``best`` of all that is in ``rank``, from the highest down, hold the mass.

    Both have what is ranked along ``axis``.
    """
    return f"""
    {float_("least_forced", FORCED / 2)}
    {float_("most_unseen", UNSEEN / 2)}
    {float_("nothing_held", 0.0)}
    {ints("needed_axis", axis)}
    below = Less({rank}, least_forced)
    above = Greater({rank}, most_unseen)
    scored = And(below, above)
    open_rank = Where(scored, {rank}, unseen_rank)
    open_top = ReduceMax(open_rank, needed_axis)
    open_from = Sub(open_rank, open_top)
    open_exp = Exp(open_from)
    open_held = Where(scored, open_exp, nothing_held)
    open_sum = ReduceSum(open_held, needed_axis)
    {float_("share", c.mass)}
    wanted = Mul(open_sum, share)
    best_below = Less({best}, least_forced)
    best_above = Greater({best}, most_unseen)
    best_scored = And(best_below, best_above)
    best_from = Sub({best}, open_top)
    best_exp = Exp(best_from)
    best_held = Where(best_scored, best_exp, nothing_held)
    {int_("summed_along", axis)}
    held_before = CumSum<exclusive = 1>(best_held, summed_along)
    short = Less(held_before, wanted)
    needed_scored = And(short, best_scored)
    best_forced = Not(best_below)
    needed = Or(needed_scored, best_forced)
    """
