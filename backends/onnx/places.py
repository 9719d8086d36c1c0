"""Where the tokens of a call go in buffers whose slot is the position, and which pages they touch."""

from __future__ import annotations

from memc.backends.onnx.attend import by_group
from memc.backends.onnx.functions import int_, ints


def token_slots(groups: int, page: int) -> str:
    """Write ``index [B,G,T,3]``, the slots of the new tokens, and ``described [1]``, the pages in use.

    ``positions [B,T]``; the last slot of the buffer ``[B,G,C,.]`` takes ``padding``. On the way ``highest``, ``used``
    and ``spare [1]``, the highest position, the tokens held and that last slot.
    """
    return f"""
    {int_("zero", 0)}
    {int_("one", 1)}
    {ints("ones", 1)}
    {int_("page", page)}
    {ints("time", 1)}
    {ints("slot_axes", 1, 3)}
    highest = ReduceMax<keepdims = 0>(positions)
    length0 = Add(highest, one)
    length = Max(length0, one)
    used = Reshape(length, ones)
    {int_("round", page - 1)}
    rounded = Add(used, round)
    described = Div(rounded, page)
    capacity = Shape<start = 2, end = 3>(buffer)
    spare = Sub(capacity, ones)
    padding = Less(positions, zero)
    slot0 = Where(padding, spare, positions)
    slot1 = Unsqueeze(slot0, slot_axes)
    {by_group(groups)}
    slot = Add(slot1, nought)
    index = Concat<axis = -1>(row, group, slot)
    """


def touched_pages(groups: int, page: int, span: int = 1, index: str = "page_index") -> str:
    """Write ``page1 [B,n]``, the numbers of n pages from ``first_page [B,1]`` on, which hold every new token of a row.

    And ``page3 [B,G,n,1]`` and ``index [B,G,n,3]``, by group and as an index of that name; pages past the last of
    ``pages [B,G,M,...]``, each of which has ``span`` of them, are that one. ``count [1]`` is n, ``tokens [1]`` those of
    a row.
    """
    return f"""
    tokens = Shape<start = 1, end = 2>(positions)
    {int_("round_less", page - 2)}
    spread = Add(tokens, round_less)
    further = Div(spread, page)
    count = Add(further, one)
    count0 = Squeeze(count)
    ahead = Range(zero, count0, one)
    page0 = Add(first_page, ahead)
    pages_held = Shape<start = 2, end = 3>(pages)
    {ints("pages_each", span)}
    pages_room = Mul(pages_held, pages_each)
    last_page = Sub(pages_room, ones)
    page1 = Min(page0, last_page)
    {by_group(groups, "page1", "_page")}
    page2 = Unsqueeze(page1, slot_axes)
    page3 = Add(page2, nought_page)
    {index} = Concat<axis = -1>(row_page, group_page, page3)
    """
