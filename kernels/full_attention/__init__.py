"""Registration of ``memc::full_attention`` and of its gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.library import register_autograd

import memc.dialect  # noqa: F401 - defines the op
from memc.kernels.common import define_backward, like, register_forward
from memc.kernels.full_attention.reference import backward, forward

_SCHEMA = (
    "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor? key_positions=None, Tensor? bias=None,"
    " Tensor? sink_logits=None, *, float scale, float softcap=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _fake(*args: Any, **_: Any) -> tuple[Tensor, ...]:
    query, key, value, _positions, bias, sink_logits = [*args[1:], None, None, None][:6]
    return tuple(like(x) for x in (query, key, value, bias, sink_logits))


_backward = define_backward("full_attention", _SCHEMA, _fake, backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _autograd(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    _, _, _, _, bias, sink_logits = ctx.saved_tensors
    q, k, v, b, s = _backward(grad_out, *ctx.saved_tensors, **ctx.options)
    return q, k, v, None, b if bias is not None else None, s if sink_logits is not None else None


register_forward("full_attention", forward)
register_autograd("memc::full_attention", _autograd, setup_context=_setup)
