"""The lowered form of ``memc::refreshed_attention``, as an ONNX function; letters as in ``sparse``.

As ``memc::sparse_attention``, whose tokens choose one after the other through a Scan, here always: the list that they
take from goes from step to step, and only a token whose turn it is scores what is held.
"""

from __future__ import annotations

from memc.backends.onnx import tokens
from memc.backends.onnx.attend import Scores
from memc.backends.onnx.functions import Function, flat, int_, ints
from memc.backends.onnx.sparse import COLUMNS, attending, behind_dense, optional
from memc.dialect.sparse_attention import pages_of
from memc.kernels.sparse_attention.choose import Rule

_FAR = 1 << 40
"""Number of a page or token that is not there."""


def refreshed_attention(s: Scores, c: Rule, kernel: bool) -> Function:
    """Write keys, values and the descriptions of the pages they touch into the state, then attend."""
    made = ["sparse_part", *(["sparse_log"] if s.lse else [])]
    sizes = [("output", s.value_dim), *([("lse", 1)] if s.lse else [])]
    held = f"int64[B,{s.groups},{c.most}]"
    inputs = f"{held} listed, float[B,{s.heads},{s.key_dim}] q, int64[B] at"
    outputs = [f"{held} next_listed", f"float[B,{s.heads},{s.value_dim}] o"]
    outputs += [f"float[B,{s.heads},1] l"] if s.lse else []
    step = f"step ({inputs}) => ({', '.join(outputs)}) {{ {flat(_step(s, c))} }}"
    axes = f"scan_input_axes = [2, 1], scan_output_axes = [{', '.join('2' for _ in made)}]"
    scan = f"Scan<num_scan_inputs = 2, {axes}, body = {step}>(choice, sparse_query, sparse_at)"
    body = f"""
    {COLUMNS}
    {tokens.numbers(c)}
    sparse_choice_yes, {", ".join(made)} = {scan}
    {behind_dense(made)}
    """
    choosing = f"""
    {int_("no_number", -1)}
    starts0 = Equal(positions, zero)
    starts1 = Cast<to = 7>(starts0)
    starts2 = ReduceMax(starts1, time)
    starts3 = Greater(starts2, zero)
    starts = Unsqueeze(starts3, along)
    choice = Where(starts, no_number, past_choice)
    {optional("sparse", "is_sparse", sizes, s.heads, body, {"choice": (held, "choice")})}
    next_choice = Identity(sparse_choice)
    """
    return attending("RefreshedAttention", s, c, kernel, choosing, ("choice",))


def _step(s: Scores, c: Rule) -> str:
    """Write one token: ``q [B,H,D]`` at ``at [B]`` gives ``o [B,H,E]`` and the list ``next_listed`` that it leaves."""
    held = f"int64[B,{s.groups},{c.most}]"
    relisted = f"""
    {tokens.estimates(c)}
    {tokens.ranked()}
    room_shape = Shape(listed)
    room0 = ConstantOfShape(room_shape)
    room = Add(room0, unseen_rank)
    rank2 = Concat<axis = 2>(rank1, room)
    {ints("most", c.most)}
    best, picked0 = TopK<axis = 2, sorted = 1>(rank2, most)
    there = Greater(best, unseen_rank)
    relisted0 = Where(there, picked0, no_number)
    relisted = Where(turn, relisted0, listed)
    """
    return f"""
    {tokens.start(s, c)}
    {tokens.always(c)}
    {int_("dense_below", c.dense_below)}
    {int_("refresh", c.refresh)}
    since = Sub(p, dense_below)
    left = Mod(since, refresh)
    on_turn = Equal(left, zero)
    chooses = GreaterOrEqual(since, zero)
    real = GreaterOrEqual(p, zero)
    turn0 = And(on_turn, chooses)
    turn = And(turn0, real)
    turns = Cast<to = 7>(turn)
    some0 = ReduceMax<keepdims = 0>(turns)
    some = Greater(some0, zero)
    next_listed = If<
    then_branch = choose () => ({held} relisted) {{ {flat(relisted)} }},
    else_branch = keep () => ({held} same) {{ same = Identity(listed) }}
    >(some)
    {_picked(s, c)}
    {tokens.slots(c)}
    {tokens.read(s, c)}
    """


def _picked(s: Scores, c: Rule) -> str:
    """Write ``picked [B,G,M]``, in order: what is always taken, then what is listed first; far ones for none."""
    near = max(c.window, c.page) if c.by_token else pages_of(c.window - 1, c.page) + 1
    return f"""
    {int_("near_count", near)}
    ahead = Range(zero, near_count, one)
    edge2 = Max(edge, sinks_end)
    near0 = Add(edge2, ahead)
    sinks_ = Range(zero, sinks_end, one)
    nought = Mul(edge, zero)
    sinks0 = Add(nought, sinks_)
    {ints("by_group", 1, s.groups, 1)}
    must0 = Concat<axis = 2>(sinks0, near0)
    must = Expand(must0, by_group)
    must_there = LessOrEqual(must, newest)
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
    {int_("far", _FAR)}
    numbered = Where(taken_there, all, far)
    {ints("taken_count", c.most)}
    picked, picked_order = TopK<axis = 2, largest = 0, sorted = 1>(numbered, taken_count)
    """
