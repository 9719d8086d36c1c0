"""Registration of ``memc::rotary`` and of its gradient, which is torch code that tracing may look into."""

from __future__ import annotations

from torch import Tensor

from memc.dialect.rotary import Rotary, rotary
from memc.kernels.registration import register, register_gradients
from memc.kernels.rotary.reference import backward, forward


def _gradients(args: Rotary, grad: Tensor) -> tuple[Tensor | None, ...]:
    return backward(args, grad, needs_inv_freq=args.inv_freq.requires_grad)


register(rotary, forward)
register_gradients(rotary, _gradients)
