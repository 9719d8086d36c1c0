"""The lowered form of ``memc::refreshed_attention``, as an ONNX function; letters as in ``sparse``.

Where few tokens of a call choose, they go one after the other through a Scan, as in ``memc::sparse_attention``: the
list that they take from goes from step to step, and only a token whose turn it is scores what is held. Where many do,
those that share a list go together (see :mod:`memc.backends.onnx.turns`).
"""

from __future__ import annotations

from collections.abc import Sequence

from memc.backends.onnx import blocks, levels, listed, tokens, tree, turns
from memc.backends.onnx.attend import Scores
from memc.backends.onnx.functions import Function, flat, int_, ints
from memc.backends.onnx.sparse import COLUMNS, attending, behind_dense, optional
from memc.kernels.sparse_attention.choose import Rule


def refreshed_attention(s: Scores, c: Rule, kernel: bool) -> Function:
    """Write keys, values and the descriptions of the pages they touch into the state, then attend."""
    made = ["sparse_part", *(["sparse_log"] if s.lse else [])]
    sizes = [("output", s.value_dim), *([("lse", 1)] if s.lse else [])]
    held = f"int64[B,{s.groups},{c.most}]"
    results = [f"{held} {{0}}_choice"]
    results += [f"float[B,{s.heads},W,{size}] {{0}}_{name}" for name, (_, size) in zip(made, sizes, strict=True)]

    def branch(name: str, body: str) -> str:
        return f"{name}_branch () => ({', '.join(results).format(name)}) {{ {flat(body)} }}"

    made_of = ", ".join(["sparse_choice_yes", *made])
    body = f"""
    {COLUMNS}
    {ints("few", blocks.FEW)}
    count_few = Greater(count_sparse, few)
    many = Squeeze(count_few)
    sparse_at_shape = Shape(sparse_at)
    {made_of} = If<
    then_branch = {branch("turn", turns.scan(s, c, made))},
    else_branch = {branch("token", _scan(s, c, made))}
    >(many)
    {behind_dense(made)}
    """
    choosing = f"""
    {int_("no_number", -1)}
    restarts0 = Equal(positions, zero)
    restarts1 = Cast<to = 7>(restarts0)
    restarts2 = ReduceMax(restarts1, time)
    restarts3 = Greater(restarts2, zero)
    restarts = Unsqueeze(restarts3, along)
    choice = Where(restarts, no_number, past_choice)
    {optional("sparse", "is_sparse", sizes, s.heads, body, {"choice": (held, "choice")})}
    next_choice = Identity(sparse_choice)
    """
    return attending("RefreshedAttention", s, c, kernel, choosing, ("choice",))


def _scan(s: Scores, c: Rule, made: Sequence[str]) -> str:
    """Write a Scan over tokens, one after the other, with the list going from one to the next."""
    held = f"int64[B,{s.groups},{c.most}]"
    inputs = f"{held} listed, float[B,{s.heads},{s.key_dim}] q, int64[B] at"
    outputs = [f"{held} next_listed", f"float[B,{s.heads},{s.value_dim}] o"]
    outputs += [f"float[B,{s.heads},1] l"] if s.lse else []
    step = f"step ({inputs}) => ({', '.join(outputs)}) {{ {flat(_step(s, c))} }}"
    axes = f"scan_input_axes = [2, 1], scan_output_axes = [{', '.join('2' for _ in made)}]"
    scanned = ", ".join(f"token_{name}" for name in ("choice", *made))
    return f"""
    {tokens.numbers(c)}
    {scanned} = Scan<num_scan_inputs = 2, {axes}, body = {step}>(choice, sparse_query, sparse_at)
    """


def _step(s: Scores, c: Rule) -> str:
    """Write one token: ``q [B,H,D]`` at ``at [B]`` gives ``o [B,H,E]`` and the list ``next_listed`` that it leaves."""
    held = f"int64[B,{s.groups},{c.most}]"
    return f"""
    {tokens.start(s, c)}
    {tokens.always(c)}
    {listed.always(s, c)}
    {int_("dense_below", c.dense_below)}
    {int_("refresh", c.refresh)}
    since = Sub(p, dense_below)
    past_turn = Mod(since, refresh)
    on_turn = Equal(past_turn, zero)
    chooses = GreaterOrEqual(since, zero)
    real = GreaterOrEqual(p, zero)
    turn0 = And(on_turn, chooses)
    turn = And(turn0, real)
    turns = Cast<to = 7>(turn)
    some0 = ReduceMax<keepdims = 0>(turns)
    some = Greater(some0, zero)
    next_listed = If<
    then_branch = choose () => ({held} relisted) {{ {flat(_chosen(s, c))} }},
    else_branch = keep () => ({held} same) {{ same = Identity(listed) }}
    >(some)
    {listed.picked(c)}
    {tokens.slots(c)}
    {tokens.read(s, c)}
    """


def _chosen(s: Scores, c: Rule) -> str:
    """Write ``relisted [B,G,M]``, the new lists of the rows whose ``turn`` it is, and the old ones of the others."""
    scored = f"""
    {tokens.estimates(c)}
    {tokens.ranked()}
    room_shape = Shape(listed)
    room0 = ConstantOfShape(room_shape)
    room = Add(room0, unseen_rank)
    rank2 = Concat<axis = 2>(rank1, room)
    """
    searched = f"""
    {(levels.search if c.by_level else tree.listed)(s, c)}
    must_rank = Where(must_there, forced_rank, unseen_rank)
    rank2 = Concat<axis = 2>(must_rank, found_rank)
    number2 = Concat<axis = 2>(must, found_number)
    """
    few = f"""
    {listed.needed(c, "rank1", "best", 2)}
    there = Identity(needed)
    """
    looked_for = c.by_tree or c.by_level
    return f"""
    {searched if looked_for else scored}
    {ints("most", c.most)}
    best, place2 = TopK<axis = 2, sorted = 1>(rank2, most)
    picked0 = {"GatherElements<axis = 2>(number2, place2)" if looked_for else "Identity(place2)"}
    {"there = Greater(best, unseen_rank)" if c.mass == 1 else few}
    relisted0 = Where(there, picked0, no_number)
    relisted = Where(turn, relisted0, listed)
    """
