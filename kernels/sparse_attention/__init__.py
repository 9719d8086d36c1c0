"""Registration of ``memc::sparse_attention`` and of its gradient."""

from __future__ import annotations

import memc.dialect  # noqa: F401 - defines the op
from memc.kernels.sparse_attention.reference import backward, forward
from memc.kernels.sparse_attention.registration import register

register("sparse_attention", forward, backward)
