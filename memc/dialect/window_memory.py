"""``memc::window_memory``: attention to a sliding window and to the first tokens, with a state of constant size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memc.dialect.base import Cost, check, check_heads, define


def _cost(a: Mapping[str, Any], context: int) -> Cost:
    query, key, value = a["query"], a["key"], a["value"]
    slots = a["window"] + a["sinks"]
    held = min(context, slots)
    flops = 2.0 * query.shape[1] * held * (query.shape[3] + value.shape[3])
    return Cost(flops, float(slots * key.shape[1] * (key.shape[3] + value.shape[3]) * key.dtype.itemsize))


@define(
    "window_memory",
    "(Tensor query, Tensor key, Tensor value, Tensor positions,"
    " Tensor past_key, Tensor past_value, Tensor past_positions,"
    " Tensor? slopes=None, Tensor? sink_logits=None, *, float scale, int window, int sinks=0, float softcap=0.0)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    states={"past_key": 5, "past_value": 6, "past_positions": 7},
    cost=_cost,
)
def window_memory(
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
    window: int,
    sinks: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attend to the last ``window`` tokens and the first ``sinks`` tokens (StreamingLLM, Xiao et al. 2024).

    Arguments as in ``memc::attention``; the state holds N = ``sinks + window`` slots: ``past_key [B,G,N,D]``,
    ``past_value [B,G,N,E]``, ``past_positions [B,N]`` with -1 for an empty slot. The token at position p lives in
    slot p when p < ``sinks``, else in slot ``sinks + (p - sinks) % window``.

    A query at position p reads a key at position j of its own sequence when j <= p and (p - j < ``window`` or
    j < ``sinks``). Positions of one sequence rise by one from token to token. Returns
    0. the output ``[B,H,T,E]``, 0 for padding,
    1. the log-sum-exp of each row's scores ``[B,H,T]`` (sink logits included; 0 for padding) in float32, or in float64
       when the query is,
    2. to 4. the token that left the window when this one came: key ``[B,G,T,D]``, value ``[B,G,T,E]`` (zeros when there
       is none) and position ``[B,T]``: p - ``window`` when that is at least ``sinks``, else -1,
    5. to 7. the next state.
    """
    check_heads(query, key, value)
    check(window >= 1 and sinks >= 0, "window is at least 1 and sinks at least 0")
    check(past_key.shape[2] == window + sinks, "the state has one slot for each sink and each token of the window")
    batch, heads, tokens, _ = query.shape
    return (
        query.new_empty(batch, heads, tokens, value.shape[3]),
        torch.empty(batch, heads, tokens, dtype=torch.promote_types(query.dtype, torch.float32), device=query.device),
        torch.empty(key.shape, dtype=key.dtype, device=key.device),
        torch.empty(value.shape, dtype=value.dtype, device=value.device),
        torch.empty(positions.shape, dtype=positions.dtype, device=positions.device),
        torch.empty(past_key.shape, dtype=past_key.dtype, device=past_key.device),
        torch.empty(past_value.shape, dtype=past_value.dtype, device=past_value.device),
        torch.empty(past_positions.shape, dtype=past_positions.dtype, device=past_positions.device),
    )
