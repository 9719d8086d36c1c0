"""What the definitions share: sizes as TVM wants them, sums, and the rows of a softmax in three steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from tvm import te, tirx

from memc.backends.tvm.kernels.common import LOWEST, Expression, PrimFunc

OPAQUE = 8
"""TVM's mark of a function that is fused with no other, as one that writes a state among its arguments must not be."""


def number(value: int) -> Any:
    """Return a size as whole number of 64 bits: TVM mixes no others with the sizes known at run time only."""
    return tirx.IntImm("int64", value)


def size(name: str) -> Any:
    """Return a size that is known at run time only."""
    return tirx.Var(name, "int64")


def single(value: float) -> Any:
    """Return a constant of float32."""
    return tirx.const(value, "float32")


def tensor(name: str, *shape: Any, dtype: str = "float32") -> Any:
    """Return an argument of a function."""
    return te.placeholder([number(n) if isinstance(n, int) else n for n in shape], dtype, name=name)


def compute(name: str, shape: Sequence[Any], form: Callable[..., Expression]) -> Any:
    """Return a tensor whose every value ``form`` makes from its place."""
    return te.compute([number(n) if isinstance(n, int) else n for n in shape], form, name=name)


def along(name: str, extent: Any) -> Any:
    """Return an axis to sum over."""
    return te.reduce_axis((number(0), number(extent) if isinstance(extent, int) else extent), name=name)


def function(arguments: Sequence[Any], *results: Any) -> PrimFunc:
    """Make a function of tensors."""
    return te.create_prim_func([*arguments, *results]).without_attr("global_symbol")


def is_score(x: Expression) -> Expression:
    """Tell whether a score stands for a key that is read."""
    return x > single(0.5 * LOWEST)


@cache
def row_top(heads: int, *, sink_logits: bool) -> PrimFunc:
    """Make ``top [B,H,T]``, the largest of ``scores [B,H,T,S]`` and, where there are any, ``sinks [H]``."""
    batch, tokens, slots = size("batch"), size("tokens"), size("slots")
    scores, sinks = tensor("scores", batch, heads, tokens, slots), tensor("sinks", heads if sink_logits else 1)
    s = along("s", slots)
    largest = compute("largest", (batch, heads, tokens), lambda b, h, t: te.max(scores[b, h, t, s], axis=s))
    top = compute(
        "top", largest.shape, lambda b, h, t: te_max(largest[b, h, t], sinks[h] if sink_logits else single(LOWEST))
    )
    return function([scores, sinks], top)


@cache
def row_total(heads: int, *, sink_logits: bool) -> PrimFunc:
    """Make ``total [B,H,T]``, the sum of exponentials of scores less their row's ``top``, sinks among them."""
    batch, tokens, slots = size("batch"), size("tokens"), size("slots")
    scores, top = tensor("scores", batch, heads, tokens, slots), tensor("top", batch, heads, tokens)
    sinks = tensor("sinks", heads if sink_logits else 1)
    s = along("s", slots)

    def part(b: Any, h: Any, t: Any) -> Any:
        x = scores[b, h, t, s]
        return te.sum(tirx.Select(is_score(x), te.exp(x - top[b, h, t]), single(0)), axis=s)

    summed = compute("summed", (batch, heads, tokens), part)

    def whole(b: Any, h: Any, t: Any) -> Any:
        sink = te.exp(sinks[h] - top[b, h, t]) if sink_logits else single(0)
        return summed[b, h, t] + sink

    return function([scores, top, sinks], compute("total", summed.shape, whole))


@cache
def row_shares(heads: int) -> PrimFunc:
    """Make ``shares [B,H,T,S]``, by which values are weighed; those of a row that reads nothing are zero.

    Kept apart from the sum of its rows: together they make a kernel that spills registers.
    """
    batch, tokens, slots = size("batch"), size("tokens"), size("slots")
    scores = tensor("scores", batch, heads, tokens, slots)
    top, total = tensor("top", batch, heads, tokens), tensor("total", batch, heads, tokens)

    def share(b: Any, h: Any, t: Any, s: Any) -> Any:
        x = scores[b, h, t, s]
        return tirx.if_then_else(is_score(x), te.exp(x - top[b, h, t]) / total[b, h, t], single(0))

    return function([scores, top, total], compute("shares", scores.shape, share)).with_attr("op_pattern", OPAQUE)


@cache
def weigh(heads: int, groups: int, value_dim: int) -> PrimFunc:
    """Make ``y [B,H,T,E]`` from ``shares [B,H,T,S]`` and ``values [B,G,S,E]``."""
    batch, tokens, slots = size("batch"), size("tokens"), size("slots")
    shares = tensor("shares", batch, heads, tokens, slots)
    values = tensor("values", batch, groups, slots, value_dim)
    s = along("s", slots)
    share = heads // groups
    y = compute(
        "y",
        (batch, heads, tokens, value_dim),
        lambda b, h, t, e: te.sum(shares[b, h, t, s] * values[b, h // number(share), s, e], axis=s),
    )
    return function([shares, values], y)


def te_max(a: Expression, b: Expression) -> Expression:
    """Return the larger of two values."""
    return tirx.max(a, b)
