"""Registration of ``memc::window_memory`` and of its gradient."""

from __future__ import annotations

from memc.dialect.window_memory import window_memory
from memc.kernels.registration import register
from memc.kernels.window_memory.reference import backward, forward

register(window_memory, forward, backward)
