"""The best of a list, as compiled: every count or share, ties by index, scores of both signs and zeros of both."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tvm.script import tirx as T

from memc.backends.tvm.kernels.choose import FIRST, NEVER, find_least, find_share, ordered, take
from memc.backends.tvm.kernels.common import SLOTS

Floats = np.ndarray[Any, np.dtype[np.float32]]


@cache
def compiled(*, keeps_ties: bool = True) -> Callable[[Floats, int], list[int]]:
    """Return a function that marks the best ``count`` of a row of scores; without ties kept, a planted fault."""

    @T.prim_func
    def best(x_: T.handle, count: T.int32, rank_: T.handle, y_: T.handle):
        size = T.int64()
        x = T.match_buffer(x_, (size,), "float32")
        rank = T.match_buffer(rank_, (1, size), "int32")
        y = T.match_buffer(y_, (size,), "int32")
        least = T.alloc_buffer((2,), "int32", scope="local")
        taken = T.alloc_buffer((1,), "int32", scope="local")
        for n in T.serial(size):
            rank[0, n] = ordered(x[n])
        find_least(rank, 0, size // SLOTS, count, least)
        if not keeps_ties:
            least[1] = count
        for n in T.serial(size):
            take(rank, 0, n, least, taken)
            y[n] = taken[0]

    built = tvm.compile(tvm.IRModule({"best": best}), target="llvm")

    def run(scores: Floats, count: int) -> list[int]:
        rank, marks = (tvm.runtime.tensor(np.zeros(shape, np.int32)) for shape in ((1, len(scores)), len(scores)))
        built["best"](tvm.runtime.tensor(scores), count, rank, marks)
        return [int(place) for place in np.flatnonzero(marks.numpy())]

    return run


def expected(scores: Floats, count: int) -> list[int]:
    """Return the places of the ``count`` highest, of equals the lower ones."""
    return sorted(sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:count])


# No subnormal numbers: other libraries of this process may have had the processor take them for zero.
VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-37, -3e38, 3e38]), st.floats(-9, 9, width=32, allow_subnormal=False)
)


@settings(max_examples=150)
@given(values=st.lists(VALUES, min_size=SLOTS, max_size=SLOTS * 3), count=st.integers(1, SLOTS * 3))
@example(values=[0.0, -0.0] * SLOTS, count=3)
def test_the_best_so_many_are_marked(values: list[float], count: int) -> None:
    scores = np.array(values[: len(values) // SLOTS * SLOTS], np.float32)
    count = min(count, len(scores))
    assert compiled()(scores, count) == expected(scores, count)


def test_a_count_that_forgets_ties_is_noticed() -> None:
    scores = np.array([1.0, 2.0] * (SLOTS // 2), np.float32)
    assert compiled()(scores, 10) == expected(scores, 10)
    with pytest.raises(AssertionError):
        assert compiled(keeps_ties=False)(scores, 10) == expected(scores, 10)


@cache
def compiled_share(*, counts_forced: bool = False) -> Callable[[Floats, float, int, int], list[int]]:
    """Return a function that marks the best of a row of scores that hold a share; with a planted fault or without.

    The first so many are always taken, the last so many never; neither holds anything of the whole.
    """

    @T.prim_func
    def best(x_: T.handle, before: T.int64, behind: T.int64, rank_: T.handle, weight_: T.handle, y_: T.handle):
        size = T.int64()
        x = T.match_buffer(x_, (size + 1,), "float32")
        rank = T.match_buffer(rank_, (1, size), "int32")
        weight = T.match_buffer(weight_, (1, size), "float32")
        y = T.match_buffer(y_, (size,), "int32")
        least = T.alloc_buffer((2,), "int32", scope="local")
        taken = T.alloc_buffer((1,), "int32", scope="local")
        for n in T.serial(size):
            rank[0, n] = ordered(x[n])
            if n < (0 if counts_forced else before):
                rank[0, n] = T.int32(FIRST)
            if n >= size - behind:
                rank[0, n] = T.int32(NEVER)
        find_share(rank, weight, 0, size // SLOTS, x[size], least)
        for n in T.serial(size):
            take(rank, 0, n, least, taken)
            y[n] = taken[0]

    built = tvm.compile(tvm.IRModule({"best": best}), target="llvm")

    def run(scores: Floats, share: float, before: int, behind: int) -> list[int]:
        kinds = (np.int32, np.float32, np.int32)
        sizes = ((1, len(scores)), (1, len(scores)), len(scores))
        memory = [tvm.runtime.tensor(np.zeros(size, kind)) for size, kind in zip(sizes, kinds, strict=True)]
        built["best"](tvm.runtime.tensor(np.append(scores, np.float32(share))), before, behind, *memory)
        return [int(place) for place in np.flatnonzero(memory[-1].numpy())]

    return run


def share_of(scores: Floats, share: float, before: int, behind: int) -> list[int]:
    """Return the places of the fewest best scores that hold the share, and of the first ``before``."""
    ranked = scores[before : len(scores) - behind].astype(np.float64)
    weight = np.exp(ranked - ranked.max(initial=-np.inf))
    order = np.argsort(-ranked, kind="stable")
    held = np.cumsum(weight[order]) - weight[order]
    return sorted([*range(before), *(before + int(n) for n in order[held < share * weight.sum()])])


@settings(max_examples=100)
@given(
    seed=st.integers(0, 10**6),
    blocks=st.integers(1, 3),
    share=st.sampled_from([0.03, 0.35, 0.7, 0.99]),
    before=st.integers(0, SLOTS),
    behind=st.integers(0, SLOTS),
)
@example(seed=0, blocks=1, share=0.5, before=9, behind=7)
def test_the_best_that_hold_a_share_are_marked(seed: int, blocks: int, share: float, before: int, behind: int) -> None:
    random = np.random.default_rng(seed)
    scores = (random.standard_normal(blocks * SLOTS) * random.choice([0.1, 1, 10, 60])).astype(np.float32)
    behind = min(behind, len(scores) - before)
    assert compiled_share()(scores, share, before, behind) == share_of(scores, share, before, behind)


def test_equal_scores_fill_a_share_from_the_lower_index() -> None:
    scores = np.array([0.0, 2.0, 0.0, 2.0] * (SLOTS // 4), np.float32)
    for share in (0.11, 0.31, 0.61, 0.9):
        assert compiled_share()(scores, share, 3, 2) == share_of(scores, share, 3, 2)
    with pytest.raises(AssertionError):
        assert compiled_share(counts_forced=True)(scores, 0.31, 3, 2) == share_of(scores, 0.31, 3, 2)
