"""``memc::bank_ffn``: a feed-forward network whose weights come with each sequence."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

from tvm.script import tirx as T

from memc.backends.tvm.kernels.common import Expression, PrimFunc

LANES = 16

TOKENS = 8
"""Tokens for which a row of a block is read once."""


def _sigmoid(x: Expression) -> Expression:
    return T.float32(1) / (T.float32(1) + T.exp(T.float32(0) - x))


def _softplus(x: Expression) -> Expression:
    return T.max(x, T.float32(0)) + T.log(T.float32(1) + T.exp(T.float32(0) - T.abs(x)))


def _gelu_tanh(x: Expression) -> Expression:
    inner = T.float32(math.sqrt(2 / math.pi)) * (x + T.float32(0.044715) * x * x * x)
    return T.float32(0.5) * x * (T.float32(1) + T.tanh(inner))


ACTIVATIONS: dict[str, Callable[[Expression], Expression]] = {
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: T.float32(0.5) * x * (T.float32(1) + T.erf(x * T.float32(math.sqrt(0.5)))),
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": lambda x: x * _sigmoid(T.float32(1.702) * x),
    "relu": lambda x: T.max(x, T.float32(0)),
    "relu2": lambda x: T.max(x, T.float32(0)) * T.max(x, T.float32(0)),
    "sigmoid": _sigmoid,
    "tanh": T.tanh,
    "softplus": _softplus,
    "elu": lambda x: T.Select(x > T.float32(0), x, T.exp(T.min(x, T.float32(0))) - T.float32(1)),
    "mish": lambda x: x * T.tanh(_softplus(x)),
}


@cache
def bank_ffn(units: int, width: int, activation: str) -> PrimFunc:
    """Make ``memc::bank_ffn`` of ``x [B,T,width]`` with ``block [B,3,units,width]``, which may begin anywhere."""
    act = ACTIVATIONS[activation]
    body, rest = width // LANES, width % LANES

    @T.inline
    def dot(x, block, b, t, part, unit, lanes, into):
        for j in T.vectorized(LANES):
            lanes[j] = T.float32(0)
        for step in T.serial(body):
            for j in T.vectorized(LANES):
                lanes[j] = lanes[j] + x[b, t, step * LANES + j] * block[b, part, unit, step * LANES + j]
        into[part] = T.float32(0)
        for j in T.serial(LANES):
            into[part] = into[part] + lanes[j]
        for j in T.serial(rest):
            into[part] = into[part] + x[b, t, body * LANES + j] * block[b, part, unit, body * LANES + j]

    @T.prim_func(private=True)
    def bank_ffn_(x_: T.handle, block_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        batch, tokens = T.int64(), T.int64()
        x = T.match_buffer(x_, (batch, tokens, width), "float32")
        block = T.match_buffer(block_, (batch, 3, units, width), "float32", align=4)
        y = T.match_buffer(y_, (batch, tokens, width), "float32")
        groups = T.ceildiv(tokens, TOKENS)
        for piece in T.parallel(batch * groups):
            lanes = T.alloc_buffer((LANES,), "float32", scope="local")
            sums = T.alloc_buffer((2,), "float32", scope="local")
            b = piece // groups
            first = piece % groups * TOKENS
            for t in T.serial(T.min(tokens - first, T.int64(TOKENS))):
                for j in T.serial(width):
                    y[b, first + t, j] = T.float32(0)
            for unit in T.serial(units):
                for t in T.serial(T.min(tokens - first, T.int64(TOKENS))):
                    dot(x, block, b, first + t, 0, unit, lanes, sums)
                    dot(x, block, b, first + t, 1, unit, lanes, sums)
                    sums[0] = act(sums[0]) * sums[1]
                    for j in T.serial(width):
                        y[b, first + t, j] = y[b, first + t, j] + sums[0] * block[b, 2, unit, j]

    return bank_ffn_
