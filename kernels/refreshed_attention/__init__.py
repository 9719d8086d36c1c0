"""Registration of ``memc::refreshed_attention`` and of its gradient."""

from __future__ import annotations

import memc.dialect  # noqa: F401 - defines the op
from memc.kernels.refreshed_attention.reference import backward, forward
from memc.kernels.sparse_attention.registration import OPTIONS, register

register("refreshed_attention", forward, backward, states=("Tensor past_choice",), options=f"{OPTIONS}, int refresh")
