"""Run kernels in Triton's interpreter, on a CPU: it checks the maths and the masks, not the hardware's limits."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Read when a kernel's module is imported, which is at its first launch.
os.environ["TRITON_INTERPRET"] = "1"

import pytest

from memc.kernels.launch import INTERPRETER, Jit, launching


@pytest.fixture
def interpreted() -> Iterator[None]:
    """Launch kernels in the interpreter during a test; skipped where Triton is not installed."""
    pytest.importorskip("triton", reason="Triton is not installed")
    with launching(Jit(INTERPRETER)):
        yield
