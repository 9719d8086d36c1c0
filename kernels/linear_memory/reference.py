"""``memc::linear_memory`` token by token: the definition, used for short calls and as the oracle of the chunk form."""

from __future__ import annotations

import torch
from torch import Tensor


def gates(log_decay: Tensor, positions: Tensor) -> Tensor:
    """Return the factors ``[B,G,T,K or 1]`` that multiply the state before each write.

    exp(log_decay), 0 where a sequence starts (which is what clears the state), 1 for padding.
    """
    place = positions[:, None, :, None]
    return torch.exp(log_decay).masked_fill(place == 0, 0).masked_fill(place < 0, 1)


def loop(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor, state: Tensor, beta: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Decay, write and read once per token (GLA eq. 4; Gated DeltaNet eq. 10).

    ``query [B,G,R,T,K]``, ``key [B,G,T,K]``, ``value [B,G,T,V]``, ``gate [B,G,T,K or 1]`` as from :func:`gates`,
    ``state [B,G,K,V]``, ``beta [B,G,T]`` for the delta rule. Queries and keys of padding are zero.
    Returns ``[B,G,R,T,V]`` and the next state.
    """
    outputs = []
    for t in range(query.shape[3]):
        k, v = key[:, :, t, :, None], value[:, :, t, None, :]
        state = gate[:, :, t, :, None] * state
        if beta is not None:
            v = beta[:, :, t, None, None] * (v - torch.matmul(k.mT, state))
        state = state + k * v
        outputs.append(torch.matmul(query[:, :, :, t], state))
    return torch.stack(outputs, 3), state
