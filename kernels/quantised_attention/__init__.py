"""Registration of ``memc::quantised_attention`` and of its gradient."""

from __future__ import annotations

from memc.dialect.quantised_attention import quantised_attention
from memc.kernels.quantised_attention.reference import backward, forward
from memc.kernels.registration import register

register(quantised_attention, forward, backward)
