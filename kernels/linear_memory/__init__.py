"""Registration of ``memc::linear_memory`` and of its gradient."""

from __future__ import annotations

from memc.dialect.linear_memory import linear_memory
from memc.kernels.linear_memory.op import backward, forward
from memc.kernels.registration import register

register(linear_memory, forward, backward)
