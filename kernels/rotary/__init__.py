"""Registration of ``memc::rotary`` and of its gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.library import register_autograd

import memc.dialect  # noqa: F401 - defines the op
from memc.kernels.common import register_forward
from memc.kernels.rotary.reference import backward, forward


def _setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_freq = backward(grad, *ctx.saved_tensors, **ctx.options, needs_inv_freq=ctx.needs_input_grad[2])
    return grad_x, None, grad_freq


register_forward("rotary", forward)
register_autograd("memc::rotary", _autograd, setup_context=_setup)
