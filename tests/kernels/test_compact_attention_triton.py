"""Kernels of ``memc::compact_attention``, states in place, in Triton's interpreter against the float64 reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from memc.dialect.compact_attention import compact_attention
from memc.kernels.compact_attention import choose
from memc.kernels.compact_attention import device as device_code
from memc.kernels.compact_attention import reference as reference_code
from memc.kernels.launch import GPUS, Notes, launching
from memc.kernels.sparse_attention import steps
from memc.kernels.sparse_attention.choose import Rule
from tests.kernels import compact_oracle
from tests.kernels.cases import Shape
from tests.kernels.test_quantised_attention_triton import tokens
from tests.kernels.triton_support import (
    Code,
    assert_near,
    cut_small,  # noqa: F401 - a fixture
    in_double,
    interpreted,  # noqa: F401 - a fixture
    poisoned,
)

device = Code(compact_attention, device_code)
reference = Code(compact_attention, reference_code)

SHAPE = Shape(batch=3, groups=1, per_group=2, tokens=0, key_size=12, value_size=12, seed=3)
INV_FREQ = torch.tensor([1.0, 0.3, 0.1, 0.02])
SLOTS = 46

_COLUMNS = torch.arange(31)
PROMPT = torch.stack([_COLUMNS, (_COLUMNS - 3).clamp_min(-1), _COLUMNS.where(_COLUMNS < 26, -1)])
# A token that completes a page, one within one, one that has ended; a sequence that goes on over a whole page between
# padding, one that starts anew, one that goes on; tokens behind these, and one that starts anew.
CALLS = (
    torch.tensor([[31], [28], [-1]]),
    torch.tensor([[-1, 32, 33, -1, 34, 35], [0, 1, -1, 2, 3, 4], [26, 27, 28, 29, 30, 31]]),
    torch.tensor([[36], [5], [0]]),
)
RULES: dict[str, dict[str, Any]] = {
    "longheads": {"page": 4, "budget": 16, "sinks": 1, "window": 3},
    "infllm": {"page": 4, "budget": 20, "sinks": 1, "window": 9},
}


def rule(method: str, **options: Any) -> dict[str, Any]:
    return {"scale": 0.4, "method": method, **RULES[method], **options}


def empty(shape: Shape, slots: int, page: int, dtype: torch.dtype) -> list[Tensor]:
    """The state before the first token, with room for ``slots`` tokens."""
    leading = (shape.batch, shape.groups)
    return [
        *(torch.zeros(*leading, slots, size, dtype=dtype) for size in (shape.key_size, shape.value_size)),
        torch.full((shape.batch, slots), -1),
        torch.zeros(*leading, -(-slots // page), 2 * shape.key_size, dtype=torch.promote_types(dtype, torch.float32)),
    ]


def assert_held(buffers: list[Tensor], state: list[Tensor]) -> None:
    """Compare what buffers hold with the functional form's state; what a slot that is not held has is nobody's."""
    for row, length in enumerate((state[2].amax(1) + 1).tolist()):
        assert torch.equal(buffers[2][row, :length], torch.arange(length))
        assert bool((buffers[2][row, length:] == -1).all())
        there = state[2][row].argsort()[(state[2][row] < 0).sum() :]
        for buffer, one in zip(buffers[:2], state[:2], strict=True):
            assert torch.equal(buffer[row, :, :length].double(), one[row, :, there])
    count = min(buffers[3].shape[2], state[3].shape[2])
    assert_near(buffers[3][:, :, :count].float(), state[3][:, :, :count])
    assert not buffers[3][:, :, count:].any() and not state[3][:, :, count:].any()


def after_a_prompt(shape: Shape, options: dict[str, Any], inv_freq: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the state after a prompt in buffers, in float32, and as the functional form has it."""
    buffers, state = (empty(shape, slots, options["page"], torch.float64) for slots in (SLOTS, 0))
    prompt = PROMPT[: shape.batch]
    given = in_double(tokens(prompt, shape, torch.float32))
    wanted = reference.forward(*given, prompt, *state, inv_freq.double(), **options)
    # What a sequence before left behind must not be read.
    buffers[3].fill_(torch.nan)
    for buffer in buffers[:2]:
        buffer[:, :, :31] = torch.nan
    found = torch.ops.memc.compact_attention_(*given, prompt, *buffers, inv_freq.double(), **options)
    assert_near(found[0].float(), wanted[0])
    assert_held(buffers, list(wanted[2:]))
    return [x.float() if x.is_floating_point() else x for x in buffers], list(wanted[2:])


def check(shape: Shape = SHAPE, inv_freq: Tensor = INV_FREQ, strength: float = 1.0, **options: Any) -> None:
    sink_logits = torch.randn(shape.heads) if "softcap" in options else None
    buffers, state = after_a_prompt(shape, options, inv_freq)
    for positions in (call[: shape.batch] for call in CALLS):
        given = tokens(positions, shape, torch.float32)
        given[0] *= strength
        # What is held nowhere must not be read.
        for buffer in buffers[:2]:
            buffer.masked_fill_((buffers[2] < 0)[:, None, :, None], torch.nan)
        with poisoned():
            out, lse = device.in_place(*given, positions, *buffers, inv_freq, sink_logits, **options)
        wanted = reference.forward(*in_double([*given, positions, *state, inv_freq, sink_logits]), **options)
        state = list(wanted[2:])
        # Scores that are larger have errors that are larger, and they are in the exponent.
        assert_near(out, wanted[0], atol=1e-6 * (strength - 1))
        assert_near(lse, wanted[1])
        assert (out[(positions < 0)[:, None].expand(out.shape[:3])] == 0).all()
        assert_held(buffers, state)


@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "dense_below": 30, "interleaved": True, "scaling": 1.2}])
@pytest.mark.usefixtures("cut_small")
def test_states_in_place_equal_the_reference(method: str, options: dict[str, Any]) -> None:
    check(**rule(method, **options))


@pytest.mark.parametrize("method", RULES)
@pytest.mark.usefixtures("cut_small")
def test_groups_of_large_heads_of_odd_sizes_and_pages_of_one_token(method: str) -> None:
    """Several blocks of channels, of those that are rotated and of the rest, and scores so strong that one key wins."""
    shape = Shape(1, 2, 3, 0, key_size=53, value_size=53 if method == "longheads" else 20, seed=3)
    fixed = rule(method, page=1, budget=8, window=3)
    check(shape, 100.0 ** (-torch.arange(17) / 17), strength=20.0, **fixed)


@pytest.mark.parametrize("method", RULES)
@pytest.mark.usefixtures("cut_small")
def test_a_sequence_from_its_start_in_pieces_equals_the_oracle(method: str) -> None:
    shape, sink_logits = Shape(2, 1, 2, 19, 6, 6, seed=4), torch.tensor([0.3, -1.0])
    query, key, value = shape.qkv(shape.generator(), torch.float32)
    positions = torch.stack([torch.arange(19), torch.tensor([-1, *range(7), -1, -1, *range(7, 16)])])
    fixed = rule(method, page=2, budget=10, window=4, interleaved=False, scaling=1.1)
    call = {"query": query, "key": key, "value": value, "positions": positions}
    expected = compact_oracle.compact_attention(**call, inv_freq=INV_FREQ[:2], sink_logits=sink_logits, **fixed)
    held = empty(shape, 20, 2, torch.float32)
    found = []
    for part in (slice(0, 7), slice(7, 18), slice(18, 19)):
        given = (x[:, :, part] for x in (query, key, value))
        with poisoned():
            found.append(device.in_place(*given, positions[:, part], *held, INV_FREQ[:2], sink_logits, **fixed))
    for pieces, whole in zip(zip(*found, strict=True), (expected.out, expected.lse), strict=True):
        assert_near(torch.cat(pieces, 2), whole)


@pytest.mark.parametrize("method", RULES)
@pytest.mark.usefixtures("cut_small")
def test_the_pages_chosen_are_those_of_the_reference(method: str) -> None:
    """Also of equal scores, where the lower page is taken."""
    shape = Shape(2, 2, 2, 6, 8, 8, seed=5)
    generator = shape.generator()
    query = shape.qkv(generator, torch.float32)[0]
    pages = torch.randn(2, 2, 11, 16, generator=generator)
    pages[1, :, :, :8] = pages[1, :, :1, :8]
    positions = torch.tensor([[43, 42, 20, 9, -1, 0], [40, -1, 39, 38, 37, 36]])
    options = {"scale": 0.4, "method": method, "rerank": 1, **RULES[method]}
    for fixed in (Rule(**options, dense_below=0), Rule(**options, dense_below=22)):
        held = device.Held(query, positions, pages, pages[..., :8], pages[..., :8], choose.Angles(INV_FREQ, False, 1.0))
        chosen = device._chosen(held, fixed)
        reads = choose.read(query, pages[..., :8], positions, fixed)
        wanted = reads.tokens[..., :: fixed.page].where(reads.live[..., :: fixed.page], -1)
        width = max(chosen.shape[3], wanted.shape[3])
        found, wanted = (torch.nn.functional.pad(x, (0, width - x.shape[3]), value=-1) for x in (chosen, wanted))
        assert torch.equal(found.sort(3).values, (wanted // fixed.page).sort(3).values)


@pytest.mark.usefixtures("interpreted")
def test_bfloat16_is_as_near_as_it_can_be() -> None:
    options = rule("longheads")
    buffers, _ = after_a_prompt(SHAPE, options, INV_FREQ)
    buffers[:2] = [x.bfloat16() for x in buffers[:2]]
    given = tokens(CALLS[0], SHAPE, torch.bfloat16)
    doubled = in_double([*given, CALLS[0], *(x.clone() for x in buffers), INV_FREQ])
    wanted = torch.ops.memc.compact_attention_(*doubled, **options)
    for found, right in zip(device.in_place(*given, CALLS[0], *buffers, INV_FREQ, **options), wanted, strict=True):
        assert_near(found, right) if found.dtype == torch.bfloat16 else assert_near(found, right, atol=1e-5)
    # What pages are chosen by is summed in float32, however few digits tokens have.
    assert_near(buffers[3], doubled[7], atol=1e-5)


@pytest.mark.parametrize("fault", ["scores", "places", "sums", "descriptions"])
@pytest.mark.usefixtures("cut_small")
def test_a_fault_is_found(fault: str) -> None:
    scores, chosen, brought, described = steps.scores, device._chosen, device._brought, device._describe

    def other_rule(held: device.Held, rule: Rule) -> None:
        described(held, replace(rule, scale=2 * rule.scale))

    wrong = {
        "scores": patch.object(steps, "scores", lambda *a: -scores(*a)),
        "places": patch.object(device_code, "_chosen", lambda *a: chosen(*a).flip(3)),
        "sums": patch.object(
            device_code, "_brought", lambda *a: brought(*a).flip(1)[:, :1].expand(-1, 2, -1, -1).contiguous()
        ),
        "descriptions": patch.object(device_code, "_describe", other_rule),
    }
    with wrong[fault], pytest.raises(AssertionError):
        check(**rule("longheads"))


@pytest.mark.usefixtures("cut_small")
def test_a_prompt_in_blocks_is_the_prompt_whole() -> None:
    shape, found = Shape(1, 1, 2, 0, 12, 12, 3), []
    positions = torch.tensor([[31, 32, -1, 33, 34]])
    options = rule("longheads")
    for entries in (steps.BLOCK_ENTRIES, 60):
        buffers, _ = after_a_prompt(shape, options, INV_FREQ)
        with (
            patch.object(steps, "BLOCK_ENTRIES", entries),
            patch.object(device_code, "_chosen", wraps=device_code._chosen) as run,
        ):
            given = tokens(positions, shape, torch.float32)
            found.append((*device.in_place(*given, positions, *buffers, INV_FREQ, **options), buffers[3]))
        assert run.call_count == (2 if entries == 60 else 1)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)  # keys may be shared among other numbers of programs


@pytest.mark.parametrize("method", RULES)
def test_what_is_launched_depends_on_no_length(method: str) -> None:
    noted = []
    for slots in (SLOTS, 500):
        held = [x.to("meta") for x in empty(SHAPE, slots, 4, torch.float32)]
        given = [x.to("meta") for x in (*tokens(CALLS[0], SHAPE, torch.float32), CALLS[0])]
        with launching(notes := Notes(GPUS["nvidia-sm120"])):
            device.in_place(*given, *held, INV_FREQ.to("meta"), **rule(method))
        noted.append([(one.kernel, one.constants, one.warps, one.stages) for one in notes.launches])
    assert noted[0] == noted[1]


def test_a_call_that_kernels_do_not_take_is_refused() -> None:
    state = empty(SHAPE, SLOTS, 4, torch.float64)
    arguments = [*tokens(CALLS[0], SHAPE, torch.float64), CALLS[0], *state, INV_FREQ]
    assert "float64" in device.refuses(GPUS["nvidia-sm90"], *arguments, **rule("longheads"))
    arguments = [*tokens(CALLS[0], SHAPE, torch.float32), CALLS[0], *empty(SHAPE, SLOTS, 4, torch.float32), INV_FREQ]
    assert device.refuses(GPUS["nvidia-sm90"], *arguments, **rule("longheads")) == ""
