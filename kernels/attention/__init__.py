"""Registration of ``memc::attention`` and of its gradient."""

from __future__ import annotations

from memc.dialect.attention import attention
from memc.kernels.attention.reference import backward, forward
from memc.kernels.registration import register

register(attention, forward, backward)
