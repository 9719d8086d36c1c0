"""Registration of ``memc::bank_ffn`` and of its gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.library import register_autograd

import memc.dialect  # noqa: F401 - defines the op
from memc.kernels.bank_ffn.reference import backward, forward
from memc.kernels.common import define_backward, like, register_forward

_SCHEMA = "(Tensor grad_out, Tensor x, Tensor block, str activation) -> (Tensor, Tensor)"


def _fake(_grad: Tensor, x: Tensor, block: Tensor, _activation: str) -> tuple[Tensor, Tensor]:
    return like(x), like(block)


_backward = define_backward("bank_ffn", _SCHEMA, _fake, backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, block, ctx.activation = inputs
    ctx.save_for_backward(x, block)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, block = ctx.saved_tensors
    return *_backward(grad, x, block, ctx.activation), None


register_forward("bank_ffn", forward)
register_autograd("memc::bank_ffn", _autograd, setup_context=_setup)
