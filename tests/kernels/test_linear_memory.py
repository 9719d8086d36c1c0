"""Kernel law and state law of ``memc::linear_memory``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import memc.kernels  # noqa: F401
from tests.kernels import oracles
from tests.kernels.cases import F64, Shape, cut, shapes, walk

OP = torch.ops.memc.linear_memory


def make(
    shape: Shape, update: str, per_channel: bool, strength: float, dtype: torch.dtype = F64, **walking: float
) -> tuple[list[Any], torch.Generator]:
    """Return the op's tensors; the state is that of sequences under way, so some rows go on from position 3."""
    generator = shape.generator()
    q, k, v = shape.qkv(generator, dtype)
    if update == "gated_delta":
        k = torch.nn.functional.normalize(k, dim=-1)
    channels = shape.key_size if per_channel else 1

    def uniform(*sizes: int) -> Tensor:
        return torch.rand(*sizes, dtype=F64, generator=generator).to(dtype)

    log_decay = -strength * uniform(shape.batch, shape.groups, shape.tokens, channels)
    positions = walk(shape, generator, **walking)
    under_way = (positions == 0).cumsum(1) <= 1
    positions = torch.where((positions >= 0) & under_way, positions + 3, positions)
    state = uniform(shape.batch, shape.groups, shape.key_size, shape.value_size)
    beta = uniform(shape.batch, shape.groups, shape.tokens) if update == "gated_delta" else None
    return [q, k, v, log_decay, positions, state, beta], generator


def run(x: list[Any], update: str, parts: list[slice]) -> tuple[Tensor, Tensor]:
    q, k, v, g, positions, state, beta = x
    outs = []
    for p in parts:
        part = (q[:, :, p], k[:, :, p], v[:, :, p], g[:, :, p], positions[:, p], state)
        out, state = OP(*part, None if beta is None else beta[:, :, p], update=update)
        outs.append(out)
    return torch.cat(outs, 2), state


UPDATES = st.sampled_from(["gated", "gated_delta"])


@given(shapes(40), UPDATES, st.booleans(), st.sampled_from([0.0, 0.01, 1.0, 50.0]))
def test_equals_oracle_and_any_split(shape: Shape, update: str, per_channel: bool, strength: float) -> None:
    x, generator = make(shape, update, per_channel, strength)
    whole = run(x, update, [slice(None)])
    expected = oracles.linear_memory(*x)
    parts = run(x, update, cut(shape.tokens, generator))
    for one, other, third in zip(whole, expected, parts, strict=True):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(one, third)


@pytest.mark.parametrize("strength", [0.02, 50.0])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("update", ["gated", "gated_delta"])
def test_long_calls_and_their_gradients(update: str, per_channel: bool, strength: float) -> None:
    shape = Shape(batch=1, groups=1, per_group=2, tokens=301, key_size=5, value_size=3, seed=7)
    x, _ = make(shape, update, per_channel, strength, padding=0.05, restart=0.01)
    leaves = [y.requires_grad_() for y in x if isinstance(y, Tensor) and y.is_floating_point()]
    generator = torch.Generator().manual_seed(2)

    def gradients(results: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        generator.manual_seed(2)
        total = sum((y * torch.randn(y.shape, dtype=F64, generator=generator)).sum() for y in results)
        return torch.autograd.grad(total, leaves)  # type: ignore[arg-type]

    whole, expected = OP(*x, update=update), oracles.linear_memory(*x)
    torch.testing.assert_close(whole, expected)
    for one, other in zip(gradients(whole), gradients(expected), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("update", ["gated", "gated_delta"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("strength", [0.001, 1.0, 50.0])
def test_float32_stays_near_the_oracle(update: str, per_channel: bool, strength: float) -> None:
    shape = Shape(batch=2, groups=1, per_group=1, tokens=200, key_size=8, value_size=8, seed=4)
    x, _ = make(shape, update, per_channel, strength, torch.float32)
    exact = oracles.linear_memory(*(y.double() if isinstance(y, Tensor) and y.is_floating_point() else y for y in x))
    for one, other in zip(run(x, update, [slice(None)]), exact, strict=True):
        assert (one.double() - other).norm() <= 2e-6 * other.norm()


def test_a_gate_of_minus_infinity_forgets_everything() -> None:
    shape = Shape(batch=1, groups=1, per_group=1, tokens=30, key_size=3, value_size=2, seed=4)
    x, _ = make(shape, "gated", True, 1.0, padding=0.0, restart=0.0)
    x[3][:, :, 17] = -torch.inf
    out, state = run(x, "gated", [slice(None)])
    after = [y[:, :, 17:] if y.dim() == 4 and y.shape[2] == 30 else y for y in x[:4]]
    alone = run([*after, x[4][:, 17:], torch.zeros_like(x[5]), None], "gated", [slice(None)])
    torch.testing.assert_close((out[:, :, 17:], state), alone)


@given(shapes(12), UPDATES)
def test_a_batch_of_mixed_lengths_equals_one_at_a_time(shape: Shape, update: str) -> None:
    x, _ = make(shape, update, True, 1.0, restart=0.0)
    together = run(x, update, [slice(None)])
    for b in range(shape.batch):
        kept = x[4][b] >= 0
        if kept.any():
            q, k, v, g, positions, state, beta = x
            row = [y[b : b + 1, :, kept] for y in (q, k, v, g)] + [positions[b : b + 1, kept], state[b : b + 1]]
            alone = run([*row, None if beta is None else beta[b : b + 1, :, kept]], update, [slice(None)])
            torch.testing.assert_close(together[0][b, :, kept], alone[0][0])
            torch.testing.assert_close(together[1][b], alone[1][0])


def test_decay_after_the_write_is_found() -> None:
    shape = Shape(batch=1, groups=1, per_group=1, tokens=6, key_size=3, value_size=2, seed=4)
    x, _ = make(shape, "gated", False, 1.0, padding=0.0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(run(x, "gated", [slice(None)]), oracles.linear_memory(*x, decay_after_write=True))


def test_padding_that_decays_is_found() -> None:
    shape = Shape(batch=1, groups=1, per_group=1, tokens=6, key_size=3, value_size=2, seed=4)
    x, _ = make(shape, "gated", False, 1.0, padding=0.0, restart=0.0)
    x[4][0, 2] = -1
    expected = oracles.linear_memory(*x)
    x[1][:, :, 2] = 0
    x[4] = torch.arange(3, 9)[None]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(run(x, "gated", [slice(None)])[1], expected[1])
