"""Host code of ``memc::attention`` on a GPU: one token, or a block of queries after another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memc.kernels.attention.slots import write
from memc.kernels.common import cast_like, held_positions
from memc.kernels.launch import DeviceKernels, Gpu
from memc.kernels.softmax_device import (
    Held,
    Rule,
    State,
    attend,
    attend_backward,
    attend_once,
    held,
    refusal,
    unordered,
)


def refuses(gpu: Gpu, *args: Any, **options: Any) -> str:
    """Return why the kernels do not take a call; "" where they do."""
    query, key, value, _positions, past_key, past_value, past_positions, *rest = args
    return refusal(query, key, value, past_key, past_value, *rest) or unordered(past_key, past_value, past_positions)


def forward(
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
    """Run ``memc::attention``; arguments and results as its dialect page has them."""
    rule = Rule(scale, softcap, window, chunk, prefix)
    if query.shape[2] == 1:
        token, past = State(key, value, positions), State(past_key, past_value, past_positions)
        step = attend_once(query, token, past, slopes, sink_logits, rule)
        return step.out, step.following.key, step.following.value, step.following.positions
    keys = held(torch.cat([past_key, key], 2), torch.cat([past_value, value], 2), positions, past_positions)
    out, _ = attend(query, keys, slopes, sink_logits, rule)
    return out, keys.key, keys.value, held_positions(past_positions, positions)


def backward(
    grad_out: Tensor,
    grad_next_key: Tensor,
    grad_next_value: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value, past_key, past_value, slopes and sink_logits."""
    past = past_key.shape[2]
    keys = held(torch.cat([past_key, key], 2), torch.cat([past_value, value], 2), positions, past_positions)
    rule = Rule(scale, softcap, window, chunk, prefix)
    g = attend_backward(grad_out, None, grad_next_key, grad_next_value, query, keys, slopes, sink_logits, rule)
    return (
        g.query,
        cast_like(g.key[:, :, past:], key),
        cast_like(g.value[:, :, past:], value),
        cast_like(g.key[:, :, :past], past_key),
        cast_like(g.value[:, :, :past], past_value),
        cast_like(g.slopes, slopes),
        cast_like(g.sink_logits, sink_logits),
    )


def in_place(
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
) -> Tensor:
    """Run ``memc::attention_`` on buffers of slots, as :func:`memc.kernels.attention.slots.forward` does."""
    rule = Rule(scale, softcap, window, chunk, prefix)
    if query.shape[2] == 1:
        token, buffers = State(key, value, positions), State(past_key, past_value, past_positions)
        return attend_once(query, token, buffers, slopes, sink_logits, rule, in_place=True).out
    write(positions, ((key, past_key), (value, past_value)), past_positions)
    own, past = positions.to(torch.int32), past_positions.to(torch.int32)
    keys = Held(past_key, past_value, past, torch.zeros_like(past), own, torch.zeros_like(own))
    return attend(query, keys, slopes, sink_logits, rule)[0]


KERNELS = DeviceKernels(forward, refuses, backward, in_place)
