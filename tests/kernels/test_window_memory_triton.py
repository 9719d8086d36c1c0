"""Kernels of ``memc::window_memory`` in Triton's interpreter against the reference in float64, and against autograd."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from memc.dialect.window_memory import window_memory
from memc.kernels.launch import GPUS, Notes, launching
from memc.kernels.window_memory import device as device_code
from memc.kernels.window_memory import reference as reference_code
from tests.kernels.cases import Shape, walk
from tests.kernels.triton_support import (
    Code,
    assert_near,
    autograd_of,
    cut_small,  # noqa: F401 - a fixture
    in_double,
    interpreted,  # noqa: F401 - a fixture
    poisoned,
)

device = Code(window_memory, device_code)
reference = Code(window_memory, reference_code)

SHAPE = Shape(batch=2, groups=1, per_group=2, tokens=43, key_size=12, value_size=20, seed=3)
RULE: dict[str, Any] = {"scale": 0.4, "window": 9, "sinks": 2}


def call(
    shape: Shape = SHAPE,
    dtype: torch.dtype = torch.float32,
    *,
    first: int = 30,
    plain: bool = False,
    restart: float = 0.05,
) -> list[Any]:
    """Return arguments: row 0 goes on from ``first`` tokens held, the others start; padding and restarts anywhere."""
    generator = shape.generator()
    query, key, value = shape.qkv(generator, dtype)
    positions = walk(shape, generator, padding=0.15, restart=restart)
    going_on = ((positions[0] == 0).cumsum(0) <= 1) & (positions[0] >= 0)
    positions[0] = torch.where(going_on, positions[0] + first, positions[0])
    held = torch.full((shape.batch, RULE["window"] + RULE["sinks"]), -1)
    for p in range(first):
        held[:, p if p < RULE["sinks"] else RULE["sinks"] + (p - RULE["sinks"]) % RULE["window"]] = p
    slots = (shape.batch, shape.groups, held.shape[1])
    past_key = torch.randn(*slots, shape.key_size, generator=generator)
    past_value = torch.randn(*slots, shape.value_size, generator=generator)
    slopes, sink_logits = torch.rand(shape.heads, generator=generator), torch.randn(shape.heads, generator=generator)
    extra = [None, None] if plain else [slopes.to(dtype), sink_logits.to(dtype)]
    empty = (held < 0)[:, None, :, None]
    state = [x.masked_fill(empty, 0).to(dtype) for x in (past_key, past_value)]
    return [query, key, value, positions, *state, held, *extra]


def check(arguments: list[Any], **options: Any) -> None:
    with poisoned():
        results = device.forward(*arguments, **RULE, **options)
    expected = reference.forward(*in_double(arguments), **RULE, **options)
    for index, (found, wanted) in enumerate(zip(results, expected, strict=True)):
        if found.is_floating_point():
            assert_near(found, wanted)
        else:
            assert torch.equal(found, wanted), index


def check_gradients(arguments: list[Any], **options: Any) -> None:
    results = reference.forward(*in_double(arguments), **RULE, **options)
    grads = [torch.randn(r.shape).to(arguments[0].dtype) if r.is_floating_point() else None for r in results]
    with poisoned():
        found = device.backward(*(g for g in grads if g is not None), *arguments, **RULE, **options)
    expected = autograd_of(reference.forward, arguments, grads, **RULE, **options)
    for one, other in zip([x for x in found if x.numel()], expected, strict=True):
        assert_near(one, other, atol=1e-5 if one.dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(("first", "plain", "options"), [(30, False, {}), (4, True, {"softcap": 1.5})])
@pytest.mark.usefixtures("cut_small")
def test_prompts_and_their_gradients_equal_the_reference(first: int, plain: bool, options: dict[str, Any]) -> None:
    arguments = call(first=first, plain=plain)
    check(arguments, **options)
    check_gradients(arguments, **options)


@pytest.mark.parametrize("above", [5, 512])
@pytest.mark.parametrize("first", [0, 4, 30])
@pytest.mark.usefixtures("cut_small")
def test_one_token_equals_the_reference(first: int, above: int) -> None:
    arguments = call(Shape(batch=3, groups=1, per_group=3, tokens=1, key_size=12, value_size=20, seed=1), first=first)
    arguments[3] = torch.tensor([[first], [-1], [0]])
    with patch("memc.kernels.softmax_step.SPLIT_ABOVE", above):
        check(arguments, softcap=2.0)


@pytest.mark.usefixtures("cut_small")
def test_one_token_after_another_equals_the_prompt() -> None:
    arguments = call(Shape(2, 1, 1, 24, 8, 8, seed=3), first=0)
    whole = device.forward(*arguments, **RULE)
    state, outputs = arguments[4:7], []
    for t in range(24):
        tokens = [*(x[:, :, t : t + 1] for x in arguments[:3]), arguments[3][:, t : t + 1]]
        *results, key, value, positions = device.forward(*tokens, *state, *arguments[7:], **RULE)
        state = [key, value, positions]
        outputs.append(results)
    joined = [torch.cat(x, 1 if x[0].dim() == 2 else 2) for x in zip(*outputs, strict=True)]
    for one, other in zip((*joined, *state), whole, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("interpreted")
def test_half_types_are_as_near_as_they_can_be() -> None:
    arguments = call(dtype=torch.bfloat16, plain=True)
    check(arguments)
    check_gradients(arguments)


@pytest.mark.usefixtures("cut_small")
def test_what_nobody_reads_may_be_anything() -> None:
    arguments = call(Shape(2, 1, 2, 1, 12, 20, seed=1))
    arguments[3] = torch.tensor([[30], [0]])
    arguments[4][1] = arguments[5][1] = torch.nan
    # The slot that the token takes has been read for the last time by the one before it.
    clean = device.forward(*arguments, **RULE)
    slot = 2 + (30 - 2) % 9
    arguments[4][0, :, slot] = arguments[5][0, :, slot] = torch.nan
    results = device.forward(*arguments, **RULE)
    for index in (0, 1, 5, 6):
        assert torch.equal(results[index], clean[index])
        assert not results[index].isnan().any()
    assert results[2][0].isnan().all()


@pytest.mark.usefixtures("cut_small")
def test_sinks_that_are_far_away_are_reached_and_the_rest_is_not_visited() -> None:
    arguments = call(Shape(1, 1, 1, 100, 8, 8, seed=2), first=0, restart=0.0, plain=True)
    from memc.kernels.attention.triton import forward as kernels

    visited = 0
    extend = kernels.extend

    def counting(*args: Any) -> Any:
        nonlocal visited
        visited += 1
        return extend(*args)

    with patch.object(kernels, "extend", counting):
        check(arguments)
    # Of 7 by 7 blocks of 16, each block of queries reads the first, its own, and the one before or two.
    assert visited <= 7 * 4


@pytest.mark.usefixtures("cut_small")
def test_a_sink_that_is_forgotten_is_found() -> None:
    arguments = call(plain=True)
    with pytest.raises(AssertionError):
        assert_near(
            device.forward(*arguments, **RULE)[0],
            reference.forward(*in_double(arguments), **{**RULE, "window": 10, "sinks": 1})[0],
        )


def test_what_is_launched_depends_on_no_length() -> None:
    noted = []
    for tokens in (40, 900):
        meta = [x.to("meta") if isinstance(x, Tensor) else x for x in call(Shape(2, 2, 2, tokens, 80, 64, 1))]
        with launching(notes := Notes(GPUS["amd-gfx942"])):
            device.forward(*meta, **RULE)
        noted.append([(one.kernel, one.constants, one.warps, one.stages) for one in notes.launches])
    assert noted[0] == noted[1]
