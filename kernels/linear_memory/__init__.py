"""Registration of ``memc::linear_memory`` and of its gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.library import register_autograd

import memc.dialect  # noqa: F401 - defines the op
from memc.kernels.common import define_backward, like, or_zeros, register_forward
from memc.kernels.linear_memory.op import backward, forward

_SCHEMA = (
    "(Tensor grad_out, Tensor grad_state, Tensor query, Tensor key, Tensor value, Tensor log_decay, Tensor positions,"
    " Tensor state, Tensor? beta=None, *, str update='gated') -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _fake(*args: Any, **_: Any) -> tuple[Tensor, ...]:
    query, key, value, log_decay, _positions, state, beta = [*args[2:], None][:7]
    return tuple(like(x) for x in (query, key, value, log_decay, state, beta))


_backward = define_backward("linear_memory", _SCHEMA, _fake, backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _autograd(ctx: Any, grad_out: Tensor | None, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    query, _, value, _, _, state, beta = inputs
    grad_out = or_zeros(grad_out, query.new_empty(*query.shape[:3], value.shape[3]))
    q, k, v, g, s, b = _backward(grad_out, or_zeros(grad_state, state), *inputs, **ctx.options)
    return q, k, v, g, None, s, b if beta is not None else None


register_forward("linear_memory", forward)
register_autograd("memc::linear_memory", _autograd, setup_context=_setup)
