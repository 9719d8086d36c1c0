"""The softmax over the tokens that ``memc::sparse_attention`` reads, and the values that it weighs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from memc.backends.tvm.kernels.common import LOWEST, SLOTS, Keys, add_sink, add_values, exp, tanh


class Part:
    """Rows of the scores of one unit of work, from one on, and of these those from a column on."""

    def __init__(self, scores: Any, unit: Any, start: Any, first: Any = 0) -> None:
        """Begin at row ``start`` of ``scores [units,heads,.]``, column ``first``."""
        self._scores, self._unit, self._start, self._first = scores, unit, start, first

    def __getitem__(self, place: tuple[Any, Any]) -> Any:
        """Return an entry by row and column."""
        return self._scores[self._unit, self._start + place[0], self._first + place[1]]


def values_by(value: Callable[[Any, Any], Any]) -> Keys:
    """Describe values of which ``value(at, e)`` is a channel."""

    def nothing(*_: Any) -> Any:
        raise AssertionError("only values are read by this list")

    return Keys(nothing, nothing, value, nothing, None)


def _listed(names: dict[str, Any], b: Any, g: Any, unit: Any) -> Keys:
    """Describe the values of the tokens that are listed in ``slots``."""
    return values_by(lambda at, e: names["values"][b, g, T.Cast("int64", names["slots"][unit, at]), e])


@T.inline
def _join_groups(names, s, r, unit, i, p, kept):
    # Makes one head's scores, after the soft-cap, those of the one softmax that the grouped one is: a token of a page
    # that is read through its landmark has its own score and that of the landmark, less the log-sum-exp of the page's
    # tokens but the landmark, which is not read. Pages lie one behind the other, only the last one may be in part.
    top = T.alloc_buffer((1,), "float32", scope="local")
    total = T.alloc_buffer((1,), "float32", scope="local")
    near = T.max(p - (r.window - 1), T.int64(0)) // r.page
    for n in T.serial(T.if_then_else(p < r.dense_below, T.int64(0), kept[0] // r.page)):
        number = T.Cast("int64", names["slots"][unit, n * r.page]) // r.page
        if T.And(number * r.page >= r.sinks, number < near):
            top[0] = T.float32(LOWEST)
            for j in T.serial(r.page - 1):
                top[0] = T.max(top[0], names["scores"][unit, i, n * r.page + j])
            total[0] = T.float32(0)
            for j in T.serial(r.page - 1):
                total[0] = total[0] + exp(names["scores"][unit, i, n * r.page + j] - top[0])
            top[0] = names["scores"][unit, i, n * r.page + r.page - 1] - (top[0] + T.log(total[0]))
            for j in T.serial(r.page - 1):
                names["scores"][unit, i, n * r.page + j] = names["scores"][unit, i, n * r.page + j] + top[0]
            names["scores"][unit, i, n * r.page + r.page - 1] = T.float32(LOWEST)


@T.inline
def weigh(names, s, r, unit, i, p, kept, top, total, row):  # noqa: D103
    # Puts the exponentials of one head's scores in their place, and 0 up to the end of the last vector.
    blocks = T.ceildiv(kept[0], T.int64(SLOTS))
    for j in T.serial(blocks * SLOTS - kept[0]):
        names["scores"][unit, i, kept[0] + j] = T.float32(LOWEST)
    if s.softcap > 0:
        for j in T.serial(kept[0]):
            names["scores"][unit, i, j] = tanh(names["scores"][unit, i, j] / T.float32(s.softcap)) * T.float32(
                s.softcap
            )
    if r.grouped:
        _join_groups(names, s, r, unit, i, p, kept)
    top[row] = T.float32(LOWEST)
    for j in T.serial(kept[0]):
        top[row] = T.max(top[row], names["scores"][unit, i, j])
    for block in T.serial(blocks):
        for j in T.vectorized(SLOTS):
            names["scores"][unit, i, block * SLOTS + j] = T.Select(
                names["scores"][unit, i, block * SLOTS + j] > T.float32(0.5 * LOWEST),
                exp(names["scores"][unit, i, block * SLOTS + j] - top[row]),
                T.float32(0),
            )
    total[row] = T.float32(0)
    for j in T.serial(kept[0]):
        total[row] = total[row] + names["scores"][unit, i, j]


@T.inline
def add_all(s, read, count, weights, part, acc, first, size):  # noqa: D103
    # Adds weights times ``size`` channels of values from ``first`` on, by vectors that are as wide as can be.
    wide, narrow = T.meta_var(size // 32), T.meta_var(size % 32 // 8)
    add_values(s.together, read, T.int64(0), count, weights, part, acc, first, 32, wide)
    if narrow > 0:
        add_values(s.together, read, T.int64(0), count, weights, part, acc, first + wide * 32, 8, narrow)
    if size % 8 > 0:
        rest = T.meta_var(first + wide * 32 + narrow * 8)
        add_values(s.together, read, T.int64(0), count, weights, part, acc, rest, 1, size % 8)


@T.inline
def finish(names, s, r, b, g, t, start, top, total, acc):  # noqa: D103
    # Writes the results of the heads from ``start`` on.
    for i in T.serial(s.together):
        h = g * s.share + start + i
        if s.sink_logits:
            add_sink(i, names["sinks"][h], top, total, acc, s.value_dim)
        for e in T.serial(s.value_dim):
            names["y"][b, h, t, e] = acc[i, e] / total[i]
        if r.lse:
            names["lse"][b, h, t] = top[i] + T.log(total[i])


@T.inline
def clear(names, s, r, b, g, t):  # noqa: D103
    # Writes the results of padding.
    for i in T.serial(s.share):
        for e in T.serial(s.value_dim):
            names["y"][b, g * s.share + i, t, e] = T.float32(0)
        if r.lse:
            names["lse"][b, g * s.share + i, t] = T.float32(0)


@T.inline
def attend(names, s, r, b, g, t, unit, p, kept, start):  # noqa: D103
    # Weighs the values of the tokens listed for so many heads from ``start`` on.
    top = T.alloc_buffer((s.together,), "float32", scope="local")
    total = T.alloc_buffer((s.together,), "float32", scope="local")
    acc = T.alloc_buffer((s.together, s.value_dim), "float32", scope="local")
    part = T.alloc_buffer((s.together, 32), "float32", scope="local")
    for i in T.serial(s.together):
        weigh(names, s, r, unit, start + i, p, kept, top, total, i)
        for e in T.serial(s.value_dim):
            acc[i, e] = T.float32(0)
    weights = T.meta_var(Part(names["scores"], unit, start))
    read = T.meta_var(_listed(names, b, g, unit))
    add_all(s, read, kept[0], weights, part, acc, 0, s.value_dim)
    finish(names, s, r, b, g, t, start, top, total, acc)
