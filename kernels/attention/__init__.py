"""Registration of ``memc::attention`` and of its gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.library import register_autograd

import memc.dialect  # noqa: F401 - defines the op
from memc.kernels.attention.reference import backward, forward
from memc.kernels.common import define_backward, like, or_zeros, register_forward

_SCHEMA = (
    "(Tensor grad_out, Tensor grad_next_key, Tensor grad_next_value, Tensor query, Tensor key, Tensor value,"
    " Tensor positions, Tensor past_key, Tensor past_value, Tensor past_positions, Tensor? slopes=None,"
    " Tensor? sink_logits=None, *, float scale, int window=0, int chunk=0, int prefix=0, float softcap=0.0)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _fake(*args: Any, **_: Any) -> tuple[Tensor, ...]:
    query, key, value, _positions, past_key, past_value, _past, *rest = args[3:]
    slopes, sink_logits = [*rest, None, None][:2]
    return tuple(like(x) for x in (query, key, value, past_key, past_value, slopes, sink_logits))


_backward = define_backward("attention", _SCHEMA, _fake, backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _autograd(
    ctx: Any, grad_out: Tensor | None, grad_key: Tensor | None, grad_value: Tensor | None, _positions: Any
) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    query, key, value, _, past_key, _, _, slopes, sink_logits = inputs
    if grad_out is None:
        grad_out = query.new_zeros(*query.shape[:3], value.shape[3])
    held = past_key.shape[2] + key.shape[2]
    grad_key = or_zeros(grad_key, key.new_empty(*key.shape[:2], held, key.shape[3]))
    grad_value = or_zeros(grad_value, value.new_empty(*value.shape[:2], held, value.shape[3]))
    q, k, v, pk, pv, s, l = _backward(grad_out, grad_key, grad_value, *inputs, **ctx.options)  # noqa: E741
    return q, k, v, None, pk, pv, None, s if slopes is not None else None, l if sink_logits is not None else None


register_forward("attention", forward)
register_autograd("memc::attention", _autograd, setup_context=_setup)
