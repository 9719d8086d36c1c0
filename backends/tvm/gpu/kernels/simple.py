"""Ops that mix no tokens: products, look-up, normalisation, rotation, the network of a bank."""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import te, tirx

from memc.backends.tvm.gpu.kernels.common import along, compute, function, number, single, size, tensor
from memc.backends.tvm.kernels.bank import ACTIVATIONS
from memc.backends.tvm.kernels.common import PrimFunc


@cache
def linear(out: int, into: int, dtype: str, *, bias: bool) -> PrimFunc:
    """Make ``y [M,out] = x [M,into] w^T (+ bias [out])`` for any M; ``w [out,into]`` is of ``dtype``."""
    m = size("m")
    x, w, b = tensor("x", m, into), tensor("w", out, into, dtype=dtype), tensor("b", out if bias else 1)
    k = along("k", into)
    product = compute("product", (m, out), lambda i, j: te.sum(x[i, k] * w[j, k].astype("float32"), axis=k))
    if not bias:
        return function([x, w, b], product)
    return function([x, w, b], compute("y", (m, out), lambda i, j: product[i, j] + b[j]))


@cache
def head_linear(heads: int, out: int, into: int) -> PrimFunc:
    """Make ``y [B,heads,T,out] = x [B,heads,T,into] w`` with a weight ``w [heads,into,out]`` for each head."""
    batch, tokens = size("batch"), size("tokens")
    x, w = tensor("x", batch, heads, tokens, into), tensor("w", heads, into, out)
    k = along("k", into)
    y = compute("y", (batch, heads, tokens, out), lambda b, h, t, j: te.sum(x[b, h, t, k] * w[h, k, j], axis=k))
    return function([x, w], y)


@cache
def embedding(rows: int, width: int, dtype: str) -> PrimFunc:
    """Make ``y [M,width] = table[ids [M]]``; an id out of range reads the nearest row, never other memory."""
    m = size("m")
    table, ids = tensor("table", rows, width, dtype=dtype), tensor("ids", m, dtype="int64")

    def row(i: Any) -> Any:
        return tirx.min(tirx.max(ids[i], number(0)), number(rows - 1))

    return function([table, ids], compute("y", (m, width), lambda i, j: table[row(i), j].astype("float32")))


@cache
def norm(width: int, eps: float, *, center: bool, weight: bool, bias: bool) -> PrimFunc:
    """Make ``memc::norm`` of rows ``x [M,width]``; ``weight`` and ``bias [width]`` are ``[1]`` where not asked for."""
    m = size("m")
    x = tensor("x", m, width)
    w, b = tensor("w", width if weight else 1), tensor("b", width if bias else 1)
    k, n = along("k", width), along("n", width)
    total = compute("total", (m,), lambda i: te.sum(x[i, k], axis=k)) if center else None

    def apart(i: Any, j: Any) -> Any:
        return x[i, j] if total is None else x[i, j] - total[i] / single(width)

    spread = compute("spread", (m,), lambda i: te.sum(apart(i, n) * apart(i, n), axis=n))

    def value(i: Any, j: Any) -> Any:
        y = apart(i, j) / te.sqrt(spread[i] / single(width) + single(eps))
        y = y * w[j] if weight else y
        return y + b[j] if bias else y

    return function([x, w, b], compute("y", (m, width), value))


@cache
def rotary(heads: int, width: int, pairs: int, *, interleaved: bool) -> PrimFunc:
    """Make ``memc::rotary`` of ``x [B,heads,T,width]`` with ``cosine`` and ``sine [B,T,pairs]`` already scaled."""
    batch, tokens = size("batch"), size("tokens")
    x = tensor("x", batch, heads, tokens, width)
    cosine, sine = tensor("cosine", batch, tokens, pairs), tensor("sine", batch, tokens, pairs)

    def turned(b: Any, h: Any, t: Any, j: Any) -> Any:
        # Clamped, since what is beyond the pairs is read too and not used.
        pair = tirx.min(j // number(2) if interleaved else j % number(pairs), number(pairs - 1))
        first = j % number(2) == number(0) if interleaved else j < number(pairs)
        step = 1 if interleaved else pairs
        other = tirx.Select(first, tirx.min(j + number(step), number(width - 1)), tirx.max(j - number(step), number(0)))
        sign = tirx.Select(first, single(-1), single(1))
        y = x[b, h, t, j] * cosine[b, t, pair] + sign * x[b, h, t, other] * sine[b, t, pair]
        return tirx.Select(j < number(2 * pairs), y, x[b, h, t, j])

    return function([x, cosine, sine], compute("y", x.shape, turned))


@cache
def bank_units(units: int, width: int, activation: str) -> PrimFunc:
    """Make ``hidden [B,T,units]`` of ``memc::bank_ffn``: the activated products of ``x`` with two parts of a block."""
    batch, tokens = size("batch"), size("tokens")
    x, block = tensor("x", batch, tokens, width), tensor("block", batch, 3, units, width)
    act = ACTIVATIONS[activation]
    k, n = along("k", width), along("n", width)
    shape = (batch, tokens, units)
    gate = compute("gate", shape, lambda b, t, u: te.sum(x[b, t, k] * block[b, number(0), u, k], axis=k))
    up = compute("up", shape, lambda b, t, u: te.sum(x[b, t, n] * block[b, number(1), u, n], axis=n))
    return function([x, block], compute("hidden", shape, lambda b, t, u: act(gate[b, t, u]) * up[b, t, u]))


@cache
def bank_sum(units: int, width: int) -> PrimFunc:
    """Make ``y [B,T,width]`` of ``memc::bank_ffn``: ``hidden [B,T,units]`` with the third part of a block."""
    batch, tokens = size("batch"), size("tokens")
    hidden, block = tensor("hidden", batch, tokens, units), tensor("block", batch, 3, units, width)
    u = along("u", units)
    y = compute(
        "y", (batch, tokens, width), lambda b, t, j: te.sum(hidden[b, t, u] * block[b, number(2), u, j], axis=u)
    )
    return function([hidden, block], y)
