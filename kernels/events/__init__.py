"""Registration of ``memc::events``, which has no gradient."""

from __future__ import annotations

from torch import Tensor

from memc.dialect.events import Events, events
from memc.kernels.events.reference import forward
from memc.kernels.registration import register, register_gradients


def _nothing(args: Events, *_: Tensor) -> tuple[Tensor | None, ...]:
    return ()


register(events, forward)
register_gradients(events, _nothing)
