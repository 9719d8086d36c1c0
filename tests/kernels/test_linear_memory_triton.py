"""The Triton kernels of ``memc::linear_memory`` against the token loop in float64, in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memc.kernels.linear_memory import device
from tests.kernels import oracles
from tests.kernels.cases import Shape
from tests.kernels.test_linear_memory import make
from tests.kernels.triton_support import assert_near, autograd_of, in_double, interpreted, poisoned

__all__ = ["interpreted"]

pytestmark = pytest.mark.usefixtures("interpreted", "short_chunks")

# A chunk, cut short, and a part of one; sizes that are no powers of two.
RAGGED = Shape(batch=1, groups=1, per_group=2, tokens=41, key_size=6, value_size=9, seed=3)
RULES = [("gated", False), ("gated", True), ("gated_delta", False), ("gated_delta", True)]
KINDS = [f"{update}-{'channel' if per_channel else 'head'}" for update, per_channel in RULES]


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut calls into chunks of two blocks of per-channel scores: less for the interpreter to do."""
    monkeypatch.setattr(device, "CHUNK", 2 * device.CHANNEL_ROWS)


def case(
    shape: Shape, update: str, per_channel: bool, strength: float, dtype: torch.dtype = torch.float32
) -> list[Any]:
    """Return arguments with padding and starts inside, NaN in what padding must not read."""
    x, _ = make(shape, update, per_channel, strength, dtype, padding=0.1, restart=0.03)
    x[5] = x[5].float()
    tokens = shape.tokens
    if tokens > 40:
        x[4][:, :40], x[4][:, 20] = torch.arange(3, 43), 0
        x[4][:, 11:14] = -1
    padding = x[4] < 0
    for at in (0, 1, 2, 3, 6):
        if x[at] is not None:
            mask = padding.view(shape.batch, 1, tokens, *[1] * (x[at].dim() - 3))
            x[at] = x[at].masked_fill(mask, torch.nan)
    return x


def blank(x: list[Any]) -> list[Any]:
    """Return arguments in float64 without the NaN."""
    return [y.nan_to_num() if isinstance(y, Tensor) and y.is_floating_point() else y for y in in_double(x)]


def run(x: list[Any], update: str, parts: list[slice]) -> tuple[Tensor, Tensor]:
    """Run the kernels on a call cut into parts."""
    q, k, v, g, positions, state, beta = x
    outs = []
    for p in parts:
        part = (q[:, :, p], k[:, :, p], v[:, :, p], g[:, :, p], positions[:, p], state)
        with poisoned():
            out, state = device.forward(*part, None if beta is None else beta[:, :, p], update=update)
        outs.append(out)
    return torch.cat(outs, 2), state


def check_values(x: list[Any], update: str) -> None:
    """Compare a whole call with the loop."""
    for found, expected in zip(run(x, update, [slice(None)]), oracles.linear_memory(*blank(x)), strict=True):
        assert_near(found, expected)


def check_gradients(x: list[Any], update: str) -> None:
    """Compare gradients with those of the loop."""
    generator = torch.Generator().manual_seed(5)
    shape = (*x[0].shape[:3], x[2].shape[3])
    grads = [torch.randn(s, generator=generator).to(d) for s, d in ((shape, x[0].dtype), (x[5].shape, x[5].dtype))]
    with poisoned():
        *found, beta = device.backward(*grads, *x, update=update)
    expected = autograd_of(oracles.linear_memory, blank(x), grads)
    for one, other in zip(found if x[6] is None else [*found, beta], expected, strict=True):
        assert_near(one, other)


@pytest.mark.parametrize(("update", "per_channel"), RULES, ids=KINDS)
def test_values_and_gradients(update: str, per_channel: bool) -> None:
    x = case(RAGGED, update, per_channel, 0.1)
    check_values(x, update)
    check_gradients(x, update)
