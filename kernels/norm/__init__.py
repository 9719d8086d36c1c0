"""Registration of ``memc::norm`` and of its gradient, which is torch code that tracing may look into."""

from __future__ import annotations

from memc.dialect.norm import norm
from memc.kernels.norm.reference import backward, forward
from memc.kernels.registration import register, register_gradients

register(norm, forward)
register_gradients(norm, backward)
