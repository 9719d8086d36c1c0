"""The Triton kernels of ``memc::linear_memory`` against the token loop in float64, in the interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from memc.dialect.linear_memory import linear_memory
from memc.kernels.launch import GPUS, INTERPRETER, Gpu, Notes, dispatch, launching
from memc.kernels.linear_memory import call, op
from memc.kernels.linear_memory import device as device_code
from tests.kernels import oracles
from tests.kernels.cases import Shape
from tests.kernels.test_linear_memory import make
from tests.kernels.triton_support import Code, assert_near, autograd_of, cut_small, in_double, interpreted, poisoned

device = Code(linear_memory, device_code)
reference = Code(linear_memory, op).forward

__all__ = ["cut_small", "interpreted"]

pytestmark = pytest.mark.usefixtures("interpreted", "short_chunks")

# A chunk, cut short, and a part of one; sizes that are no powers of two.
RAGGED = Shape(batch=1, groups=1, per_group=2, tokens=41, key_size=6, value_size=9, seed=3)
RULES = [("gated", False), ("gated", True), ("gated_delta", False), ("gated_delta", True)]
KINDS = [f"{update}-{'channel' if per_channel else 'head'}" for update, per_channel in RULES]


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut calls into chunks of two blocks of scores: less for the interpreter to do."""
    monkeypatch.setattr(call, "CHUNK", 2 * call.CHANNEL_ROWS)
    monkeypatch.setattr(call, "FLOAT32_ROWS", call.CHANNEL_ROWS)


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


@pytest.mark.parametrize(("update", "per_channel"), RULES, ids=KINDS)
def test_gates_that_sum_to_minus_40000(update: str, per_channel: bool) -> None:
    x = case(RAGGED, update, per_channel, 2000.0)
    x[3][:, :, 7] = -torch.inf
    x[3][:, :, 15:30:4] *= 1e-5
    check_values(x, update)


@pytest.mark.parametrize("tokens", [5, 41])
def test_one_channel_of_keys(tokens: int) -> None:
    """What sums values up has one."""
    check_values(case(replace(RAGGED, key_size=1, tokens=tokens), "gated", False, 1.0), "gated")


def test_gates_near_none() -> None:
    check_values(case(RAGGED, "gated", True, 0.001), "gated")


def test_gradients_under_strong_gates() -> None:
    x = case(RAGGED, "gated", True, 60.0)
    x[3][:, :, ::3] *= 1e-3
    check_gradients(x, "gated")


def test_sequences_and_heads_are_kept_apart() -> None:
    x = case(Shape(2, 2, 1, tokens=9, key_size=3, value_size=4, seed=8), "gated", False, 1.0)
    check_values(x, "gated")
    check_gradients(x, "gated")


@pytest.mark.parametrize("per_channel", [False, True], ids=["head", "channel"])
def test_blocks_of_channels(cut_small: None, per_channel: bool) -> None:
    x = case(Shape(1, 1, 1, tokens=20, key_size=19, value_size=18, seed=8), "gated_delta", per_channel, 1.0)
    check_values(x, "gated_delta")
    check_gradients(x, "gated_delta")


def test_a_system_of_four_blocks_of_keys_that_are_nearly_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "CHUNK", 64)
    x = case(Shape(1, 1, 1, tokens=70, key_size=5, value_size=3, seed=8), "gated_delta", False, 0.01)
    x[1] = torch.nn.functional.normalize(x[1] + 3 * x[1][:, :, :1], dim=-1)
    x[6] = x[6] * 0 + 1
    check_values(x, "gated_delta")


@pytest.mark.parametrize(("update", "per_channel"), RULES, ids=KINDS)
@pytest.mark.parametrize("tokens", [1, 7])
def test_short_calls(update: str, per_channel: bool, tokens: int) -> None:
    x = case(Shape(3, 2, 2, tokens, 5, 3, seed=tokens), update, per_channel, 1.0)
    x[4][0, 0], x[4][1, 0], x[4][2, 0] = -1, 0, 5
    for at in (0, 1, 2, 3, 6):
        if x[at] is not None:
            x[at][0, :, 0], x[at][1:] = torch.nan, x[at][1:].nan_to_num(0.5)
    x[4][1:] = x[4][1:].clamp_min(4)
    x[4][1, 0] = 0
    check_values(x, update)


@pytest.mark.parametrize(("update", "per_channel"), RULES[1:3], ids=KINDS[1:3])
def test_any_split_equals_one_run(update: str, per_channel: bool) -> None:
    x = case(RAGGED, update, per_channel, 0.3)
    whole = run(x, update, [slice(None)])
    parts = run(x, update, [slice(0, 1), slice(1, 12), slice(12, 41)])
    for one, other in zip(parts, whole, strict=True):
        assert_near(one, other.double())


@pytest.mark.parametrize("tokens", [2, 11])
def test_the_state_may_be_stepped_where_it_lies(tokens: int) -> None:
    x = case(Shape(1, 1, 2, tokens, 5, 3, seed=2), "gated", False, 1.0)
    out, state = run(x, "gated", [slice(None)])
    torch.testing.assert_close(device.in_place(*x), out, rtol=0, atol=0)
    torch.testing.assert_close(x[5], state, rtol=0, atol=0)


# The interpreter drops the digits that bfloat16 does not hold, where hardware rounds: twice the error.
BFLOAT16 = 2e-2


@pytest.mark.parametrize(("update", "per_channel"), RULES[1:3], ids=KINDS[1:3])
def test_bfloat16_is_near_and_keeps_its_types(update: str, per_channel: bool) -> None:
    x = case(RAGGED, update, per_channel, 0.1, torch.bfloat16)
    out, state = run(x, update, [slice(None)])
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    for found, exact in zip((out, state), oracles.linear_memory(*blank(x)), strict=True):
        assert (found.double() - exact).norm() <= BFLOAT16 * exact.norm()


def test_bfloat16_gradients_are_near() -> None:
    x = case(RAGGED, "gated_delta", False, 0.1, torch.bfloat16)
    grads = [torch.ones(1, 2, 41, 9).bfloat16(), torch.ones_like(x[5])]
    found = device.backward(*grads, *x, update="gated_delta")
    for one, exact in zip(found, autograd_of(oracles.linear_memory, blank(x), grads), strict=True):
        assert (one.double() - exact).norm() <= BFLOAT16 * exact.norm()


def test_a_mask_that_lets_padding_in_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from memc.kernels.linear_memory.triton import forward

    x = case(RAGGED, "gated", False, 0.1)
    monkeypatch.setattr(forward, "present", lambda positions, rows, tokens: rows < tokens)
    with pytest.raises(AssertionError):
        check_values(x, "gated")


def test_scores_above_the_diagonal_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from memc.kernels.linear_memory.triton import blocks

    x = case(RAGGED, "gated", False, 0.1)
    monkeypatch.setattr(blocks, "NOTHING", blocks.LOG2E)
    with pytest.raises(AssertionError):
        check_values(x, "gated")


@pytest.mark.parametrize("gpu", [GPUS["nvidia-sm90"], GPUS["amd-gfx942"]], ids=["nvidia", "amd"])
@pytest.mark.parametrize(("update", "per_channel"), RULES, ids=KINDS)
def test_host_code_needs_no_values(update: str, per_channel: bool, gpu: Gpu) -> None:
    x = [y.to("meta") if isinstance(y, Tensor) else y for y in make(RAGGED, update, per_channel, 1.0, torch.half)[0]]
    x[5] = x[5].float()
    assert device.refuses(gpu, *x, update=update) == ""
    with launching(notes := Notes(gpu)):
        out, state = device.forward(*x, update=update)
        grads = device.backward(out, state, *x, update=update)
    assert out.shape == (1, 2, 41, 9) and state.shape == x[5].shape
    leaves = [y for y in x if y is not None and y.is_floating_point()]
    assert [(g.shape, g.dtype) for g in grads[: len(leaves)]] == [(y.shape, y.dtype) for y in leaves]
    assert all(y.is_contiguous() for call in notes.launches for y in call.arguments.values() if isinstance(y, Tensor))


def test_calls_that_the_kernels_do_not_take() -> None:
    def refused(*x: Any) -> str:
        return device.refuses(INTERPRETER, *x, update="gated")

    x = make(RAGGED, "gated", False, 1.0, torch.float32)[0]
    wide = torch.empty(1, 1, 41, 300)
    empty = [y[:, :, :0] for y in x[:4]]
    assert refused(*x) == ""
    assert "type" in refused(x[0].double(), *x[1:])
    assert "log_decay" in refused(*x[:3], x[3].double(), *x[4:])
    assert "state" in refused(*x[:5], x[5].half(), None)
    assert "256" in refused(*x[:2], wide, *x[3:])
    delta = make(Shape(1, 1, 1, 2, 65, 3, seed=0), "gated_delta", True, 1.0, torch.float32)[0]
    assert "64 channels" in refused(*delta)
    assert "no tokens" in refused(*empty, x[4][:, :0], *x[5:])
    exact = in_double(x)
    torch.testing.assert_close(linear_memory.taking(dispatch("linear_memory", op.forward))(*exact), reference(*exact))
