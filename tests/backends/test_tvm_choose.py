"""The best so many of a list, as compiled: every count, ties by index, scores of both signs and zeros of both."""

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

from memc.backends.tvm.kernels.choose import find_least, ordered, take
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
