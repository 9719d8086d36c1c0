"""The grouped softmax over pages and their landmarks, in ``memc::sparse_attention``; letters as in ``sparse``, N pages.

A softmax of two levels: within every page, and over the pages, each of which weighs what its tokens do together, or
where it is read through its landmark what that does. So scores are gone through as often as by a softmax of one level.
"""

from __future__ import annotations

from dataclasses import replace

from memc.backends.onnx.attend import MASKED, Scores, cap, weigh
from memc.backends.onnx.functions import float_, int_, ints
from memc.kernels.sparse_attention.choose import Rule


def of_token(s: Scores, c: Rule, per_head: tuple[int, ...]) -> str:
    """Write the ``weight [B,G,R,M]`` of ``scores [B,G,M,R]``, of tokens on the pages ``picked`` that are ``live``."""
    return f"""
    behind_sinks = GreaterOrEqual(picked, sinks_end)
    before_window = Less(picked, edge)
    through = And(behind_sinks, before_window)
    {unread(c)}
    read = And(live, landmarks_not)
    mask = Unsqueeze(read, along)
    score_by_head = Transpose<perm = [0, 1, 3, 2]>(scores)
    {float_("masked_token", MASKED)}
    {capped(s, "score_by_head")}
    masked_score = Where(mask, capped_score, masked_token)
    {weigh_pages(s, c, 3, per_head)}
    """


def of_block(
    s: Scores,
    c: Rule,
    masked: str,
    per_head: tuple[int, ...],
    pages: tuple[str, str, str] = ("page_numbers", "sink_pages", "edge_page"),
) -> str:
    """Write the ``weight [B,G,R,U,L]`` of ``score``; ``masked`` writes ``masked_score``, of what is in ``read``.

    That is ``mask0`` less landmarks; L is whole pages. ``pages`` name the numbers of these, the end of the sinks and
    the page that the window begins on. There may be other axes before that of the heads.
    """
    numbers, sinks, edge = pages
    return f"""
    behind_sinks = GreaterOrEqual({numbers}, {sinks})
    before_window = Less({numbers}, {edge})
    through = And(behind_sinks, before_window)
    {unread(c)}
    read = And(mask0, landmarks_not)
    {capped(s, "score")}
    {masked}
    {weigh_pages(s, c, len(per_head) - 1, per_head, len(per_head) - 3)}
    """


def capped(s: Scores, score: str) -> str:
    """Write ``capped_score``."""
    return cap(s.softcap, score, "capped_score") if s.softcap else f"capped_score = Identity({score})"


def unread(c: Rule) -> str:
    """Write ``landmarks_not [...,N page]``: what is no landmark of pages ``through [...,N]`` theirs."""
    return f"""
    {ints("each_page", -1)}
    through_column = Unsqueeze(through, each_page)
    {int_("landmark_place", c.page - 1)}
    page_places = Range(zero, page, one)
    last_of_page = Equal(page_places, landmark_place)
    landmarks_paged = And(through_column, last_of_page)
    through_shape = Shape<end = -1>(through)
    landmarks_shape = Concat<axis = 0>(through_shape, each_page)
    landmarks = Reshape(landmarks_paged, landmarks_shape)
    landmarks_not = Not(landmarks)
    """


def weigh_pages(s: Scores, c: Rule, axes: int, per_head: tuple[int, ...], heads: int = 2) -> str:
    """Write ``weight``, and ``none`` and ``log`` as :func:`weigh`, of ``masked_score`` and ``capped_score``.

    These have so many axes before that of the tokens, one of them that of the ``heads``; ``through`` has all but it.
    """
    return f"""
    {ints("scores_paged", *[0] * axes, -1, c.page)}
    {ints("scores_flat", *[0] * axes, -1)}
    {ints("within_page", axes + 1)}
    {ints("heads_axis", heads)}
    {float_("none_read", MASKED / 2)}
    scores_in_page = Reshape(masked_score, scores_paged)
    top_in_page = ReduceMax(scores_in_page, within_page)
    from_top = Sub(scores_in_page, top_in_page)
    exp_in_page = Exp(from_top)
    sum_in_page = ReduceSum(exp_in_page, within_page)
    log_sum = Log(sum_in_page)
    together = Add(top_in_page, log_sum)
    {ints("landmark_at", c.page - 1)}
    unmasked_pages = Reshape(capped_score, scores_paged)
    landmark = Gather<axis = {axes + 1}>(unmasked_pages, landmark_at)
    through_heads = Unsqueeze(through_column, heads_axis)
    any_read = Greater(top_in_page, none_read)
    by_landmark = And(through_heads, any_read)
    weighed_page = Where(by_landmark, landmark, together)
    score0 = Squeeze(weighed_page, within_page)
    {weigh(replace(s, mask=False, softcap=0.0), per_head, "weight_of_page")}
    weight_column = Unsqueeze(weight_of_page, within_page)
    each_share = Div(weight_column, sum_in_page)
    weight_paged = Mul(exp_in_page, each_share)
    weight = Reshape(weight_paged, scores_flat)
    """
