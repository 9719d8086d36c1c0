"""Kernels of ``memc::quantised_attention``, states in place, in Triton's interpreter against the float64 reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from memc.dialect.quantised_attention import code_bytes, quantised_attention
from memc.kernels.launch import GPUS, Notes, launching
from memc.kernels.quantised_attention import device as device_code
from memc.kernels.quantised_attention import reference as reference_code
from memc.kernels.sparse_attention import steps
from tests.kernels.cases import Shape
from tests.kernels.triton_support import (
    Code,
    assert_near,
    cut_small,  # noqa: F401 - a fixture
    in_double,
    interpreted,  # noqa: F401 - a fixture
    poisoned,
)

device = Code(quantised_attention, device_code)
reference = Code(quantised_attention, reference_code)

SHAPE = Shape(batch=3, groups=1, per_group=2, tokens=0, key_size=12, value_size=20, seed=3)
RULE: dict[str, Any] = {"scale": 0.4, "bits": 4, "page": 4, "budget": 16, "sinks": 1, "window": 3}
SLOTS = 34

_COLUMNS = torch.arange(27)
PROMPT = torch.stack([_COLUMNS, (_COLUMNS - 3).clamp_min(-1), _COLUMNS.where(_COLUMNS < 22, -1)])
# A token that completes a page, one within one, one that has ended; the next begins a page; sequences that go on over a
# whole page between padding, that start anew, and go on; one token that starts anew.
CALLS = (
    torch.tensor([[27], [24], [-1]]),
    torch.tensor([[28], [25], [22]]),
    torch.tensor([[-1, 29, 30, -1, 31, 32], [0, 1, -1, 2, 3, 4], [23, 24, 25, 26, 27, 28]]),
    torch.tensor([[-1], [5], [0]]),
)


def empty(shape: Shape, slots: int, options: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """The state before the first token, with room for ``slots`` tokens."""
    page, bits = options["page"], options["bits"]
    leading, pages = (shape.batch, shape.groups), -(-slots // page)
    return [
        torch.zeros(*leading, pages, page, code_bytes(shape.key_size, bits), dtype=torch.uint8),
        torch.zeros(*leading, slots, code_bytes(shape.value_size, bits), dtype=torch.uint8),
        torch.full((shape.batch, slots), -1),
        torch.zeros(*leading, pages, 2 * shape.key_size, dtype=dtype),
        torch.zeros(*leading, slots, 2, dtype=dtype),
        torch.zeros(*leading, page, shape.key_size, dtype=dtype),
        torch.zeros(*leading, page, shape.value_size, dtype=dtype),
    ]


def tokens(positions: Tensor, shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    sized = Shape(shape.batch, shape.groups, shape.per_group, positions.shape[1], shape.key_size, shape.value_size, 5)
    generator = torch.Generator().manual_seed(int(positions.sum()) + 100)
    return [x.to(dtype) for x in sized.qkv(generator)]


def assert_held(buffers: list[Tensor], state: list[Tensor], page: int) -> None:
    """Compare what buffers hold with the functional form's state; what nothing tells of is nobody's."""
    codes, value_codes, positions, pages, ranges, *tails = buffers
    for row, length in enumerate((positions.amax(1) + 1).tolist()):
        there = state[2][row].argsort()[(state[2][row] < 0).sum() :]
        assert torch.equal(positions[row, :length], torch.arange(length)) and bool(
            (positions[row, length:] == -1).all()
        )
        assert len(there) == length and state[2][row].max() == length - 1
        assert torch.equal(value_codes[row, :, :length], state[1][row, :, there])
        assert torch.equal(ranges[row, :, :length].double(), state[4][row, :, there])
        whole = length // page
        assert torch.equal(codes[row, :, :whole], state[0][row, :, :whole])
        assert torch.equal(pages[row, :, :whole].double(), state[3][row, :, :whole])
    for found, wanted in zip(tails, state[5:], strict=True):
        assert torch.equal(found.double(), wanted)


def after_a_prompt(shape: Shape, options: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the state after a prompt in buffers, in float32, and as the functional form has it."""
    buffers, state = (empty(shape, slots, options, torch.float64) for slots in (SLOTS, 0))
    prompt = PROMPT[: shape.batch]
    given = [x.double() for x in tokens(prompt, shape, torch.float32)]
    wanted = reference.forward(*given, prompt, *state, **options)
    # What a sequence before left behind must not be read.
    for buffer in buffers[3:5]:
        buffer.fill_(torch.nan)
    found = torch.ops.memc.quantised_attention_(*given, prompt, *buffers, **options)
    assert_near(found[0].float(), wanted[0])
    assert_held(buffers, list(wanted[2:]), options["page"])
    return [x.float() if x.is_floating_point() else x for x in buffers], list(wanted[2:])


def check(sink_logits: Tensor | None = None, shape: Shape = SHAPE, **options: Any) -> None:
    buffers, state = after_a_prompt(shape, options)
    for positions in (call[: shape.batch] for call in CALLS):
        given = tokens(positions, shape, torch.float32)
        with poisoned():
            out, lse = device.in_place(*given, positions, *buffers, sink_logits, **options)
        wanted = reference.forward(*in_double([*given, positions, *state, sink_logits]), **options)
        state = list(wanted[2:])
        assert_near(out, wanted[0])
        assert_near(lse, wanted[1])
        assert (out[(positions < 0)[:, None].expand(out.shape[:3])] == 0).all()
        assert_held(buffers, state, options["page"])


@pytest.mark.parametrize(
    "options",
    [{}, {"bits": 8, "rerank": 2, "budget": 12}, {"softcap": 2.0, "dense_below": 25, "rerank": 2, "budget": 12}],
)
@pytest.mark.usefixtures("cut_small")
def test_states_in_place_equal_the_reference(options: dict[str, Any]) -> None:
    check(torch.randn(SHAPE.heads) if "softcap" in options else None, **{**RULE, **options})


@pytest.mark.usefixtures("cut_small")
def test_groups_of_heads_of_odd_sizes_and_pages_of_one_token() -> None:
    shape = Shape(batch=1, groups=2, per_group=3, tokens=0, key_size=7, value_size=5, seed=3)
    check(shape=shape, **{**RULE, "page": 1, "budget": 8, "rerank": 2})


@pytest.mark.usefixtures("interpreted")
def test_bfloat16_is_as_near_as_it_can_be() -> None:
    options = {**RULE, "bits": 8}
    buffers, _ = after_a_prompt(SHAPE, options)
    buffers = [x.bfloat16() if x.is_floating_point() else x for x in buffers]
    given = tokens(CALLS[0], SHAPE, torch.bfloat16)
    wanted = torch.ops.memc.quantised_attention_(
        *in_double([*given, CALLS[0], *(x.clone() for x in buffers)]), **options
    )
    for found, right in zip(device.in_place(*given, CALLS[0], *buffers, **options), wanted, strict=True):
        assert_near(found, right)


@pytest.mark.parametrize("fault", ["_in_tail", "scores", "other bits", "other ranges"])
@pytest.mark.usefixtures("cut_small")
def test_a_fault_is_found(fault: str) -> None:
    right, tails, decode = steps.scores, device._in_tail, device._attend

    def shifted(held: device.Held, *rest: Any) -> Any:
        wrong = {"ranges": held.ranges.roll(1, 2)} if fault == "other ranges" else {"codes": held.codes ^ 16}
        return decode(replace(held, **wrong), *rest)

    with (
        patch.object(device_code, "_in_tail", (lambda *a: 0 * tails(*a) - 1) if fault == "_in_tail" else tails),
        patch.object(steps, "scores", (lambda *a: -right(*a)) if fault == "scores" else right),
        patch.object(device_code, "_attend", shifted if fault.startswith("other") else decode),
        pytest.raises(AssertionError),
    ):
        check(**RULE)


@pytest.mark.usefixtures("cut_small")
def test_a_prompt_in_blocks_is_the_prompt_whole() -> None:
    shape, found = Shape(1, 1, 2, 0, 12, 20, 3), []
    positions = torch.tensor([[27, 28, -1, 29, 30]])
    for entries in (steps.BLOCK_ENTRIES, 60):
        buffers, _ = after_a_prompt(shape, RULE)
        with (
            patch.object(steps, "BLOCK_ENTRIES", entries),
            patch.object(device_code, "_attend", wraps=device_code._attend) as run,
        ):
            found.append(device.in_place(*tokens(positions, shape, torch.float32), positions, *buffers, **RULE))
        assert run.call_count == (2 if entries == 60 else 1)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)  # keys may be shared among other numbers of programs


def test_what_is_launched_depends_on_no_length() -> None:
    noted = []
    for slots in (34, 500):
        held = [x.to("meta") for x in empty(SHAPE, slots, RULE, torch.float32)]
        given = [x.to("meta") for x in (*tokens(CALLS[0], SHAPE, torch.float32), CALLS[0])]
        with launching(notes := Notes(GPUS["nvidia-sm120"])):
            device.in_place(*given, *held, **RULE)
        noted.append([(one.kernel, one.constants, one.warps, one.stages) for one in notes.launches])
    assert noted[0] == noted[1]


def test_a_call_that_kernels_do_not_take_is_refused() -> None:
    arguments = [*tokens(CALLS[0], SHAPE, torch.float64), CALLS[0], *empty(SHAPE, SLOTS, RULE, torch.float64)]
    assert "float64" in device.refuses(GPUS["nvidia-sm90"], *arguments, **RULE)
