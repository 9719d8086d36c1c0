"""Registration of ``memc::sparse_attention`` and of its gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.library import register_autograd

import memc.dialect  # noqa: F401 - defines the op
from memc.kernels.common import accumulation_type, define_backward, like, or_zeros, register_forward
from memc.kernels.sparse_attention.reference import backward, forward

_SCHEMA = (
    "(Tensor grad_out, Tensor grad_lse, Tensor grad_next_key, Tensor grad_next_value, Tensor query, Tensor key,"
    " Tensor value, Tensor positions, Tensor past_key, Tensor past_value, Tensor past_positions, Tensor past_pages,"
    " Tensor? sink_logits=None, *, float scale, str method, int page, int budget, int sinks, int window, int rerank=1,"
    " int dense_below=0, float softcap=0.0, int channels=0, float mass=1.0)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _fake(*args: Any, **_: Any) -> tuple[Tensor, ...]:
    query, key, value, _positions, past_key, past_value, _past, _pages, *rest = args[4:]
    return tuple(like(x) for x in (query, key, value, past_key, past_value, [*rest, None][0]))


_backward = define_backward("sparse_attention", _SCHEMA, _fake, backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs
    ctx.mark_non_differentiable(output[4], output[5])


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    query, key, value, _, past_key, _, _, _, sink_logits = inputs
    out, lse, next_key, next_value, _, _ = grads
    held = past_key.shape[2] + key.shape[2]
    q, k, v, pk, pv, s = _backward(
        or_zeros(out, query.new_empty(*query.shape[:3], value.shape[3])),
        or_zeros(lse, query.new_empty(query.shape[:3], dtype=accumulation_type(query))),
        or_zeros(next_key, key.new_empty(*key.shape[:2], held, key.shape[3])),
        or_zeros(next_value, value.new_empty(*value.shape[:2], held, value.shape[3])),
        *inputs,
        **ctx.options,
    )
    return q, k, v, None, pk, pv, None, None, s if sink_logits is not None else None


register_forward("sparse_attention", forward)
register_autograd("memc::sparse_attention", _autograd, setup_context=_setup)
