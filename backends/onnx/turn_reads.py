"""What the tokens of a turn read, in ``memc::refreshed_attention``; letters as in ``turns``.

What any of them may read is fetched for all of them: the sinks, what their list holds beside, and what lies from where
the window of the first begins to the last. In this order they are N slots, and of each every token has a bias.
"""

from __future__ import annotations

from dataclasses import dataclass

from memc.backends.onnx import listed
from memc.backends.onnx.attend import Scores
from memc.backends.onnx.functions import int_, ints
from memc.backends.onnx.listed import FORCED
from memc.dialect.sparse_attention import pages_of
from memc.kernels.sparse_attention.choose import Rule

TOKENS = 64
"""Tokens of the turns of a step, where each has fewer."""

FETCHED = 16384
"""Most tokens that a step fetches for a row and key-value head, where it takes more than one turn."""


LANES = 16
"""Numbers of a vector of the processor."""


@dataclass(frozen=True)
class Turns:
    """Sizes of a step: turns, and of each the pages, or tokens where these are listed, of which its tokens read.

    ``sunk`` are those of the sinks, ``listed`` those that a list may hold beside sinks and window, ``near`` those from
    where the window of the first token begins to the last token, or past it. ``width`` are all of their tokens, N.
    """

    count: int
    sunk: int
    listed: int
    near: int
    width: int

    @staticmethod
    def of(c: Rule) -> Turns:
        """Return the sizes for a rule."""
        if c.by_token:
            sunk, least, near = c.sinks, c.window, max(c.window, c.page) + c.refresh - 1
        else:
            sunk, least = int(pages_of(c.sinks, c.page)), (c.window - 1) // c.page + 1
            near = int(pages_of(c.window + c.refresh - 2, c.page)) + 1
        # What is always taken stands in front of a list, and is this at least where there is anything else.
        others = max(1, c.most - sunk - least)
        # Rows of whole vectors: products and sums of odd ones take half as long again.
        near += -(sunk + others + near) % (LANES if c.by_token else 1)
        width = (sunk + others + near) * c.unit
        return Turns(max(1, min(TOKENS // c.refresh, FETCHED // width)), sunk, others, near, width)


def candidates(s: Scores, c: Rule, turns: Turns) -> str:
    """Write ``turn_slots [B,G,K,N]``, what the tokens of a turn may read, and what each may of them.

    ``sunk_bias`` and ``near_bias [B,1,K,U,.]``, ``listed_bias [B,G,K,U,.]`` are 0 for what a token takes and far less
    for the rest. The slot of what is not there is the spare one.
    """
    # A token at p takes what is always to be taken, and from the front of the list what there is room for beside: of a
    # list that a token at a made, whose front is what that one always takes, all but as many at its end as p is newer.
    start = c.most - turns.listed
    crowded = f"""
    {int_("most_taken_less", c.most - turns.sunk - 1)}
    near_from_each = Max(edge_each, sinks_end)
    near_each = Sub(newest_each, near_from_each)
    near_room = Sub(most_taken_less, near_each)
    near_end = Add(near_from, near_room)
    near_end_slot = Mul(near_end, {"one" if c.by_token else "page"})
    near_fits = Less(near_slots, near_end_slot)
    near_new = GreaterOrEqual(near_slots, near_first_slot)
    near_kept = Or(near_new, near_fits)
    near_read = And(near_seen, near_kept)
    """
    unit = "one" if c.by_token else "page"
    return f"""
    {ints("each_shape", 0, 1, turns.count, c.refresh, 1)}
    each = Reshape(at, each_shape)
    {ints("turn_shape", 0, 1, turns.count, 1, 1)}
    turn_at = Reshape(start, turn_shape)
    {_reach(c, "each", "each")}
    {_reach(c, "turn_at", "turn")}
    edge_list = Squeeze(edge_turn, final)
    {ints("listed_from", start)}
    {ints("listed_to", c.most)}
    listed0 = Slice(lists, listed_from, listed_to, last_axis)
    listed_behind = GreaterOrEqual(listed0, sinks_end)
    listed_before = Less(listed0, edge_list)
    listed_there = And(listed_behind, listed_before)
    listed_there_1 = Cast<to = 7>(listed_there)
    listed_kept = Mul(listed0, listed_there_1)
    listed_not = Sub(one, listed_there_1)
    listed_far = Mul(listed_not, far)
    listed_number = Add(listed_kept, listed_far)
    listed_places = Constant<value_ints = [{", ".join(map(str, range(start, c.most)))}]>()
    listed_place = Add(listed_places, listed_far)
    {ints("query_axis", 3)}
    listed_place_row = Unsqueeze(listed_place, query_axis)
    newer = Sub(newest_each, newest_turn)
    {int_("most_taken", c.most)}
    listed_end = Sub(most_taken, newer)
    listed_read = Less(listed_place_row, listed_end)
    listed_read_1 = Cast<to = 1>(listed_read)
    listed_less = Sub(listed_read_1, one_float)
    {_of_units(s, c, turns)}
    {int_("near_units", turns.near)}
    near_ahead = Range(zero, near_units, one)
    near_from = Max(edge_turn, sinks_end)
    near_number = Add(near_from, near_ahead)
    {int_("near_count", turns.near * c.unit)}
    near_inside = Range(zero, near_count, one)
    near_start = Mul(near_from, {unit})
    near_slots = Add(near_start, near_inside)
    near_seen = LessOrEqual(near_slots, each)
    near_first_slot = Mul(edge_each, {unit})
    {crowded if turns.sunk + turns.near > c.most else "near_read = Identity(near_seen)"}
    {_bias("near_read", "near_bias")}
    {int_("sunk_count", turns.sunk * c.unit)}
    sunk_slots = Range(zero, sunk_count, one)
    sunk_seen = LessOrEqual(sunk_slots, each)
    {_bias("sunk_seen", "sunk_bias")}
    {ints("each_group", 1, s.groups, 1, 1, 1)}
    {ints("sunk_shape", 1, 1, 1, -1)}
    sunk_row = Reshape(sunk_slots, sunk_shape)
    near_row = Squeeze(near_slots, query_axis)
    {ints("each_turn", 1, s.groups, turns.count, 1)}
    batch_nought = Sub(edge_list, edge_list)
    sunk_by_row = Add(sunk_row, batch_nought)
    sunk_by_turn = Expand(sunk_by_row, each_turn)
    near_by_turn = Expand(near_row, each_turn)
    all_slots = Concat<axis = 3>(sunk_by_turn, listed_slots, near_by_turn)
    turn_slots = Min(all_slots, spare)
    {_page_numbers(s, c, turns) if c.grouped else ""}
    """


def _reach(c: Rule, at: str, tag: str) -> str:
    """Write ``newest_TAG`` and ``edge_TAG``: the last page, or token, of those ``at``, and the first in the window."""
    own_page = f"""
    newest_{tag} = Identity({at})
    own_page_{tag} = Div({at}, page)
    own_start_{tag} = Mul(own_page_{tag}, page)
    edge_{tag} = Min(behind_{tag}, own_start_{tag})
    """
    pages = f"""
    newest_{tag} = Div({at}, page)
    within_{tag} = Max(behind_{tag}, zero)
    edge_{tag} = Div(within_{tag}, page)
    """
    return f"""
    behind_{tag} = Sub({at}, back)
    {own_page if c.by_token else pages}
    """


def _of_units(s: Scores, c: Rule, turns: Turns) -> str:
    """Write ``listed_slots [B,G,K,.]`` and ``listed_bias [B,G,K,U,.]`` of the tokens of what is listed."""
    if c.by_token:
        return """
        listed_slots = Identity(listed_number)
        listed_bias = Mul(listed_less, forced_rank)
        """
    return f"""
    listed_start_slot = Mul(listed_number, page)
    listed_column = Unsqueeze(listed_start_slot, final)
    page_inside = Range(zero, page, one)
    listed_each = Add(listed_column, page_inside)
    {ints("listed_flat", 0, s.groups, turns.count, -1)}
    listed_slots = Reshape(listed_each, listed_flat)
    listed_less_column = Unsqueeze(listed_less, final)
    far_for_each = Constant<value_floats = [{", ".join([repr(FORCED)] * c.page)}]>()
    listed_bias_wide = Mul(listed_less_column, far_for_each)
    {ints("listed_bias_flat", 0, s.groups, turns.count, c.refresh, turns.listed * c.page)}
    listed_bias = Reshape(listed_bias_wide, listed_bias_flat)
    """


def _page_numbers(s: Scores, c: Rule, turns: Turns) -> str:
    """Write ``turn_pages [B,G,K,1,N/page]``, the numbers of the pages fetched."""
    return f"""
    {int_("sunk_pages", turns.sunk)}
    sunk_numbers = Range(zero, sunk_pages, one)
    sunk_number_row = Reshape(sunk_numbers, sunk_shape)
    sunk_number_by_row = Add(sunk_number_row, batch_nought)
    sunk_number_by_turn = Expand(sunk_number_by_row, each_turn)
    near_number_row = Squeeze(near_number, query_axis)
    near_number_by_turn = Expand(near_number_row, each_turn)
    all_numbers = Concat<axis = 3>(sunk_number_by_turn, listed_number, near_number_by_turn)
    turn_pages = Unsqueeze(all_numbers, query_axis)
    """


def joined(what: str) -> str:
    """Write ``all_WHAT [B,G,K,U,N]`` of that of the sinks, that of what is listed and that of what is near."""
    return f"""
    sunk_{what}_each = Expand(sunk_{what}, each_group)
    near_{what}_each = Expand(near_{what}, each_group)
    all_{what} = Concat<axis = 4>(sunk_{what}_each, listed_bias, near_{what}_each)
    """


def _bias(read: str, made: str) -> str:
    """Write ``made``, 0 for what is ``read`` and far less for the rest."""
    return f"""
    {made}_1 = Cast<to = 1>({read})
    {made}_0 = Sub({made}_1, one_float)
    {made} = Mul({made}_0, forced_rank)
    """


def masked(read: str, made: str) -> str:
    """Write ``made``, the ``capped_score`` of what is ``read`` and far less for the rest."""
    return f"""
    {_bias(read, "read_bias")}
    read_bias_heads = Unsqueeze(read_bias, heads_at)
    {made} = Add(capped_score, read_bias_heads)
    """


def ranked_again(c: Rule, turns: Turns) -> str:
    """Write ``all_bias [B,G,K,U,N]``: of the candidates of each query the ``budget`` of the highest scores."""
    return f"""
    near_new_from = Sub(each, back)
    near_sure0 = GreaterOrEqual(near_slots, near_new_from)
    near_sure = And(near_sure0, near_seen)
    near_rank = Where(near_sure, forced_rank, near_bias)
    sunk_sure0 = Less(sunk_slots, sinks)
    sunk_sure = And(sunk_sure0, sunk_seen)
    sunk_rank = Where(sunk_sure, forced_rank, sunk_bias)
    {joined("rank")}
    score_best = ReduceMax<keepdims = 0>(score, heads_at)
    again_rank = Add(score_best, all_rank)
    {listed.highest("again", "score_best", c.budget, f"B,G,{turns.count},{c.refresh}", turns.width, "turn_slots")}
    again_less = Sub(again_taken, one_float)
    all_bias = Mul(again_less, forced_rank)
    """
