"""The eager backend: torch, op by op. It runs every dialect op and any program; others are compared with it."""

from __future__ import annotations

from memc.backends.eager.backend import EagerBackend
from memc.backends.eager.runner import EagerRunner, EagerState

__all__ = ["EagerBackend", "EagerRunner", "EagerState"]
