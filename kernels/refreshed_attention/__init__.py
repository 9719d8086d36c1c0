"""Registration of ``memc::refreshed_attention`` and of its gradient."""

from __future__ import annotations

from memc.dialect.refreshed_attention import refreshed_attention
from memc.kernels.refreshed_attention.reference import backward, forward
from memc.kernels.registration import register

register(refreshed_attention, forward, backward)
