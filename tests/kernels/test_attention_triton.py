"""Kernels of ``memc::attention`` in Triton's interpreter against the reference in float64 and against autograd."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from memc.dialect.attention import attention
from memc.kernels.attention import device as device_code
from memc.kernels.attention import reference as reference_code
from memc.kernels.attention import slots as slots_code
from memc.kernels.launch import GPUS, Notes, launching
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

device = Code(attention, device_code)
reference = Code(attention, reference_code)
slots = Code(attention, slots_code)

SHAPE = Shape(batch=2, groups=1, per_group=2, tokens=37, key_size=20, value_size=16, seed=3)
CAUSAL: dict[str, Any] = {"scale": 0.4}


def call(shape: Shape = SHAPE, past: int = 21, dtype: torch.dtype = torch.float32, *, plain: bool = False) -> list[Any]:
    """Return arguments: row 0 goes on from its state, row 1 starts anew; padding and restarts anywhere."""
    generator = shape.generator()
    query, key, value = shape.qkv(generator, dtype)
    positions = walk(shape, generator, padding=0.15, restart=0.05)
    going_on = ((positions == 0).cumsum(1) <= 1) & (positions >= 0)
    positions[0] = torch.where(going_on[0], positions[0] + past, positions[0])
    held = torch.arange(past).repeat(shape.batch, 1)
    held[:, past // 2 : past // 2 + 1] = -1
    past_key = torch.randn(shape.batch, shape.groups, past, shape.key_size, generator=generator)
    past_value = torch.randn(shape.batch, shape.groups, past, shape.value_size, generator=generator)
    slopes, sink_logits = torch.rand(shape.heads, generator=generator), torch.randn(shape.heads, generator=generator)
    state = [past_key.to(dtype), past_value.to(dtype), held]
    return [
        query,
        key,
        value,
        positions,
        *state,
        *([None, None] if plain else [slopes.to(dtype), sink_logits.to(dtype)]),
    ]


def check(arguments: list[Any], **options: Any) -> None:
    with poisoned():
        results = device.forward(*arguments, **options)
    expected = reference.forward(*in_double(arguments), **options)
    for found, wanted in zip(results[:3], expected[:3], strict=True):
        assert_near(found, wanted)
    assert torch.equal(results[3], expected[3])


def check_gradients(arguments: list[Any], **options: Any) -> None:
    results = reference.forward(*in_double(arguments), **options)
    grads = [torch.randn(r.shape).to(arguments[0].dtype) for r in results[:3]]
    with poisoned():
        found = device.backward(*grads, *arguments, **options)
    expected = autograd_of(reference.forward, arguments, [*grads, None], **options)
    for one, other in zip([x for x in found if x.numel()], [x for x in expected if x.numel()], strict=True):
        # Gradients of scores are rounded to the type of the keys on the way.
        assert_near(one, other, atol=1e-5 if one.dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(
    ("past", "options"),
    [
        (21, {}),
        (21, {"window": 9, "softcap": 1.5}),
        (0, {"chunk": 11}),
        (5, {"prefix": 26, "window": 4}),
    ],
)
@pytest.mark.usefixtures("cut_small")
def test_prompts_and_their_gradients_equal_the_reference(past: int, options: dict[str, Any]) -> None:
    arguments = call(past=past)
    check(arguments, **CAUSAL, **options)
    check_gradients(arguments, **CAUSAL, **options)


@pytest.mark.parametrize("past", [0, 70])
@pytest.mark.usefixtures("cut_small")
def test_one_token_equals_the_reference(past: int) -> None:
    shape = Shape(batch=3, groups=1, per_group=3, tokens=1, key_size=12, value_size=20, seed=1)
    for plain, options in ((True, {"window": 30}), (False, {"softcap": 2.0})):
        arguments = call(shape, past, plain=plain)
        arguments[3] = torch.tensor([[past], [-1], [0]])
        check(arguments, **CAUSAL, **options)
    check_gradients(arguments, **CAUSAL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("interpreted")
def test_half_types_are_as_near_as_they_can_be(dtype: torch.dtype) -> None:
    arguments = call(dtype=dtype, plain=True)
    check(arguments, **CAUSAL)
    check_gradients(arguments, **CAUSAL)
    one = call(Shape(2, 1, 2, 1, 20, 16, 5), 40, dtype)
    one[3] = torch.tensor([[40], [40]])
    check(one, **CAUSAL)


@pytest.mark.usefixtures("cut_small")
def test_what_nobody_reads_may_be_anything() -> None:
    arguments = call(Shape(2, 1, 2, 20, 8, 8, seed=3), 12)
    query, key, value, positions, past_key, past_value, held, *_ = arguments
    clean = device.forward(*arguments, **CAUSAL)
    grads = [torch.ones_like(x) for x in clean[:3]]
    clean_grads = device.backward(*grads, *arguments, **CAUSAL)
    padding = (positions < 0)[:, None, :, None]
    for x in (query, key, value, grads[0]):
        x.masked_fill_(padding, torch.nan)
    for x in (past_key, past_value):
        x.masked_fill_((held < 0)[:, None, :, None], torch.nan)
    out = device.forward(*arguments, **CAUSAL)[0]
    torch.testing.assert_close(out, clean[0])
    for one, other in zip(device.backward(*grads, *arguments, **CAUSAL), clean_grads, strict=True):
        torch.testing.assert_close(one, other)
    # A token that starts a sequence reads nothing of the state, one of padding nothing at all.
    step = [*(x[:, :, -1:].clone() for x in (query, key, value)), torch.tensor([[-1], [0]]), past_key, past_value, held]
    for x in (*step[:3], past_key, past_value):
        x[0] = torch.nan
    step[0][1], step[1][1], step[2][1] = (1.0, 1.0, 2.0)
    past_key[1] = past_value[1] = torch.nan
    out = device.forward(*step, **CAUSAL)[0]
    assert not out[0].any()
    torch.testing.assert_close(out[1], torch.full_like(out[1], 2.0))


@pytest.mark.usefixtures("cut_small")
def test_a_sequence_in_parts_equals_the_whole() -> None:
    arguments = call(past=0)
    whole = device.forward(*arguments, **CAUSAL)
    state, outputs = arguments[4:7], []
    for part in (slice(0, 1), slice(1, 20), slice(20, 35), slice(35, 36), slice(36, 37)):
        tokens = [*(x[:, :, part] for x in arguments[:3]), arguments[3][:, part]]
        out, *state = device.forward(*tokens, *state, *arguments[7:], **CAUSAL)
        outputs.append(out)
    for one, other in zip((torch.cat(outputs, 2), *state), whole, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("tokens", [1, 21])
@pytest.mark.parametrize("options", [{}, {"window": 9, "softcap": 2.0}])
@pytest.mark.usefixtures("cut_small")
def test_buffers_of_slots_are_written_in_place(tokens: int, options: dict[str, Any]) -> None:
    shape = Shape(batch=3, groups=1, per_group=2, tokens=tokens, key_size=12, value_size=20, seed=1)
    arguments = call(shape, past=50)
    start = torch.tensor([[25], [0], [-1]])
    arguments[3] = torch.where(start < 0, -1, start + torch.arange(tokens))
    arguments[6][:, 25:] = -1
    # What is in a slot without a token is nobody's, and so is what a row that starts anew has held.
    for x in arguments[4:6]:
        x[:, :, 25:] = torch.nan
    mine, theirs = ([x.clone() for x in given] for given in (arguments, in_double(arguments)))
    with poisoned():
        out = device.in_place(*mine, **CAUSAL, **options)
    for x in theirs[4:6]:
        x.nan_to_num_()
    assert_near(out, slots.forward(*theirs, **CAUSAL, **options))
    held = theirs[6] >= 0
    assert torch.equal(mine[6][:, :-1], theirs[6][:, :-1])
    for one, other in zip(mine[4:6], theirs[4:6], strict=True):
        assert torch.equal(one.double().mT[:, 0].mT[held], other.mT[:, 0].mT[held])


@pytest.mark.usefixtures("cut_small")
def test_a_window_that_is_off_by_one_is_found() -> None:
    arguments = call(past=0)
    out = device.forward(*arguments, **CAUSAL, window=6)[0]
    with pytest.raises(AssertionError):
        assert_near(out, reference.forward(*in_double(arguments), **CAUSAL, window=5)[0])


@pytest.mark.usefixtures("cut_small")
def test_a_kernel_that_reads_the_sequence_before_is_found() -> None:
    from memc.kernels.attention.triton import forward as kernels

    right = kernels.readable
    careless = patch.object(kernels, "readable", lambda p, j, same, *rules: right(p, j, same | True, *rules))
    with careless, pytest.raises(AssertionError):
        check(call(), **CAUSAL)


def on_meta(shape: Shape, past: int, dtype: torch.dtype = torch.bfloat16) -> list[Any]:
    return [x.to("meta") if isinstance(x, Tensor) else x for x in call(shape, past, dtype)]


@pytest.mark.parametrize("tokens", [1, 40])
def test_what_is_launched_depends_on_no_length(tokens: int) -> None:
    noted = []
    for more in (0, 900):
        with launching(notes := Notes(GPUS["nvidia-sm90"])):
            device.forward(*on_meta(Shape(2, 2, 2, tokens + more * (tokens > 1), 80, 64, 1), more), **CAUSAL)
        noted.append([(one.kernel, one.constants, one.warps, one.stages) for one in notes.launches])
    assert noted[0] == noted[1]


def test_calls_that_the_kernels_do_not_take() -> None:
    gpu = GPUS["nvidia-sm80"]
    assert not device.refuses(gpu, *on_meta(SHAPE, 5), **CAUSAL)
    assert "float64" in device.refuses(gpu, *in_double(on_meta(SHAPE, 5)), **CAUSAL)
    assert "channels" in device.refuses(gpu, *on_meta(Shape(1, 1, 1, 2, 320, 8, 1), 5), **CAUSAL)
    assert "heads" in device.refuses(gpu, *on_meta(Shape(1, 1, 71, 2, 8, 8, 1), 5), **CAUSAL)
    empty = [x[:, :, :0] if x is not None and x.dim() == 4 else x for x in on_meta(SHAPE, 5)]
    assert "without tokens" in device.refuses(gpu, *empty, **CAUSAL)
