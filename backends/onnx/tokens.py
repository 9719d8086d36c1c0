"""The choice and the attention of one new token, in ``memc::sparse_attention``; letters as in ``sparse``."""

from __future__ import annotations

from memc.backends.onnx import blocks, eventful, landmarks, levels, listed, tree
from memc.backends.onnx.attend import Scores, weigh
from memc.backends.onnx.functions import float_, int_, ints
from memc.backends.onnx.listed import FAR, FORCED, UNSEEN
from memc.kernels.sparse_attention.choose import Rule


def step(s: Scores, c: Rule) -> str:
    """Write the choice and the attention of one token: ``q [B,H,D]`` at ``at [B]`` gives ``o [B,H,E]``."""
    searched = f"""
    {always(c)}
    {listed.always(s, c)}
    {levels.best(s, c) if c.by_level else tree.found(s, c)}
    {listed.picked(c)}
    {slots(c)}
    """
    scored = f"""
    {estimates(c)}
    {eventful.whole(c, "numbers", (1, s.groups, 1)) if c.by_event else ""}
    {candidates(c)}
    """
    return f"""
    {start(s, c)}
    {searched if c.by_tree or c.by_level else scored}
    {read(s, c)}
    """


def start(s: Scores, c: Rule) -> str:
    """Write what a token chooses by: ``q_columns [B,G,D,R]``, times the scale, its place ``p [B,1,1]``, and constants.

    Products have the held side on the left, whose rows are many, so that only the query is transposed.
    """
    return f"""
    {ints("grouped", 0, s.groups, s.heads // s.groups, s.key_dim)}
    q_rows = Reshape(q, grouped)
    {float_("factor", s.scale)}
    q_scaled = Mul(q_rows, factor)
    q_columns = Transpose<perm = [0, 1, 3, 2]>(q_scaled)
    {ints("at_axes", 1, 2)}
    p = Unsqueeze(at, at_axes)
    {float_("forced_rank", FORCED)}
    {float_("unseen_rank", UNSEEN)}
    {int_("sinks", c.sinks)}
    {int_("window", c.window)}
    """


def read(s: Scores, c: Rule) -> str:
    """Write the attention of one token to its ``candidates [B,G,M]``."""
    per_head = (1, s.groups, s.heads // s.groups, 1)
    weighed = f"""
    score0 = Transpose<perm = [0, 1, 3, 2]>(scores)
    mask = Unsqueeze(live, along)
    {weigh(s, per_head)}
    """
    return f"""
    {_tokens(c)}
    {landmarks.of_token(s, c, per_head) if c.grouped else weighed}
    value_index = Unsqueeze(chosen, last_axis)
    values = GatherND<batch_dims = 2>(next_value, value_index)
    sums = MatMul(weight, values)
    {ints("joined_heads", 0, s.heads, s.value_dim)}
    o = Reshape(sums, joined_heads)
    {log(s)}
    """


def log(s: Scores) -> str:
    """Write the log-sum-exp ``l [B,H,1]`` of one token, where it is asked for."""
    return f"{ints('log_shape', 0, s.heads, 1)}\nl = Reshape(log, log_shape)" if s.lse else ""


def numbers(c: Rule) -> str:
    """Write ``numbers [N]`` of what is ranked, and what the estimates are made from; nothing where few are searched."""
    if c.by_tree:
        return ""
    if c.by_level:
        return levels.in_use()
    if not c.by_token:
        return """
        in_use = Slice(next_pages, origin, described, along)
        described0 = Squeeze(described)
        numbers = Range(zero, described0, one)
        """
    return f"""
    {int_("page_", c.page)}
    length_ = Mul(described, page_)
    length0 = Squeeze(length_)
    numbers = Range(zero, length0, one)
    described0 = Squeeze(described)
    page_numbers = Range(zero, described0, one)
    page_column = Unsqueeze(page_numbers, ones)
    {ints("of_page", 1, 0)}
    page_part = Mul(page_column, of_page)
    {eventful.rows("length_") if c.by_event else ""}
    """


def estimates(c: Rule) -> str:
    """Write ``estimate [B,G,N]``, the scores of the pages or tokens by what describes them.

    Where tokens are ranked by their events it is ``own_estimate``.
    """
    if c.by_token:
        made = "own_estimate" if c.by_event else "estimate"
        return f"""
        magnitudes = Abs(q_columns)
        strength = ReduceSum<keepdims = 0>(magnitudes, last_axis)
        {ints("count_", c.channels)}
        strongest, channel = TopK<axis = 2>(strength, count_)
        channel_column = Unsqueeze(channel, last_axis)
        part = GatherND<batch_dims = 2>(q_columns, channel_column)
        part_rows = Transpose<perm = [0, 1, 3, 2]>(part)
        {ints("row_axes", 3, 4)}
        channel_at = Unsqueeze(channel, row_axes)
        {ints("of_channel", 0, 1)}
        channel_part = Mul(channel_at, of_channel)
        row_index = Add(channel_part, page_part)
        rows = GatherND<batch_dims = 2>(next_pages, row_index)
        {ints("row_shape", 0, 0, 0, -1)}
        row = Reshape(rows, row_shape)
        estimates = MatMul(part_rows, row)
        {made} = ReduceMax<keepdims = 0>(estimates, along)
        """
    return page_estimates(c)


def page_estimates(c: Rule) -> str:
    """Write ``estimate [B,G,N]``, the scores of the pages ``in_use [B,G,N,C]`` for ``q_columns [B,G,D,R]``."""
    return f"""
    {blocks.features(c, "q_columns", 2)}
    estimates = MatMul(in_use, feature)
    estimate = ReduceMax<keepdims = 0>(estimates, last_axis)
    """


def candidates(c: Rule) -> str:
    """Write ``candidates [B,G,M]``, the slots of the pages or tokens of the highest estimates, in order."""
    return f"""
    {always(c)}
    {ranked()}
    {ints("most", c.most)}
    number_count = Shape(numbers)
    count = Min(number_count, most)
    {_best(c)}
    {slots(c)}
    """


def _best(c: Rule) -> str:
    """Write ``picked [B,G,M]``, in order, the ``count`` highest of ``rank1``; fewer where these hold the mass."""
    if c.by_event:
        return eventful.best(c)
    if c.mass == 1:
        return """
        ranks, picked0 = TopK<axis = 2, sorted = 0>(rank1, count)
        picked, picked_order = TopK<axis = 2, largest = 0>(picked0, count)
        """
    return f"""
    ranks, picked0 = TopK<axis = 2, sorted = 1>(rank1, count)
    {listed.needed(c, "rank1", "ranks", 2)}
    {int_("beyond", FAR)}
    picked_needed = Where(needed, picked0, beyond)
    needed_count = Cast<to = 7>(needed)
    needed_sums = ReduceSum<keepdims = 0>(needed_count, along)
    needed_most = ReduceMax<keepdims = 0>(needed_sums)
    needed_least = Max(needed_most, one)
    needed_size = Reshape(needed_least, ones)
    picked, picked_order = TopK<axis = 2, largest = 0>(picked_needed, needed_size)
    """


def always(c: Rule) -> str:
    """Write what is always taken: pages or tokens before ``sinks_end``, and those from ``edge [B,1,1]`` on."""
    unit = "Identity(p)" if c.by_token else "Identity(own)"
    edge = """
    edge1 = Mul(own, page)
    edge = Min(edge0, edge1)
    """
    page_edge = """
    edge1 = Max(edge0, zero)
    edge = Div(edge1, page)
    """
    return f"""
    {int_("page", c.page)}
    own = Div(p, page)
    {int_("back", c.window - 1)}
    edge0 = Sub(p, back)
    {int_("sinks_end", c.sinks if c.by_token else -(-c.sinks // c.page))}
    {edge if c.by_token else page_edge}
    newest = {unit}
    """


def ranked() -> str:
    """Write ``rank1 [B,G,N]``: estimates, those of what is always taken and what may not be at the two ends."""
    return """
    seen = LessOrEqual(numbers, newest)
    near = GreaterOrEqual(numbers, edge)
    sunk = Less(numbers, sinks_end)
    taken = Or(near, sunk)
    rank0 = Where(taken, forced_rank, estimate)
    rank1 = Where(seen, rank0, unseen_rank)
    """


def slots(c: Rule) -> str:
    """Write ``candidates [B,G,M]``, the slots of the pages or tokens ``picked``; the spare one for those past it."""
    inside = f"""
    picked_start = Mul(picked, page)
    picked1 = Unsqueeze(picked_start, last_axis)
    inside = Range(zero, page, one)
    each0 = Add(picked1, inside)
    {ints("flat", 0, 0, -1)}
    each1 = Reshape(each0, flat)
    """
    return f"""
    {"each1 = Identity(picked)" if c.by_token else inside}
    slots_held = Shape<start = 2, end = 3>(next_key)
    spare = Sub(slots_held, ones)
    candidates = Min(each1, spare)
    """


def _tokens(c: Rule) -> str:
    """Write ``chosen [B,G,M]``, the slots that are read, ``live`` of them, and their products ``scores [B,G,M,R]``."""
    body = """
    key_index = Unsqueeze(candidates, last_axis)
    keys = GatherND<batch_dims = 2>(next_key, key_index)
    products = MatMul(keys, q_columns)
    live0 = LessOrEqual(candidates, p)
    """
    if c.rerank == 1:
        return body + "chosen = Identity(candidates)\nlive = Identity(live0)\nscores = Identity(products)"
    return f"""
    {body}
    best = ReduceMax<keepdims = 0>(products, last_axis)
    apart = Sub(p, candidates)
    token_near = Less(apart, window)
    token_sunk = Less(candidates, sinks)
    token_taken = Or(token_near, token_sunk)
    token_rank0 = Where(token_taken, forced_rank, best)
    token_rank = Where(live0, token_rank0, unseen_rank)
    {ints("budget", c.budget)}
    found = Shape<start = 2, end = 3>(candidates)
    token_count = Min(found, budget)
    token_ranks, kept = TopK<axis = 2, sorted = 0>(token_rank, token_count)
    chosen = GatherElements<axis = 2>(candidates, kept)
    live = GatherElements<axis = 2>(live0, kept)
    kept_index = Unsqueeze(kept, last_axis)
    scores = GatherND<batch_dims = 2>(products, kept_index)
    """
