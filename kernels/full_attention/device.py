"""Host code of ``memc::full_attention`` on a GPU: the kernels of ``memc::attention`` with everyone at one position."""

from __future__ import annotations

import torch
from torch import Tensor

from memc.dialect.full_attention import FullAttention
from memc.kernels.full_attention import reference
from memc.kernels.launch import DeviceKernels, Gpu
from memc.kernels.softmax_device import Held, Rule, attend, attend_backward, refusal


def refuses(gpu: Gpu, args: FullAttention) -> str:
    """Return why the kernels do not take a call; "" where they do."""
    return refusal(args.query, args.key, args.value, args.sink_logits, args.bias)


def forward(args: FullAttention) -> Tensor:
    """Run ``memc::full_attention``; arguments and results as its dialect page has them."""
    return attend(args.query, _keys(args), None, args.sink_logits, Rule(args.scale, args.softcap), args.bias)[0]


def backward(args: FullAttention, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value, bias and sink_logits.

    With a bias in torch: its own gradient is as large as all scores, of which the kernels never hold more than a block.
    """
    if args.bias is not None:
        return reference.backward(args, grad_out)
    copied = args.key.new_zeros(args.key.shape), args.value.new_zeros(args.value.shape)
    rule = Rule(args.scale, args.softcap)
    g = attend_backward(grad_out, None, *copied, args.query, _keys(args), None, args.sink_logits, rule)
    return g.query, g.key, g.value, None, g.sink_logits


def _keys(args: FullAttention) -> Held:
    """Return keys and queries of one sequence, all at position 0, so that each reads each; padding at -1."""
    numbers = args.key.new_zeros(args.key.shape[0], args.key.shape[2], dtype=torch.int32)
    positions = numbers if args.key_positions is None else args.key_positions.clamp(-1, 0).to(torch.int32)
    own = args.query.new_zeros(args.query.shape[0], args.query.shape[2], dtype=torch.int32)
    return Held(args.key.contiguous(), args.value.contiguous(), positions, numbers, own, own)


KERNELS = DeviceKernels(forward, refuses, backward)
