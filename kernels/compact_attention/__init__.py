"""Registration of ``memc::compact_attention`` and of its gradient."""

from __future__ import annotations

from memc.dialect.compact_attention import compact_attention
from memc.kernels.compact_attention.reference import backward, forward
from memc.kernels.registration import register

register(compact_attention, forward, backward)
