"""The kernels of norm and rotary against their references in float64."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from memc.dialect.norm import norm as norm_op
from memc.dialect.rotary import rotary as rotary_op
from memc.kernels.launch import Launch, launcher_of, launching
from memc.kernels.norm import device as norm_code
from memc.kernels.norm import reference as norm_reference
from memc.kernels.rotary import device as rotary_code
from memc.kernels.rotary import reference as rotary_reference
from tests.kernels.triton_support import Code, assert_near, interpreted, poisoned  # noqa: F401

norm_device, norm = Code(norm_op, norm_code), Code(norm_op, norm_reference).forward
rotary_device, rotary = Code(rotary_op, rotary_code), Code(rotary_op, rotary_reference).forward

pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("center", "weighted", "biased"), [(False, True, False), (True, True, True), (True, False, False)]
)
@pytest.mark.parametrize("shape", [(3, 5, 24), (1, 1, 64), (2, 0, 8)])
def test_norm(shape: tuple[int, ...], center: bool, weighted: bool, biased: bool, dtype: torch.dtype) -> None:
    x = (torch.randn(shape) * 3 + 1).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype) if weighted else None
    bias = torch.randn(shape[-1]).to(dtype) if biased else None
    with poisoned():
        found = norm_device.forward(x, weight, bias, eps=1e-5, center=center)
    wide = [None if t is None else t.double() for t in (weight, bias)]
    assert_near(found, norm(x.double(), *wide, eps=1e-5, center=center))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("tokens", "size", "pairs"), [(1, 16, 8), (7, 20, 6), (40, 8, 4)])
def test_rotary(tokens: int, size: int, pairs: int, interleaved: bool, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, tokens, size).to(dtype)
    positions = torch.randint(-1, 4000, (2, tokens))
    inv_freq = torch.rand(pairs)
    with poisoned():
        found = rotary_device.forward(x, positions, inv_freq, interleaved=interleaved, scaling=1.1)
    # The angle is a float32 in either: at position 4,000 its rounding is the error.
    assert_near(found, rotary(x.double(), positions, inv_freq, interleaved=interleaved, scaling=1.1), atol=5e-4)


def test_a_row_too_many_is_caught() -> None:
    x = torch.randn(3, 24)

    def planted(call: Launch) -> None:
        launcher = launcher_of(x.device)
        assert launcher is not None
        launcher(Launch(call.kernel, call.grid, {**call.arguments, "rows": 2}, call.constants))

    with poisoned(), patch.object(norm_code, "launch", planted):
        found = norm_device.forward(x, eps=1e-5)
    with pytest.raises(AssertionError):
        assert_near(found, norm(x.double(), eps=1e-5))


def test_a_launcher_is_for_the_devices_that_it_is_given() -> None:
    cpu, meta = torch.device("cpu"), torch.device("meta")
    outer = launcher_of(cpu)
    with launching(None, "meta"):
        assert launcher_of(meta) is None and launcher_of(cpu) is outer is not None
        with launching(None):
            assert launcher_of(cpu) is None
    assert launcher_of(meta) is outer


def test_other_types_are_left_to_the_reference() -> None:
    x: Tensor = torch.randn(2, 3, 8, dtype=torch.float64)
    assert torch.ops.memc.norm(x, eps=1e-5).dtype == torch.float64
