"""Kernel law of ``memc::bank_ffn``: its formula, its activations, exact zeros, rows of a batch on their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import memc.kernels  # noqa: F401
from memc.dialect.bank_ffn import ACTIVATIONS
from memc.kernels.bank_ffn.activations import SLOPES, VALUES
from memc.raising import feed_forward

OP = torch.ops.memc.bank_ffn
F64 = torch.float64


def oracle(x: Tensor, block: Tensor, activation: str) -> Tensor:
    """One token, one sequence and one hidden unit at a time."""
    out = torch.zeros_like(x)
    for row in range(x.shape[0]):
        for t in range(x.shape[1]):
            for gate, up, down in zip(*block[row], strict=True):
                hidden = VALUES[activation](gate @ x[row, t]) * (up @ x[row, t])
                out[row, t] += hidden * down
    return out


def drawn(batch: int = 2, tokens: int = 3, units: int = 5, width: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, tokens, width, dtype=F64), torch.randn(batch, 3, units, width, dtype=F64)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_equals_the_oracle_for_every_activation(activation: str) -> None:
    x, block = drawn()
    torch.testing.assert_close(OP(x, block, activation=activation), oracle(x, block, activation))


def test_the_activations_are_those_that_raising_names() -> None:
    named = {name: function for name, function in feed_forward.ACTIVATIONS.items() if name != "identity"}
    assert set(ACTIVATIONS) == set(named) == set(VALUES) == set(SLOPES)
    x = torch.linspace(-6, 6, 41, dtype=F64)
    for name, function in named.items():
        torch.testing.assert_close(VALUES[name](x), function(x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_slopes_are_the_derivatives(activation: str) -> None:
    x = torch.linspace(-6, 6, 40, dtype=F64)  # an even number: not at 0, where some have none
    step = 1e-6
    found = (VALUES[activation](x + step) - VALUES[activation](x - step)) / (2 * step)
    torch.testing.assert_close(SLOPES[activation](x), found, rtol=1e-6, atol=1e-8)


def test_the_gradients_of_every_activation() -> None:
    for activation in ACTIVATIONS:
        leaves = [value.requires_grad_() for value in drawn()]
        grads = torch.autograd.grad(OP(*leaves, activation=activation).square().sum(), leaves)
        expected = torch.autograd.grad(oracle(*leaves, activation).square().sum(), leaves)
        for mine, theirs in zip(grads, expected, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zeros", [slice(0, 3), slice(2, 3)])
def test_a_zero_block_gives_zero_and_leaves_what_it_is_added_to(kind: torch.dtype, zeros: slice) -> None:
    x, block = drawn(units=33, width=40)
    block = block.float()
    block[:, zeros] = 0
    x = (100 * x).to(kind)
    made = OP(x, block, activation="silu")
    assert made.dtype == kind
    assert not made.any()
    assert torch.equal(x + made, x)
    block[1, :, 7] = 1
    assert not torch.equal(x + OP(x, block, activation="silu"), x), "a block that is not zero must show"


def test_rows_of_a_batch_have_blocks_of_their_own() -> None:
    x, block = drawn(batch=3)
    whole = OP(x, block, activation="gelu")
    for row in range(3):
        alone = OP(x[row : row + 1], block[row : row + 1], activation="gelu")
        torch.testing.assert_close(alone, whole[row : row + 1])
    assert not torch.allclose(OP(x, block.flip(0), activation="gelu"), whole)


def test_blocks_of_levels_are_one_block() -> None:
    x, block = drawn(units=7)
    parts = block.split([4, 2, 1], 2)
    total = sum((OP(x, part.contiguous(), activation="silu") for part in parts), torch.zeros_like(x))
    torch.testing.assert_close(OP(x, block, activation="silu"), total)


@pytest.mark.parametrize(
    ("shape", "activation", "said"),
    [
        ((2, 3, 5), "silu", "block"),
        ((2, 2, 5, 4), "silu", "a gate, an up and a down"),
        ((2, 3, 5, 6), "silu", "same width"),
        ((2, 3, 5, 4), "swish", "activation is one of"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(shape: tuple[int, ...], activation: str, said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        torch.ops.memc.bank_ffn(
            torch.empty(2, 3, 4, device="meta"), torch.empty(shape, device="meta"), activation=activation
        )
