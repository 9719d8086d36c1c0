"""``memc::attention``: causal softmax attention over everything that its growing state holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memc.dialect.base import Cost, check_heads, define


def _cost(a: Mapping[str, Any], context: int) -> Cost:
    query, key, value = a["query"], a["key"], a["value"]
    held = min(context, a["window"]) if a["window"] else context
    flops = 2.0 * query.shape[1] * held * (query.shape[3] + value.shape[3])
    return Cost(flops, float(held * key.shape[1] * (key.shape[3] + value.shape[3]) * key.dtype.itemsize))


@define(
    "attention",
    "(Tensor query, Tensor key, Tensor value, Tensor positions,"
    " Tensor past_key, Tensor past_value, Tensor past_positions,"
    " Tensor? slopes=None, Tensor? sink_logits=None, *, float scale, int window=0, int chunk=0, int prefix=0,"
    " float softcap=0.0) -> (Tensor, Tensor, Tensor, Tensor)",
    states={"past_key": 1, "past_value": 2, "past_positions": 3},
    cost=_cost,
)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_positions: Tensor,
    slopes: Tensor | None = None,
    sink_logits: Tensor | None = None,
    *,
    scale: float,
    window: int = 0,
    chunk: int = 0,
    prefix: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend causally to the held and the new tokens of each sequence.

    ``query [B,H,T,D]``, ``key [B,G,T,D]``, ``value [B,G,T,E]``, ``positions [B,T]`` int64; the state is
    ``past_key [B,G,S,D]``, ``past_value [B,G,S,E]``, ``past_positions [B,S]``. Head ``h`` reads key-value head
    ``h // (H // G)``. Returns the output ``[B,H,T,E]`` and the state with the new tokens appended (``S + T``).

    A query at position p reads a key at position j of its own sequence when j <= p and, where asked,
    p - j < ``window``, p // ``chunk`` == j // ``chunk``. With ``prefix`` n, tokens at positions < n read one
    another too.
    Position 0 starts a sequence: what the state held before is marked -1 and read by nobody; so are tokens at
    position -1 (padding), whose output is 0. Score = ``scale`` q.k, then ``softcap`` tanh(. / softcap) when
    softcap > 0, then + ``slopes [H]`` (j - p) (ALiBi, Press et al. 2022). ``sink_logits [H]`` join the denominator
    without a value. A ``prefix`` must arrive in one call, since earlier tokens read later ones.
    """
    check_heads(query, key, value)
    batch, heads, tokens, _ = query.shape
    held = past_key.shape[2] + tokens
    return (
        query.new_empty(batch, heads, tokens, value.shape[3]),
        torch.empty(batch, key.shape[1], held, key.shape[3], dtype=key.dtype, device=key.device),
        torch.empty(batch, value.shape[1], held, value.shape[3], dtype=value.dtype, device=value.device),
        positions.new_empty(batch, held),
    )
