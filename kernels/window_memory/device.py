"""Host code of ``memc::window_memory`` on a GPU: slots and call are the keys that a window and sinks are read from."""

from __future__ import annotations

import torch
from torch import Tensor

from memc.dialect.window_memory import WindowMemory
from memc.kernels.common import put, segments, take
from memc.kernels.launch import DeviceKernels, Gpu
from memc.kernels.softmax_device import Held, Rule, attend, attend_backward, refusal
from memc.kernels.softmax_step import State, attend_once
from memc.kernels.window_memory.layout import Layout, lay_out


def refuses(gpu: Gpu, args: WindowMemory) -> str:
    """Return why the kernels do not take a call; "" where they do."""
    past = (args.past_key, args.past_value)
    return refusal(args.query, args.key, args.value, *past, args.slopes, args.sink_logits)


def forward(args: WindowMemory) -> tuple[Tensor, ...]:
    """Run ``memc::window_memory``; arguments and results as its dialect page has them."""
    rule = _rule(args)
    if args.query.shape[2] == 1:
        token = State(args.key, args.value, args.positions)
        past = State(args.past_key, args.past_value, args.past_positions)
        step = attend_once(args.query, token, past, args.slopes, args.sink_logits, rule, ring=True)
        gone, after = step.left, step.following
        return step.out, step.lse, gone.key, gone.value, gone.positions, after.key, after.value, after.positions
    layout, keys, left = _lay_out(args)
    out, lse = attend(args.query, keys, args.slopes, args.sink_logits, rule)
    everything = torch.cat([args.past_positions, layout.positions], 1)
    next_positions = everything.gather(1, layout.ring.clamp_min(0)).masked_fill(layout.ring < 0, -1)
    return (
        out,
        lse,
        take(keys.key, left),
        take(keys.value, left),
        torch.where(left >= 0, args.positions - args.window, -1),
        take(keys.key, layout.ring),
        take(keys.value, layout.ring),
        next_positions,
    )


def backward(args: WindowMemory, out: Tensor, lse: Tensor, *copies: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value, past_key, past_value, slopes and sink_logits.

    ``copies`` are those of keys and values that left, and of the next ones.
    """
    layout, keys, left = _lay_out(args)
    slots = args.window + args.sinks
    size = slots + args.key.shape[2]
    # Tokens that left and slots of the next state are copies: their gradients go to where they were copied from.
    copied_key, copied_value = (
        put(gone.float(), left, size) + put(kept.float(), layout.ring, size)
        for gone, kept in zip(copies[:2], copies[2:], strict=True)
    )
    read = (args.query, keys, args.slopes, args.sink_logits, _rule(args))
    g = attend_backward(out, lse, copied_key, copied_value, *read)
    return (
        g.query,
        layout.restore(g.key[:, :, slots:]),
        layout.restore(g.value[:, :, slots:]),
        g.key[:, :, :slots],
        g.value[:, :, :slots],
        g.slopes,
        g.sink_logits,
    )


def _rule(args: WindowMemory) -> Rule:
    return Rule(args.scale, args.softcap, args.window, sinks=args.sinks)


def _lay_out(args: WindowMemory) -> tuple[Layout, Held, Tensor]:
    """Return slots and call, its padding moved behind its tokens, and which of them leaves with each token."""
    layout = lay_out(args.positions, args.past_positions, args.window, args.sinks, padded=True)
    past = layout.past_positions.to(torch.int32)
    held = Held(
        torch.cat([args.past_key, layout.arrange(args.key)], 2),
        torch.cat([args.past_value, layout.arrange(args.value)], 2),
        torch.cat([past, layout.positions.to(torch.int32)], 1),
        torch.cat([torch.zeros_like(past), layout.segments.to(torch.int32)], 1),
        args.positions.to(torch.int32),
        segments(args.positions).to(torch.int32),
    )
    return layout, held, layout.restore_rows(layout.left)


KERNELS = DeviceKernels(forward, refuses, backward)
