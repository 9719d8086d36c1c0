"""Host code of ``memc::attention`` on a GPU: one token, or a block of queries after another."""

from __future__ import annotations

import torch
from torch import Tensor

from memc.dialect.attention import Attention
from memc.kernels.attention.slots import write
from memc.kernels.common import held_positions
from memc.kernels.launch import DeviceKernels, Gpu
from memc.kernels.softmax_device import Held, Rule, attend, attend_backward, held, refusal, unordered
from memc.kernels.softmax_step import State, attend_once


def refuses(gpu: Gpu, args: Attention) -> str:
    """Return why the kernels do not take a call; "" where they do."""
    past = (args.past_key, args.past_value)
    reason = refusal(args.query, args.key, args.value, *past, args.slopes, args.sink_logits)
    return reason or unordered(*past, args.past_positions)


def forward(args: Attention) -> tuple[Tensor, ...]:
    """Run ``memc::attention``; arguments and results as its dialect page has them."""
    if args.query.shape[2] == 1:
        step = attend_once(args.query, *_states(args), args.slopes, args.sink_logits, _rule(args))
        return step.out, step.following.key, step.following.value, step.following.positions
    keys = _everything(args)
    out, _ = attend(args.query, keys, args.slopes, args.sink_logits, _rule(args))
    return out, keys.key, keys.value, held_positions(args.past_positions, args.positions)


def backward(
    args: Attention, grad_out: Tensor, grad_next_key: Tensor, grad_next_value: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value, past_key, past_value, slopes and sink_logits."""
    past, grads = args.past_key.shape[2], (grad_out, None, grad_next_key, grad_next_value)
    g = attend_backward(*grads, args.query, _everything(args), args.slopes, args.sink_logits, _rule(args))
    return (
        g.query,
        g.key[:, :, past:],
        g.value[:, :, past:],
        g.key[:, :, :past],
        g.value[:, :, :past],
        g.slopes,
        g.sink_logits,
    )


def in_place(args: Attention) -> Tensor:
    """Run ``memc::attention_`` on buffers of slots, as :func:`memc.kernels.attention.slots.forward` does."""
    if args.query.shape[2] == 1:
        states = _states(args)
        return attend_once(args.query, *states, args.slopes, args.sink_logits, _rule(args), in_place=True).out
    write(args.positions, ((args.key, args.past_key), (args.value, args.past_value)), args.past_positions)
    own, past = args.positions.to(torch.int32), args.past_positions.to(torch.int32)
    keys = Held(args.past_key, args.past_value, past, torch.zeros_like(past), own, torch.zeros_like(own))
    return attend(args.query, keys, args.slopes, args.sink_logits, _rule(args))[0]


def _rule(args: Attention) -> Rule:
    return Rule(args.scale, args.softcap, args.window, args.chunk, args.prefix)


def _states(args: Attention) -> tuple[State, State]:
    """Return what comes and what is held."""
    return State(args.key, args.value, args.positions), State(args.past_key, args.past_value, args.past_positions)


def _everything(args: Attention) -> Held:
    """Return what is held with what comes behind it."""
    keys, values = torch.cat([args.past_key, args.key], 2), torch.cat([args.past_value, args.value], 2)
    return held(keys, values, args.positions, args.past_positions)


KERNELS = DeviceKernels(forward, refuses, backward, in_place)
