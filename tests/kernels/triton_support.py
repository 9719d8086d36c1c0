"""Run kernels in Triton's interpreter, on a CPU: it checks the maths and the masks, not the hardware's limits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

# Read when a kernel's module is imported, which is at its first launch.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from torch import Tensor

from memc.kernels.launch import INTERPRETER, Jit, launching


@pytest.fixture
def interpreted() -> Iterator[None]:
    """Launch kernels in the interpreter during a test; skipped where Triton is not installed."""
    pytest.importorskip("triton", reason="Triton is not installed")
    with launching(Jit(INTERPRETER)):
        yield


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill what host code allocates with NaN: a kernel that leaves a part of its output unwritten is seen."""
    empty = Tensor.new_empty

    def filled(self: Tensor, *sizes: Any, **options: Any) -> Tensor:
        made = empty(self, *sizes, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made.fill_(-(2**30))

    with patch.object(Tensor, "new_empty", filled):
        yield


def assert_near(found: Tensor, expected: Tensor, *, atol: float = 0.0) -> None:
    """Compare with a result in float64: relative to its largest value, to what the type of ``found`` can hold."""
    assert found.shape == expected.shape and not found.isnan().any()
    if found.numel() == 0:
        return
    allowed = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[found.dtype]
    error = (found.double() - expected).abs().max().item()
    assert error <= atol + allowed * max(1.0, expected.abs().max().item())
