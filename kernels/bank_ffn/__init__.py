"""Registration of ``memc::bank_ffn`` and of its gradient."""

from __future__ import annotations

from memc.dialect.bank_ffn import bank_ffn
from memc.kernels.bank_ffn.reference import backward, forward
from memc.kernels.registration import register

register(bank_ffn, forward, backward)
