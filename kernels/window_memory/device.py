"""Host code of ``memc::window_memory`` on a GPU: slots and call are the keys that a window and sinks are read from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memc.kernels.common import cast_like, put, segments, take
from memc.kernels.launch import DeviceKernels, Gpu
from memc.kernels.softmax_device import (
    Held,
    Rule,
    State,
    attend,
    attend_backward,
    attend_once,
    refusal,
)
from memc.kernels.window_memory.layout import Layout, lay_out


def refuses(gpu: Gpu, *args: Any, **options: Any) -> str:
    """Return why the kernels do not take a call; "" where they do."""
    query, key, value, _positions, past_key, past_value, _past, *rest = args
    return refusal(query, key, value, past_key, past_value, *rest)


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
    window: int,
    sinks: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run ``memc::window_memory``; arguments and results as its dialect page has them."""
    rule = Rule(scale, softcap, window, sinks=sinks)
    if query.shape[2] == 1:
        token, past = State(key, value, positions), State(past_key, past_value, past_positions)
        step = attend_once(query, token, past, slopes, sink_logits, rule, ring=True)
        gone, after = step.left, step.following
        return step.out, step.lse, gone.key, gone.value, gone.positions, after.key, after.value, after.positions
    layout = lay_out(positions, past_positions, window, sinks, padded=True)
    keys, left = _keys(layout, key, value, positions, past_key, past_value)
    out, lse = attend(query, keys, slopes, sink_logits, rule)
    everything = torch.cat([past_positions, layout.positions], 1)
    next_positions = everything.gather(1, layout.ring.clamp_min(0)).masked_fill(layout.ring < 0, -1)
    return (
        out,
        lse,
        take(keys.key, left),
        take(keys.value, left),
        torch.where(left >= 0, positions - window, -1),
        take(keys.key, layout.ring),
        take(keys.value, layout.ring),
        next_positions,
    )


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    grad_left_key: Tensor,
    grad_left_value: Tensor,
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
    window: int,
    sinks: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value, past_key, past_value, slopes and sink_logits."""
    rule, slots = Rule(scale, softcap, window, sinks=sinks), window + sinks
    layout = lay_out(positions, past_positions, window, sinks, padded=True)
    keys, left = _keys(layout, key, value, positions, past_key, past_value)
    size = slots + key.shape[2]
    # Tokens that left and slots of the next state are copies: their gradients go to where they were copied from.
    copied_key, copied_value = (
        put(gone.float(), left, size) + put(kept.float(), layout.ring, size)
        for gone, kept in ((grad_left_key, grad_next_key), (grad_left_value, grad_next_value))
    )
    g = attend_backward(grad_out, grad_lse, copied_key, copied_value, query, keys, slopes, sink_logits, rule)
    return (
        g.query,
        cast_like(layout.restore(g.key[:, :, slots:]), key),
        cast_like(layout.restore(g.value[:, :, slots:]), value),
        cast_like(g.key[:, :, :slots], past_key),
        cast_like(g.value[:, :, :slots], past_value),
        cast_like(g.slopes, slopes),
        cast_like(g.sink_logits, sink_logits),
    )


def _keys(
    layout: Layout, key: Tensor, value: Tensor, positions: Tensor, past_key: Tensor, past_value: Tensor
) -> tuple[Held, Tensor]:
    """Return slots and call, its padding moved behind its tokens, and which of them leaves with each token."""
    past = layout.past_positions.to(torch.int32)
    held = Held(
        torch.cat([past_key, layout.arrange(key)], 2),
        torch.cat([past_value, layout.arrange(value)], 2),
        torch.cat([past, layout.positions.to(torch.int32)], 1),
        torch.cat([torch.zeros_like(past), layout.segments.to(torch.int32)], 1),
        positions.to(torch.int32),
        segments(positions).to(torch.int32),
    )
    return held, layout.restore_rows(layout.left)


KERNELS = DeviceKernels(forward, refuses, backward)
