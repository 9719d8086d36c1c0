"""Registration of ``memc::sparse_attention`` and of its gradient."""

from __future__ import annotations

from memc.dialect.sparse_attention import sparse_attention
from memc.kernels.registration import register
from memc.kernels.sparse_attention.reference import backward, forward

register(sparse_attention, forward, backward)
