"""Registration of ``memc::full_attention`` and of its gradient."""

from __future__ import annotations

from memc.dialect.full_attention import full_attention
from memc.kernels.full_attention.reference import backward, forward
from memc.kernels.registration import register

register(full_attention, forward, backward)
