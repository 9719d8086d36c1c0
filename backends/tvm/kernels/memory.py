"""``memc::linear_memory``: a matrix per key-value head, decayed, written and read.

Calls of few tokens, a step of decoding among them, go token by token; prompts go by chunks, with every kind of gate
and both rules of update (:mod:`memc.backends.tvm.kernels.memory_chunk`). Chunks win by what steps lose: value channels
beside whole vectors, and the way of the state through the caches. Where a state fits the nearest one and has neither,
as of the delta rule with 128 by 64 channels, both take the same time.
"""

from __future__ import annotations

from functools import cache

from tvm.script import tirx as T

from memc.backends.tvm.isa import Tile
from memc.backends.tvm.kernels.common import PrimFunc, exp
from memc.backends.tvm.kernels.memory_chunk import Memory, chunked

SHORT = 12
"""Tokens from which a call goes by chunks: of fewer the steps cost less than moving the state in and out."""


@cache
def linear_memory(m: Memory, tile: Tile) -> PrimFunc:
    """Make ``memc::linear_memory``, its state ``[B,G,K,V]`` in place; ``beta`` is ``[1,1,1]`` for the gated rule.

    Token by token the memory goes by in bands of value channels: of each, what a token reads and writes stays in
    registers.
    """
    heads, groups, key_dim, value_dim = m.heads, m.groups, m.key_dim, m.value_dim
    share, decays, run = m.share, m.decays, chunked(m, tile)

    @T.inline
    def band(names, gate, b, g, t, start, width):
        written = T.alloc_buffer((width,), "float32", scope="local")
        found = T.alloc_buffer((share, width), "float32", scope="local")
        for j in T.vectorized(width):
            written[j] = names["v"][b, g, t, start + j]
        if m.delta:
            for j in T.vectorized(width):
                found[0, j] = T.float32(0)
            for i in T.serial(key_dim):
                for j in T.vectorized(width):
                    found[0, j] = found[0, j] + (
                        names["k"][b, g, t, i] * gate[i % decays] * names["state"][b, g, i, start + j]
                    )
            for j in T.vectorized(width):
                written[j] = names["beta"][b, g, t] * (written[j] - found[0, j])
        for r in T.unroll(share):
            for j in T.vectorized(width):
                found[r, j] = T.float32(0)
        for i in T.serial(key_dim):
            for j in T.vectorized(width):
                names["state"][b, g, i, start + j] = (
                    gate[i % decays] * names["state"][b, g, i, start + j] + names["k"][b, g, t, i] * written[j]
                )
            for r in T.unroll(share):
                for j in T.vectorized(width):
                    found[r, j] = found[r, j] + names["q"][b, g * share + r, t, i] * names["state"][b, g, i, start + j]
        for r in T.unroll(share):
            for j in T.vectorized(width):
                names["y"][b, g * share + r, t, start + j] = found[r, j]

    @T.inline
    def step(names, b, g, t, gate):
        wide = T.meta_var(value_dim // 32)
        narrow = T.meta_var(value_dim % 32 // 8)
        if names["positions"][b, t] < 0:
            for r in T.serial(share):
                for j in T.serial(value_dim):
                    names["y"][b, g * share + r, t, j] = T.float32(0)
        else:
            for i in T.serial(decays):
                gate[i] = T.if_then_else(names["positions"][b, t] == 0, T.float32(0), exp(names["decay"][b, g, t, i]))
            for part in T.serial(wide):
                band(names, gate, b, g, t, part * 32, 32)
            for part in T.serial(narrow):
                band(names, gate, b, g, t, wide * 32 + part * 8, 8)
            for part in T.serial(value_dim % 8):
                band(names, gate, b, g, t, wide * 32 + narrow * 8 + part, 1)

    @T.prim_func(private=True)
    def linear_memory_(
        q_: T.handle,
        k_: T.handle,
        v_: T.handle,
        decay_: T.handle,
        p_: T.handle,
        state_: T.handle,
        beta_: T.handle,
        y_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        batch, tokens = T.int64(), T.int64()
        q = T.match_buffer(q_, (batch, heads, tokens, key_dim), "float32")
        k = T.match_buffer(k_, (batch, groups, tokens, key_dim), "float32")
        v = T.match_buffer(v_, (batch, groups, tokens, value_dim), "float32")
        decay = T.match_buffer(decay_, (batch, groups, tokens, decays), "float32")
        positions = T.match_buffer(p_, (batch, tokens), "int64")
        state = T.match_buffer(state_, (batch, groups, key_dim, value_dim), "float32")
        beta = T.match_buffer(beta_, (batch, groups, tokens) if m.delta else (1,), "float32")
        y = T.match_buffer(y_, (batch, heads, tokens, value_dim), "float32")
        names = T.meta_var(
            {"q": q, "k": k, "v": v, "decay": decay, "positions": positions, "state": state, "beta": beta, "y": y}
        )
        for row in T.parallel(batch * groups):
            if tokens >= SHORT:
                run(names, row // groups, row % groups, tokens)
            else:
                gate = T.alloc_buffer((decays,), "float32", scope="local")
                for t in T.serial(tokens):
                    step(names, row // groups, row % groups, t, gate)

    return linear_memory_
