"""The tree search over pages that ``method=hip`` ranks by: ranges are halved, and the best halves go on."""

from __future__ import annotations

from tvm.script import tirx as T

from memc.backends.tvm.kernels.choose import FIRST, NEVER, find_least, ordered, take
from memc.backends.tvm.kernels.common import LOWEST, SLOTS
from memc.backends.tvm.kernels.rank import force


@T.inline
def _score(names, s, b, g, t, n, best):
    # Leaves in ``best[0]`` the number that page ``n`` is ranked by: the highest product with the heads of the group.
    product = T.alloc_buffer((s.vector,), "float32", scope="local")
    total = T.alloc_buffer((2,), "float32", scope="local")
    total[1] = T.float32(LOWEST)
    for i in T.serial(s.share):
        for j in T.vectorized(s.vector):
            product[j] = T.float32(0)
        for d in T.serial(s.key_dim // s.vector):
            for j in T.vectorized(s.vector):
                product[j] = product[j] + (
                    names["q"][b, g * s.share + i, t, d * s.vector + j] * names["pages"][b, g, n, d * s.vector + j]
                )
        total[0] = T.float32(0)
        for j in T.serial(s.vector):
            total[0] = total[0] + product[j]
        total[1] = T.max(total[1], total[0] * T.float32(s.scale))
    best[0] = ordered(total[1])


@T.inline
def _halve(names, s, b, g, t, count, left, right, most):
    # Halves ``count`` ranges of pages, from ``left`` to before ``right``, and keeps the best ``count`` in order. Of
    # each the first half is the shorter one; it is scored by the page in its middle, and of none if it has no pages.
    half = T.alloc_buffer((1, -(-2 * most // SLOTS) * SLOTS), "int32", scope="local")
    ends = T.alloc_buffer((2, 2 * most), "int64", scope="local")
    best = T.alloc_buffer((1,), "int32", scope="local")
    least = T.alloc_buffer((2,), "int32", scope="local")
    kept = T.alloc_buffer((1,), "int64", scope="local")
    blocks = T.ceildiv(2 * count, T.int64(SLOTS))
    for n in T.serial(blocks * SLOTS):
        half[0, n] = T.int32(NEVER)
    for n in T.serial(count):
        ends[0, 2 * n] = left[n]
        ends[1, 2 * n] = left[n] + (right[n] - left[n]) // 2
        ends[0, 2 * n + 1] = ends[1, 2 * n]
        ends[1, 2 * n + 1] = right[n]
    for n in T.serial(2 * count):
        if ends[0, n] < ends[1, n]:
            _score(names, s, b, g, t, ends[0, n] + (ends[1, n] - ends[0, n]) // 2, best)
            half[0, n] = best[0]
    find_least(half, 0, blocks, T.Cast("int32", count), least)
    kept[0] = T.int64(0)
    for n in T.serial(2 * count):
        take(half, 0, n, least, best)
        if best[0] > 0:
            left[kept[0]] = ends[0, n]
            right[kept[0]] = ends[1, n]
            kept[0] = kept[0] + 1


@T.inline
def search_pages(names, s, r, b, g, t, unit, p):  # noqa: D103
    # As ``rank_pages``, without looking at all of them: pages that the search for the token at position ``p`` does not
    # come by are never taken, and those it finds are always, where nobody asks for their order.
    left = T.alloc_buffer((r.most,), "int64", scope="local")
    right = T.alloc_buffer((r.most,), "int64", scope="local")
    best = T.alloc_buffer((1,), "int32", scope="local")
    rounds = T.alloc_buffer((1,), "int64", scope="local")
    end = T.max(p - (r.window - 1), T.int64(0)) // r.page
    start = T.min(T.int64(-(-r.sinks // r.page)), end)
    last = p // r.page
    count = T.min(r.most - (last + 1 - end) - start, end - start)
    for block in T.serial(last // SLOTS + 1):
        for j in T.vectorized(SLOTS):
            names["rank"][unit, block * SLOTS + j] = T.int32(NEVER)
    rounds[0] = T.int64(0)
    if count > 0:
        longest = T.ceildiv(end - start, count)
        for step in T.serial(31):
            if T.shift_left(T.int64(1), T.Cast("int64", step)) < longest:
                rounds[0] = T.Cast("int64", step) + 1
        for n in T.serial(count):
            left[n] = start + (end - start) * n // count
            right[n] = start + (end - start) * (n + 1) // count
    for _ in T.serial(rounds[0]):
        _halve(names, s, b, g, t, count, left, right, r.most)
    for n in T.serial(count):
        if r.refresh > 1:
            _score(names, s, b, g, t, left[n], best)
            names["rank"][unit, left[n]] = best[0]
        else:
            names["rank"][unit, left[n]] = T.int32(FIRST)
    force(names, r, unit, p)
