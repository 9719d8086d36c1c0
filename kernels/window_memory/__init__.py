"""Registration of ``memc::window_memory`` and of its gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.library import register_autograd

import memc.dialect  # noqa: F401 - defines the op
from memc.kernels.common import accumulation_type, define_backward, like, or_zeros, register_forward
from memc.kernels.window_memory.reference import backward, forward

_SCHEMA = (
    "(Tensor grad_out, Tensor grad_lse, Tensor grad_left_key, Tensor grad_left_value, Tensor grad_next_key,"
    " Tensor grad_next_value, Tensor query, Tensor key, Tensor value, Tensor positions, Tensor past_key,"
    " Tensor past_value, Tensor past_positions, Tensor? slopes=None, Tensor? sink_logits=None, *, float scale,"
    " int window, int sinks=0, float softcap=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _fake(*args: Any, **_: Any) -> tuple[Tensor, ...]:
    query, key, value, _positions, past_key, past_value, _past, *rest = args[6:]
    slopes, sink_logits = [*rest, None, None][:2]
    return tuple(like(x) for x in (query, key, value, past_key, past_value, slopes, sink_logits))


_backward = define_backward("window_memory", _SCHEMA, _fake, backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    query, key, value, _, past_key, past_value, _, slopes, sink_logits = inputs
    out, lse, left_key, left_value, _, next_key, next_value, _ = grads
    q, k, v, pk, pv, s, l = _backward(  # noqa: E741
        or_zeros(out, query.new_empty(*query.shape[:3], value.shape[3])),
        or_zeros(lse, query.new_empty(query.shape[:3], dtype=accumulation_type(query))),
        or_zeros(left_key, key),
        or_zeros(left_value, value),
        or_zeros(next_key, past_key),
        or_zeros(next_value, past_value),
        *inputs,
        **ctx.options,
    )
    return q, k, v, None, pk, pv, None, s if slopes is not None else None, l if sink_logits is not None else None


register_forward("window_memory", forward)
register_autograd("memc::window_memory", _autograd, setup_context=_setup)
