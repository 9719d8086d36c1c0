"""Scores of ``memc::attention`` over slots in place, and of ``memc::full_attention``; a thread makes one score."""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm.script import tirx as T

from memc.backends.tvm.gpu.kernels.common import OPAQUE
from memc.backends.tvm.kernels.attention import Range
from memc.backends.tvm.kernels.common import LOWEST, SLOTS, Expression, PrimFunc, Scores


def score(s: Scores, product: Expression) -> Expression:
    """Return a score from the product of a query and a key."""
    x = product * T.float32(s.scale)
    return T.tanh(x / T.float32(s.softcap)) * T.float32(s.softcap) if s.softcap else x


@cache
def attention_scores(s: Scores, r: Range) -> PrimFunc:
    """Make ``scores [B,H,T,S]`` of ``memc::attention``, ``LOWEST`` for slots that are not read, its state in place.

    ``keys [B,G,P,D,SLOTS]`` and ``values [B,G,S,E]`` hold the token at position p in slot p, and ``newest [B]`` is the
    last position of each row. The new tokens are written first, so that no sequence may start in a call after tokens of
    another one in the same row.
    """
    heads, groups, key_dim, value_dim = s.heads, s.groups, s.key_dim, s.value_dim
    share = s.share

    def biased(x: Any, slopes: Any, h: Any, distance: Any) -> Any:
        return x + slopes[h] * T.Cast("float32", distance) if s.slopes else x

    @T.prim_func(private=True, s_tir=True)
    def attention_scores_(
        q_: T.handle,
        k_: T.handle,
        v_: T.handle,
        p_: T.handle,
        keys_: T.handle,
        values_: T.handle,
        slopes_: T.handle,
        newest_: T.handle,
        scores_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "op_pattern": OPAQUE})
        batch, tokens, tiles, slots = T.int64(), T.int64(), T.int64(), T.int64()
        q = T.match_buffer(q_, (batch, heads, tokens, key_dim), "float32")
        k = T.match_buffer(k_, (batch, groups, tokens, key_dim), "float32")
        v = T.match_buffer(v_, (batch, groups, tokens, value_dim), "float32")
        positions = T.match_buffer(p_, (batch, tokens), "int64")
        keys = T.match_buffer(keys_, (batch, groups, tiles, key_dim, SLOTS), "float32")
        values = T.match_buffer(values_, (batch, groups, slots, value_dim), "float32")
        slopes = T.match_buffer(slopes_, (heads if s.slopes else 1,), "float32")
        newest = T.match_buffer(newest_, (batch,), "int64")
        scores = T.match_buffer(scores_, (batch, heads, tokens, slots), "float32")
        for b0, g0, t0, d0 in T.grid(batch, T.int64(groups), tokens, T.int64(key_dim)):
            with T.sblock("keys"):
                b, g, t, d = T.axis.remap("SSSS", [b0, g0, t0, d0])
                if positions[b, t] >= 0:
                    keys[b, g, positions[b, t] // SLOTS, d, positions[b, t] % SLOTS] = k[b, g, t, d]
        for b0, g0, t0, e0 in T.grid(batch, T.int64(groups), tokens, T.int64(value_dim)):
            with T.sblock("values"):
                b, g, t, e = T.axis.remap("SSSS", [b0, g0, t0, e0])
                if positions[b, t] >= 0:
                    values[b, g, positions[b, t], e] = v[b, g, t, e]
        for b0, h0, t0, s0 in T.grid(batch, T.int64(heads), tokens, slots):
            with T.sblock("scores"):
                b, h, t, slot = T.axis.remap("SSSS", [b0, h0, t0, s0])
                acc = T.sblock_alloc_buffer((1,), "float32", scope="local")
                acc[0] = T.float32(LOWEST)
                if (
                    positions[b, t] >= 0
                    and r.low(positions[b, t]) <= slot
                    and slot < r.high(positions[b, t], newest[b])
                ):
                    acc[0] = T.float32(0)
                    for d in T.serial(T.int64(key_dim)):
                        acc[0] = acc[0] + q[b, h, t, d] * keys[b, h // share, slot // SLOTS, d, slot % SLOTS]
                    acc[0] = biased(score(s, acc[0]), slopes, h, slot - positions[b, t])
                scores[b, h, t, slot] = acc[0]

    return attention_scores_


@cache
def full_scores(s: Scores, *, masked: bool, bias: tuple[bool, ...] | None) -> PrimFunc:
    """Make ``scores [B,H,T,S]`` of ``memc::full_attention``, ``LOWEST`` for padding.

    ``bias`` tells which axes of the additive bias ``[B or 1,H or 1,T or 1,S or 1]`` have their size, None without one.
    """
    heads, groups, key_dim, share = s.heads, s.groups, s.key_dim, s.share
    sized = bias or (False,) * 4

    def biased(x: Any, added: Any, *place: Any) -> Any:
        index = [at if there else T.int64(0) for at, there in zip(place, sized, strict=True)]
        return x if bias is None else x + added[tuple(index)]

    @T.prim_func(private=True, s_tir=True)
    def full_scores_(q_: T.handle, k_: T.handle, p_: T.handle, bias_: T.handle, scores_: T.handle):
        T.func_attr({"tirx.noalias": True, "op_pattern": OPAQUE})
        batch, tokens, held = T.int64(), T.int64(), T.int64()
        sizes = T.int64(), T.int64(), T.int64(), T.int64()
        q = T.match_buffer(q_, (batch, heads, tokens, key_dim), "float32")
        k = T.match_buffer(k_, (batch, groups, held, key_dim), "float32")
        positions = T.match_buffer(p_, (batch, held) if masked else (1, 1), "int64")
        added = T.match_buffer(bias_, sizes, "float32")
        scores = T.match_buffer(scores_, (batch, heads, tokens, held), "float32")
        for b0, h0, t0, s0 in T.grid(batch, T.int64(heads), tokens, held):
            with T.sblock("scores"):
                b, h, t, slot = T.axis.remap("SSSS", [b0, h0, t0, s0])
                acc = T.sblock_alloc_buffer((1,), "float32", scope="local")
                acc[0] = T.float32(0)
                for d in T.serial(T.int64(key_dim)):
                    acc[0] = acc[0] + q[b, h, t, d] * k[b, h // share, slot, d]
                acc[0] = biased(score(s, acc[0]), added, b, h, t, slot)
                if masked and positions[b, slot] < 0:
                    acc[0] = T.float32(LOWEST)
                scores[b, h, t, slot] = acc[0]

    return full_scores_
