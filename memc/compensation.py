"""A window of attention that also reads the mean of every token that it has dropped: the compensation token.

RazorAttention (Tang et al. 2025, arXiv 2407.15891, eq. 3 and 4) keeps in place of dropped tokens one key, the mean of
theirs, and one value, the mean of theirs, which weighs as many times as tokens were dropped. Here these are all tokens
between the sinks and the window, so that every token of the sequence is read, exactly or in the mean.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from memc.program import StateSpec


def sums_state(key: StateSpec, value: StateSpec) -> StateSpec:
    """Return the state that holds the sums of the dropped keys and values ``[B,G,1,D+E]``, beside the window's."""
    columns = int(key.shape[3]) + int(value.shape[3])
    name = key.name.replace("_key", "_dropped")
    return StateSpec(name, torch.float32, (*key.shape[:2], 1, columns))


def compensated_window(
    t: Mapping[str, Tensor], *, scale: float, window: int, sinks: int, softcap: float
) -> tuple[Tensor, ...]:
    """Attend to the window, the sinks and the mean of all between under one softmax; rotary keys are summed rotated.

    ``t`` holds the arguments of ``memc::window_memory`` by name, and ``dropped [B,G,1,D+E]``. Returns the output
    ``[B,H,T,E]``, the next key, value and positions of the window, and the next sums. With the window's output o and
    log-sum-exp l, n dropped tokens, their means k and v, and s = scale q.k (soft-capped as other scores are):

        y = o + share (v - o),    share = sigmoid(s + log n - l)

    and y = o to the bit while nothing is dropped.
    """
    inputs = {name: value for name, value in t.items() if name != "dropped"}
    out, lse, left_key, left_value, _, *states = torch.ops.memc.window_memory.default(
        **inputs, scale=scale, window=window, sinks=sinks, softcap=softcap
    )
    # Of nothing that left the sum is 0, whatever the weight.
    one = torch.ones_like(left_key[..., :1], dtype=lse.dtype)
    left = torch.cat([left_key, left_value], -1).to(lse.dtype)
    sums, dropped = torch.ops.memc.linear_memory.default(
        one, one, left, torch.zeros_like(one), t["positions"], t["dropped"]
    )
    # Positions rise by one: where the newest stands tells how many have left.
    count = (t["positions"] - (window + sinks - 1)).clamp(min=0).unsqueeze(1)
    many = count.clamp(min=1).to(lse.dtype)
    size, by_group = left_key.shape[3], (left_key.shape[1], out.shape[1] // left_key.shape[1])
    mean = (sums / many.unsqueeze(-1)).unsqueeze(2)
    score = (t["query"].to(lse.dtype).unflatten(1, by_group) * mean[..., :size]).sum(-1).flatten(1, 2) * scale
    if softcap:
        score = softcap * torch.tanh(score / softcap)
    share = torch.where(count > 0, torch.sigmoid(score + many.log() - lse), 0.0).unflatten(1, by_group).unsqueeze(-1)
    exact = out.to(lse.dtype).unflatten(1, by_group)
    return (exact + share * (mean[..., size:] - exact)).flatten(1, 2).to(out.dtype), *states, dropped
