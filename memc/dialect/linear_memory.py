"""``memc::linear_memory``: an associative memory of constant size, read and written once per token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memc.dialect.base import Cost, check, check_heads, define


def _cost(a: Mapping[str, Any], context: int) -> Cost:
    query, key, value = a["query"], a["key"], a["value"]
    cell = key.shape[3] * value.shape[3]
    flops = 2.0 * query.shape[1] * cell + 3.0 * key.shape[1] * cell
    return Cost(flops, 2.0 * key.shape[1] * cell * a["state"].dtype.itemsize)


@define(
    "linear_memory",
    "(Tensor query, Tensor key, Tensor value, Tensor log_decay, Tensor positions, Tensor state, Tensor? beta=None, *,"
    " str update='gated') -> (Tensor, Tensor)",
    states={"state": 1},
    cost=_cost,
)
def linear_memory(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    positions: Tensor,
    state: Tensor,
    beta: Tensor | None = None,
    *,
    update: str = "gated",
) -> tuple[Tensor, Tensor]:
    """Decay, write and read a matrix memory per key-value head.

    ``query [B,H,T,K]``, ``key [B,G,T,K]``, ``value [B,G,T,V]`` (features already mapped), ``log_decay [B,G,T,K]`` or
    ``[B,G,T,1]`` <= 0, ``beta [B,G,T]`` write strength (``gated_delta`` only), ``positions [B,T]``,
    ``state [B,G,K,V]`` float32. Returns ``[B,H,T,V]`` and the next state. In order of tokens, with g = log_decay:

    - ``gated``: S = exp(g) S + k v^T, o = S^T q (GLA, Yang et al. 2024, eq. 4; scalar g as in Lizard);
    - ``gated_delta``: S = exp(g) S, S = S + beta k (v - S^T k)^T, o = S^T q (Gated DeltaNet, Yang et al. 2025, eq. 10);
      the caller normalises the keys.

    The output reads the state after this token's write. Position -1 reads nothing (output 0), writes nothing, decays
    nothing; position 0 clears the state before its own write.
    """
    check_heads(query, key, value)
    check(update in ("gated", "gated_delta"), "update is gated or gated_delta")
    check(log_decay.shape[3] in (1, key.shape[3]), "log_decay has one value per key channel or one per head")
    check((beta is not None) == (update == "gated_delta"), "beta goes with gated_delta")
    batch, heads, tokens, _ = query.shape
    out = query.new_empty(batch, heads, tokens, value.shape[3])
    return out, torch.empty(state.shape, dtype=state.dtype, device=state.device)
