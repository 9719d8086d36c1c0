"""Registration of ``memc::quantised_attention`` and of its gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.library import register_autograd

import memc.dialect  # noqa: F401 - defines the op
from memc.kernels.common import accumulation_type, define_backward, like, or_zeros, register_forward
from memc.kernels.quantised_attention.reference import backward, forward

_SCHEMA = (
    "(Tensor grad_out, Tensor grad_lse, Tensor grad_key_tail, Tensor grad_value_tail, Tensor query, Tensor key,"
    " Tensor value, Tensor positions, Tensor past_key, Tensor past_value, Tensor past_positions, Tensor past_pages,"
    " Tensor past_ranges, Tensor past_key_tail, Tensor past_value_tail, Tensor? sink_logits=None, *, float scale,"
    " int bits, int page, int budget, int sinks, int window, int rerank=1, int dense_below=0, float softcap=0.0)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _fake(*args: Any, **_: Any) -> tuple[Tensor, ...]:
    query, key, value, *rest = args[4:]
    key_tail, value_tail, *sink_logits = rest[6:]
    return tuple(like(x) for x in (query, key, value, key_tail, value_tail, [*sink_logits, None][0]))


_backward = define_backward("quantised_attention", _SCHEMA, _fake, backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs
    ctx.mark_non_differentiable(*output[2:7])


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    query, value, key_tail, value_tail, sink_logits = (inputs[index] for index in (0, 2, 9, 10, 11))
    out, lse, *_, next_key_tail, next_value_tail = grads
    q, k, v, kt, vt, s = _backward(
        or_zeros(out, query.new_empty(*query.shape[:3], value.shape[3])),
        or_zeros(lse, query.new_empty(query.shape[:3], dtype=accumulation_type(query))),
        or_zeros(next_key_tail, key_tail),
        or_zeros(next_value_tail, value_tail),
        *inputs,
        **ctx.options,
    )
    return q, k, v, None, None, None, None, None, None, kt, vt, s if sink_logits is not None else None


register_forward("quantised_attention", forward)
register_autograd("memc::quantised_attention", _autograd, setup_context=_setup)
