"""Host code of ``memc::full_attention`` on a GPU: the kernels of ``memc::attention`` with everyone at one position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memc.kernels.common import cast_like
from memc.kernels.launch import DeviceKernels, Gpu
from memc.kernels.softmax_device import Held, Rule, attend, attend_backward, refusal


def refuses(gpu: Gpu, *args: Any, **options: Any) -> str:
    """Return why the kernels do not take a call; "" where they do."""
    query, key, value, _positions, bias, sink_logits = [*args, None, None, None][:6]
    return "an additive bias" if bias is not None else refusal(query, key, value, sink_logits)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_positions: Tensor | None = None,
    bias: Tensor | None = None,
    sink_logits: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """Run ``memc::full_attention`` without a bias; arguments and results as its dialect page has them."""
    return attend(query, _keys(query, key, value, key_positions), None, sink_logits, Rule(scale, softcap))[0]


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_positions: Tensor | None = None,
    bias: Tensor | None = None,
    sink_logits: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value, bias, which is none, and sink_logits."""
    keys, copied = _keys(query, key, value, key_positions), (key.new_zeros(key.shape), value.new_zeros(value.shape))
    g = attend_backward(grad_out, None, *copied, query, keys, None, sink_logits, Rule(scale, softcap))
    return g.query, g.key, g.value, cast_like(None, bias), cast_like(g.sink_logits, sink_logits)


def _keys(query: Tensor, key: Tensor, value: Tensor, key_positions: Tensor | None) -> Held:
    """Return keys and queries of one sequence, all at position 0, so that each reads each; padding at -1."""
    numbers = key.new_zeros(key.shape[0], key.shape[2], dtype=torch.int32)
    positions = numbers if key_positions is None else key_positions.clamp(-1, 0).to(torch.int32)
    own = query.new_zeros(query.shape[0], query.shape[2], dtype=torch.int32)
    return Held(key.contiguous(), value.contiguous(), positions, numbers, own, own)


KERNELS = DeviceKernels(forward, refuses, backward)
