"""Kernels of ``memc::bank_ffn`` in Triton's interpreter against the reference in float64, and against autograd."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from memc.dialect.bank_ffn import ACTIVATIONS, bank_ffn
from memc.kernels.bank_ffn import device as device_code
from memc.kernels.bank_ffn import reference as reference_code
from memc.kernels.launch import GPUS
from tests.kernels.triton_support import (
    Code,
    assert_near,
    autograd_of,
    cut_small,  # noqa: F401 - a fixture
    in_double,
    interpreted,  # noqa: F401 - a fixture
    poisoned,
)

device = Code(bank_ffn, device_code)
reference = Code(bank_ffn, reference_code)


def drawn(batch: int = 2, tokens: int = 21, units: int = 19, width: int = 37) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, tokens, width), torch.randn(batch, 3, units, width) / 2


def check(x: Tensor, block: Tensor, activation: str) -> None:
    grad = torch.randn(x.shape).to(x.dtype)
    with poisoned():
        out = device.forward(x, block, activation=activation)
        grads = device.backward(grad, x, block, activation=activation)
    assert_near(out, reference.forward(*in_double((x, block)), activation=activation))
    expected = autograd_of(lambda *a: (reference.forward(*a, activation=activation),), (x, block), [grad])
    for found, wanted in zip(grads, expected, strict=True):
        assert_near(found, wanted)


@pytest.mark.parametrize("tokens", [1, 21])
@pytest.mark.usefixtures("cut_small")
def test_values_and_gradients_equal_the_reference(tokens: int) -> None:
    check(*drawn(tokens=tokens), "silu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.usefixtures("interpreted")
def test_every_activation(activation: str) -> None:
    x, block = drawn(1, 3, 5, 4)
    check(4 * x, block, activation)


@pytest.mark.parametrize(
    "kinds", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.bfloat16, torch.float32)]
)
@pytest.mark.usefixtures("interpreted")
def test_half_types_are_as_near_as_they_can_be(kinds: tuple[torch.dtype, torch.dtype]) -> None:
    x, block = drawn()
    x, block = x.to(kinds[0]), block.to(kinds[1])
    wanted = reference.forward(*in_double((x, block)), activation="gelu")
    assert_near(device.forward(x, block, activation="gelu"), wanted)
    grads = device.backward(x, x, block, activation="gelu")
    for found, wanted in zip(grads, reference.backward(*in_double((x, x, block)), activation="gelu"), strict=True):
        # What is between the products is rounded to the type of x on the way.
        assert_near(found.to(x.dtype), wanted, atol=0.01 * wanted.abs().max().item())


@pytest.mark.usefixtures("interpreted")
def test_a_zero_block_gives_zero_where_its_units_leave_the_range_of_float16() -> None:
    x, block = drawn()
    block[:, 2] = 0
    x, block = (300 * x).half(), (4 * block).half()
    gate, up = (x.float() @ block[:, part].float().mT for part in (0, 1))
    assert (gate * up).max() > torch.finfo(torch.float16).max
    assert not device.forward(x, block, activation="silu").any()


@pytest.mark.usefixtures("cut_small")
def test_a_block_that_is_taken_from_another_sequence_is_found() -> None:
    x, block = drawn()
    wanted = reference.forward(*in_double((x, block)), activation="silu")
    with pytest.raises(AssertionError):
        assert_near(device.forward(x, block.flip(0), activation="silu"), wanted)


@pytest.mark.usefixtures("interpreted")
def test_a_wrong_slope_is_found() -> None:
    from memc.kernels.bank_ffn import triton as kernels

    with patch.object(kernels, "slope", lambda x, activation: x), pytest.raises(AssertionError):
        check(*drawn(1, 3, 5, 4), "silu")


def test_calls_that_the_kernels_do_not_take() -> None:
    x, block = drawn()
    assert not device.refuses(GPUS["amd-gfx942"], x, block, activation="silu")
    assert "float64" in device.refuses(GPUS["amd-gfx942"], x.double(), block, activation="silu")
    assert "without tokens" in device.refuses(GPUS["amd-gfx942"], x[:, :0], block, activation="silu")
