"""``memc::linear_memory``: a thread keeps one column of a memory, through all tokens of a call."""

from __future__ import annotations

from functools import cache

from tvm.script import tirx as T

from memc.backends.tvm.gpu.kernels.common import OPAQUE
from memc.backends.tvm.kernels.common import PrimFunc
from memc.backends.tvm.kernels.memory_chunk import Memory


@cache
def linear_memory(m: Memory) -> PrimFunc:
    """Make ``memc::linear_memory``, its state ``[B,G,K,V]`` in place; ``beta`` is ``[1,1,1]`` for the gated rule."""
    heads, groups, key_dim, value_dim = m.heads, m.groups, m.key_dim, m.value_dim
    share, decays = m.share, m.decays

    @T.prim_func(private=True, s_tir=True)
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
        T.func_attr({"tirx.noalias": True, "op_pattern": OPAQUE})
        batch, tokens = T.int64(), T.int64()
        q = T.match_buffer(q_, (batch, heads, tokens, key_dim), "float32")
        k = T.match_buffer(k_, (batch, groups, tokens, key_dim), "float32")
        v = T.match_buffer(v_, (batch, groups, tokens, value_dim), "float32")
        decay = T.match_buffer(decay_, (batch, groups, tokens, decays), "float32")
        positions = T.match_buffer(p_, (batch, tokens), "int64")
        state = T.match_buffer(state_, (batch, groups, key_dim, value_dim), "float32")
        beta = T.match_buffer(beta_, (batch, groups, tokens) if m.delta else (1, 1, 1), "float32")
        y = T.match_buffer(y_, (batch, heads, tokens, value_dim), "float32")
        for b0, g0, j0 in T.grid(batch, T.int64(groups), T.int64(value_dim)):
            with T.sblock("memory"):
                b, g, j = T.axis.remap("SSS", [b0, g0, j0])
                # It reads the state too. Said here, that would keep TVM from mapping the loops: it takes a block that
                # reads what it writes for a sum whose order matters. No other one reads this column.
                T.reads(
                    q[b, g * share : g * share + share, 0:tokens, 0:key_dim],
                    k[b, g, 0:tokens, 0:key_dim],
                    v[b, g, 0:tokens, j],
                    decay[b, g, 0:tokens, 0:decays],
                    positions[b, 0:tokens],
                    beta[b, g, 0:tokens] if m.delta else beta[0, 0, 0:1],
                )
                T.writes(y[b, g * share : g * share + share, 0:tokens, j], state[b, g, 0:key_dim, j])
                written = T.sblock_alloc_buffer((1,), "float32", scope="local")
                gate = T.sblock_alloc_buffer((1,), "float32", scope="local")
                found = T.sblock_alloc_buffer((share,), "float32", scope="local")
                for t in T.serial(tokens):
                    for r in T.unroll(share):
                        found[r] = T.float32(0)
                    if positions[b, t] >= 0:
                        # Position 0 meets an empty memory, whatever lies there.
                        for i in T.serial(T.int64(key_dim)):
                            gate[0] = T.exp(decay[b, g, t, i % decays])
                            state[b, g, i, j] = T.if_then_else(
                                positions[b, t] == 0, T.float32(0), gate[0] * state[b, g, i, j]
                            )
                        written[0] = v[b, g, t, j]
                        if m.delta:
                            for i in T.serial(T.int64(key_dim)):
                                written[0] = written[0] - k[b, g, t, i] * state[b, g, i, j]
                            written[0] = written[0] * beta[b, g, t]
                        for i in T.serial(T.int64(key_dim)):
                            state[b, g, i, j] = state[b, g, i, j] + k[b, g, t, i] * written[0]
                            for r in T.unroll(share):
                                found[r] = found[r] + q[b, g * share + r, t, i] * state[b, g, i, j]
                    for r in T.unroll(share):
                        y[b, g * share + r, t, j] = found[r]

    return linear_memory_
