"""What a token takes from a list, in ``memc::sparse_attention`` and the like; letters as in ``sparse``."""

from __future__ import annotations

from memc.backends.onnx.attend import Scores
from memc.backends.onnx.functions import flat, float_, int_, ints
from memc.dialect.sparse_attention import pages_of
from memc.kernels.sparse_attention.choose import Rule

FORCED, UNSEEN = 1e30, -1e30
"""Ranks of what is always taken and of what is not there."""

HALVINGS = 40
"""Most steps of the search for a threshold, after which it is known to the last bit of the range."""

GUESSES = 12
"""First steps of the search for a threshold that go where the counts at both ends of the interval point."""

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


def _past(name: str) -> str:
    """Write ``NAME_past``, just past the highest score ``NAME_top``: the end of the interval that is searched."""
    return f"""
    {float_(f"{name}_little", 1e-6)}
    {float_(f"{name}_least_step", 1e-30)}
    {name}_size = Abs({name}_top)
    {name}_step0 = Mul({name}_size, {name}_little)
    {name}_step = Add({name}_step0, {name}_least_step)
    {name}_past = Add({name}_top, {name}_step)
    """


def first(name: str, rank: str, seen: str, sure: str, count: int, block: int) -> str:
    """Write ``NAME_taken``: of each row of a block the ``count`` highest of ``rank [B,G,U,N]``, of equals the first.

    Only ``seen`` ones are taken, and those that are ``sure`` always. The least rank taken is searched by halving the
    interval that it lies in, each time counting those above: about 20 halvings take a quarter of the time of a TopK of
    hundreds.
    """
    # Not by `highest`, whose guesses pay for many rows of a few: prompts in blocks took 2 to 6 % longer, of ties 20 %.
    row, whole = f"float[B,G,{block},1]", f"bool[B,G,{block},{name}_n]"
    halve = f"""
    {name}_sum = Add({name}_a, {name}_b)
    {name}_middle = Mul({name}_sum, {name}_half)
    {name}_over = GreaterOrEqual({name}_value, {name}_middle)
    {name}_over1 = Cast<to = 1>({name}_over)
    {name}_found = ReduceSum({name}_over1, final)
    {name}_enough = GreaterOrEqual({name}_found, {name}_want)
    {name}_a1 = Where({name}_enough, {name}_middle, {name}_a)
    {name}_b1 = Where({name}_enough, {name}_b, {name}_middle)
    {name}_k1 = Where({name}_enough, {name}_found, {name}_k)
    {name}_excess = Sub({name}_k1, {name}_want)
    {name}_most = ReduceMax<keepdims = 0>({name}_excess)
    {name}_more = Greater({name}_most, absent)
    """
    ties = f"""
    {name}_above = GreaterOrEqual({name}_value, {name}_high)
    {name}_above1 = Cast<to = 1>({name}_above)
    {name}_above_count = ReduceSum({name}_above1, final)
    {name}_room = Sub({name}_want, {name}_above_count)
    {name}_below = Not({name}_above)
    {name}_level = And({name}_within, {name}_below)
    {name}_level1 = Cast<to = 1>({name}_level)
    {int_(f"{name}_last", 3)}
    {name}_order = CumSum({name}_level1, {name}_last)
    {name}_early = LessOrEqual({name}_order, {name}_room)
    {name}_level_early = And({name}_level, {name}_early)
    {name}_with = Or({name}_above, {name}_level_early)
    """

    given = f"int64 {name}_i, bool {name}_c, {row} {name}_a, {row} {name}_b, {row} {name}_k"
    results = f"bool {name}_more, {row} {name}_a1, {row} {name}_b1, {row} {name}_k1"
    return f"""
    {name}_open = Not({sure})
    {name}_live = And({seen}, {name}_open)
    {name}_value = Where({name}_live, {rank}, unseen_rank)
    {name}_least = ReduceMin({rank}, final)
    {name}_top = ReduceMax({name}_value, final)
    {_past(name)}
    {name}_sure1 = Cast<to = 1>({sure})
    {name}_sure_count = ReduceSum({name}_sure1, final)
    {float_(f"{name}_all", count)}
    {name}_left0 = Sub({name}_all, {name}_sure_count)
    {name}_left = Max({name}_left0, absent)
    {name}_there = GreaterOrEqual({name}_value, {name}_least)
    {name}_there1 = Cast<to = 1>({name}_there)
    {name}_live_count = ReduceSum({name}_there1, final)
    {name}_want = Min({name}_left, {name}_live_count)
    {name}_excess0 = Sub({name}_live_count, {name}_want)
    {name}_most0 = ReduceMax<keepdims = 0>({name}_excess0)
    {name}_go = Greater({name}_most0, absent)
    {float_(f"{name}_half", 0.5)}
    {int_(f"{name}_limit", HALVINGS)}
    {name}_low, {name}_high, {name}_count =
    Loop<body = {name}_halve ({given}) => ({results}) {{ {flat(halve)} }}>
    ({name}_limit, {name}_go, {name}_least, {name}_past, {name}_live_count)
    {name}_within = GreaterOrEqual({name}_value, {name}_low)
    {name}_excess2 = Sub({name}_count, {name}_want)
    {name}_most2 = ReduceMax<keepdims = 0>({name}_excess2)
    {name}_equals = Greater({name}_most2, absent)
    {name}_best = If<
    then_branch = {name}_ties () => ({whole} {name}_with) {{ {flat(ties)} }},
    else_branch = {name}_none () => ({whole} {name}_alone) {{ {name}_alone = Identity({name}_within) }}
    >({name}_equals)
    {name}_best_live = And({name}_best, {name}_live)
    {name}_taken = Or({name}_best_live, {sure})
    """


def highest(name: str, scores: str, count: int, rows: str, width: int, slots: str) -> str:
    """Write ``NAME_taken [...,U,N]``, 1 for the ``count`` highest of each row of ``NAME_rank``.

    Of equals those go first whose ``slots [...,N]`` do, which may stand in any order. ``NAME_rank`` is ``scores`` of
    what may be taken, ``forced_rank`` of what must be, and far less of the rest; ``rows`` are the sizes of the other
    axes, ``width`` is N. Two numbers that are compared everywhere cost less
    than the order of any, and far less than Where: the least rank taken is searched as in :func:`first`, but where
    scores are spread evenly between the ends of the interval their counts tell where it lies.
    """
    row, whole, axis = f"float[{rows},1]", f"float[{rows},{width}]", rows.count(",") + 1

    def counted(least: str, made: str) -> str:
        return f"""
        {made}_over = GreaterOrEqual({name}_rank, {least})
        {made}_over1 = Cast<to = 1>({made}_over)
        {made} = ReduceSum({made}_over1, final)
        """

    halve = f"""
    {name}_between = Add({name}_k, {name}_h)
    {name}_share0 = Div({name}_k, {name}_between)
    {name}_share1 = Mul({name}_share0, {name}_trust)
    {name}_share2 = Add({name}_share1, {name}_doubt)
    {name}_guess = Less({name}_i, {name}_guesses)
    {name}_share = Where({name}_guess, {name}_share2, {name}_half)
    {name}_range = Sub({name}_b, {name}_a)
    {name}_part = Mul({name}_range, {name}_share)
    {name}_middle = Add({name}_a, {name}_part)
    {counted(f"{name}_middle", f"{name}_found")}
    {name}_beyond = Sub({name}_found, {name}_want)
    {name}_enough = GreaterOrEqual({name}_beyond, absent)
    {name}_lack = Neg({name}_beyond)
    {name}_a1 = Where({name}_enough, {name}_middle, {name}_a)
    {name}_b1 = Where({name}_enough, {name}_b, {name}_middle)
    {name}_k1 = Where({name}_enough, {name}_beyond, {name}_k)
    {name}_h1 = Where({name}_enough, {name}_h, {name}_lack)
    {name}_most = ReduceMax<keepdims = 0>({name}_k1)
    {name}_more = Greater({name}_most, absent)
    """
    ties = f"""
    {name}_above = GreaterOrEqual({name}_rank, {name}_high)
    {name}_above1 = Cast<to = 1>({name}_above)
    {name}_above_count = ReduceSum({name}_above1, final)
    {name}_room = Sub({name}_want, {name}_above_count)
    {name}_level1 = Sub({name}_whole, {name}_above1)
    {int_(f"{name}_last", axis)}
    {ints(f"{name}_width", width)}
    {ints(f"{name}_before_last", axis - 1)}
    {name}_in_order, {name}_from0 = TopK<axis = {axis - 1}, largest = 0, sorted = 1>({slots}, {name}_width)
    {name}_back, {name}_to0 = TopK<axis = {axis - 1}, largest = 0, sorted = 1>({name}_from0, {name}_width)
    {name}_from1 = Unsqueeze({name}_from0, {name}_before_last)
    {name}_to1 = Unsqueeze({name}_to0, {name}_before_last)
    {name}_all_rows = Shape({name}_level1)
    {name}_from = Expand({name}_from1, {name}_all_rows)
    {name}_to = Expand({name}_to1, {name}_all_rows)
    {name}_level_ordered = GatherElements<axis = {axis}>({name}_level1, {name}_from)
    {name}_order0 = CumSum({name}_level_ordered, {name}_last)
    {name}_order = GatherElements<axis = {axis}>({name}_order0, {name}_to)
    {name}_early = LessOrEqual({name}_order, {name}_room)
    {name}_early1 = Cast<to = 1>({name}_early)
    {name}_level_early = Mul({name}_level1, {name}_early1)
    {name}_with = Add({name}_above1, {name}_level_early)
    """
    given = f"int64 {name}_i, bool {name}_c, {row} {name}_a, {row} {name}_b, {row} {name}_k, {row} {name}_h"
    results = f"bool {name}_more, {row} {name}_a1, {row} {name}_b1, {row} {name}_k1, {row} {name}_h1"
    return f"""
    {name}_least = ReduceMin({scores}, final)
    {name}_top = ReduceMax({scores}, final)
    {_past(name)}
    {counted(f"{name}_least", f"{name}_there")}
    {float_(f"{name}_all", count)}
    {name}_want = Min({name}_there, {name}_all)
    {name}_excess0 = Sub({name}_there, {name}_want)
    {name}_most0 = ReduceMax<keepdims = 0>({name}_excess0)
    {name}_go = Greater({name}_most0, absent)
    {name}_short0 = Add({name}_want, one_float)
    {float_(f"{name}_half", 0.5)}
    {float_(f"{name}_trust", 0.85)}
    {float_(f"{name}_doubt", 0.075)}
    {int_(f"{name}_guesses", GUESSES)}
    {int_(f"{name}_limit", GUESSES + HALVINGS)}
    {name}_low, {name}_high, {name}_excess, {name}_short =
    Loop<body = {name}_halve ({given}) => ({results}) {{ {flat(halve)} }}>
    ({name}_limit, {name}_go, {name}_least, {name}_past, {name}_excess0, {name}_short0)
    {name}_reached = GreaterOrEqual({name}_rank, {name}_low)
    {name}_whole = Cast<to = 1>({name}_reached)
    {name}_most2 = ReduceMax<keepdims = 0>({name}_excess)
    {name}_equals = Greater({name}_most2, absent)
    {name}_taken = If<
    then_branch = {name}_ties () => ({whole} {name}_with) {{ {flat(ties)} }},
    else_branch = {name}_alone () => ({whole} {name}_same) {{ {name}_same = Identity({name}_whole) }}
    >({name}_equals)
    """
