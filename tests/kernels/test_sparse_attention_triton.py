"""Kernels of ``memc::sparse_attention`` in Triton's interpreter against the reference in float64."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from memc.dialect.sparse_attention import described_tokens, description, sparse_attention
from memc.kernels.launch import GPUS, Notes, launching
from memc.kernels.sparse_attention import device as device_code
from memc.kernels.sparse_attention import reference as reference_code
from memc.kernels.sparse_attention import slots as slots_code
from memc.kernels.sparse_attention import steps
from tests.kernels.cases import Shape, walk
from tests.kernels.triton_support import (
    Code,
    assert_near,
    cut_small,  # noqa: F401 - a fixture
    in_double,
    interpreted,  # noqa: F401 - a fixture
    poisoned,
)

device = Code(sparse_attention, device_code)
reference = Code(sparse_attention, reference_code)
slots = Code(sparse_attention, slots_code)

SHAPE = Shape(batch=3, groups=1, per_group=2, tokens=71, key_size=12, value_size=20, seed=3)
RULE: dict[str, Any] = {"scale": 0.4, "page": 8, "budget": 32, "sinks": 2, "window": 5}
METHODS = ("bounds", "bounds2", "moments", "hcam", "hip", "lowbit")


def rule(method: str, **options: Any) -> dict[str, Any]:
    # Four super-pages of 16 tokens, of which one is entered.
    small = {"page": 1, "budget": 16, "beam": 1} if method == "bounds2" else {}
    return {**RULE, "method": method, "channels": 4 if method == "lowbit" else 0, **small, **options}


def state(
    options: dict[str, Any], shape: Shape = SHAPE, dtype: torch.dtype = torch.float32, keys: float = 1.0
) -> list[Any]:
    """Return the state after a prompt: a row without padding, one that started again in it, one with padding."""
    generator = shape.generator()
    query, key, value = shape.qkv(generator, torch.float64)
    positions = walk(shape, generator, padding=0.1, restart=0.0)
    positions[0] = torch.arange(shape.tokens)
    positions[1] = torch.arange(shape.tokens)
    positions[1, 20:] -= 20
    sizes = description(options["method"], options["page"], shape.key_size)
    empty = [query.new_zeros(shape.batch, shape.groups, 0, size) for size in (shape.key_size, shape.value_size)]
    pages = query.new_zeros(shape.batch, shape.groups, 0, *sizes)
    held = torch.zeros(shape.batch, 0, dtype=torch.long)
    results = reference.forward(query, key * keys, value, positions, *empty, held, pages, **options)
    return [x.to(dtype) if x.is_floating_point() else x for x in results[2:]]


def token(shape: Shape, dtype: torch.dtype = torch.float32) -> list[Any]:
    made = Shape(shape.batch, shape.groups, shape.per_group, 1, shape.key_size, shape.value_size, 5)
    return [x.to(dtype) for x in made.qkv(made.generator())]


def check(
    tokens: list[Tensor], positions: Tensor, held: list[Any], sink_logits: Tensor | None, **options: Any
) -> list[Any]:
    arguments = [*tokens, positions, *held, sink_logits]
    with poisoned():
        results = device.forward(*arguments, **options)
    for found, wanted in zip(results, reference.forward(*in_double(arguments), **options), strict=True):
        if found.is_floating_point():
            assert_near(found, wanted)
        else:
            assert torch.equal(found, wanted)
    return list(results[2:])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"rerank": 2, "softcap": 2.0}, {"dense_below": 60}])
@pytest.mark.usefixtures("cut_small")
def test_one_token_equals_the_reference(method: str, options: dict[str, Any]) -> None:
    fixed = rule(method, **options)
    held = state(fixed)
    # The token at 71 completes a page, the next starts anew, and the last is padding.
    sink_logits = torch.randn(SHAPE.heads) if options else None
    check(token(SHAPE), torch.tensor([[71], [0], [-1]]), held, sink_logits, **fixed)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("cut_small")
def test_of_equal_scores_the_lower_index_is_taken(method: str) -> None:
    fixed = rule(method, rerank=2)
    held = state(fixed, keys=0.0)
    check(token(SHAPE), held[2].amax(1, keepdim=True) + 1, held, None, **fixed)


@pytest.mark.parametrize("page", [1, 5])
@pytest.mark.usefixtures("cut_small")
def test_pages_of_any_size_and_an_empty_state(page: int) -> None:
    shape = Shape(1, 1, 3, 21, 20, 12, seed=1)
    fixed = rule("bounds", page=page, budget=15)
    held = state(fixed, Shape(2, 1, 3, 21, 20, 12, seed=1))
    held = [x[:1] for x in held]
    check(token(shape), torch.tensor([[21]]), held, None, **fixed)
    check(token(shape), torch.tensor([[0]]), [x[:, :, :0] if x.dim() > 2 else x[:, :0] for x in held], None, **fixed)


@pytest.mark.usefixtures("interpreted")
def test_bfloat16_is_as_near_as_it_can_be() -> None:
    fixed = rule("bounds")
    held = state(fixed, dtype=torch.bfloat16)
    check(token(SHAPE, torch.bfloat16), held[2].amax(1, keepdim=True) + 1, held, None, **fixed)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("cut_small")
def test_what_is_not_chosen_is_not_read(method: str) -> None:
    fixed = rule(method)
    held = state(fixed)
    arguments = [*token(SHAPE), torch.tensor([[71], [-1], [53 - 2]]), *held]
    doubled = in_double(arguments)
    doubled[5].requires_grad_()
    reference.forward(*doubled, **fixed)[0].sum().backward()
    unread = (doubled[5].grad == 0).all(3, keepdim=True)
    assert unread[0].sum() > 20
    # What completes a page is read once to describe it.
    unread[0, :, 64:] = False
    clean = device.forward(*arguments, **fixed)[:2]
    arguments[4], arguments[5] = (x.masked_fill(unread, torch.nan) for x in arguments[4:6])
    for one, other in zip(device.forward(*arguments, **fixed), clean, strict=False):
        assert torch.equal(one[0], other[0])


@pytest.mark.usefixtures("cut_small")
def test_a_choice_of_other_pages_is_found() -> None:
    fixed = rule("bounds")
    held = state(fixed)
    right = steps.scores
    with patch.object(steps, "scores", lambda *a: -right(*a)), pytest.raises(AssertionError):
        check(token(SHAPE), held[2].amax(1, keepdim=True) + 1, held, None, **fixed)


def test_what_is_launched_depends_on_no_length() -> None:
    noted = []
    for tokens in (71, 300):
        fixed = rule("moments", rerank=2)
        held = [x.to("meta") for x in state(fixed, Shape(3, 1, 2, tokens, 12, 20, seed=3))]
        with launching(notes := Notes(GPUS["nvidia-sm120"])):
            device.forward(
                *(x.to("meta") for x in token(SHAPE)),
                torch.empty(3, 1, dtype=torch.long, device="meta"),
                *held,
                **fixed,
            )
        noted.append([(one.kernel, one.constants, one.warps, one.stages) for one in notes.launches])
    assert noted[0] == noted[1]


def buffers(held: list[Any], slots: int, page: int) -> list[Any]:
    """Lay a state out in buffers of ``slots``, the last of them for padding; ``page`` tokens described together."""
    key, value, positions, pages = held
    batch = len(positions)
    wide = [x.new_zeros(*x.shape[:2], slots, x.shape[3]) for x in (key, value)]
    at = torch.full((batch, slots), -1)
    described = pages.new_zeros(*pages.shape[:2], -(-slots // page), *pages.shape[3:])
    described[:, :, : pages.shape[2]] = pages
    for row in range(batch):
        there = (positions[row] >= 0).nonzero()[:, 0]
        last = int((positions[row] == 0).nonzero()[-1, 0])
        there = there[there >= last]
        place = positions[row, there]
        at[row, place] = place
        for wide_one, one in zip(wide, (key, value), strict=True):
            wide_one[row, :, place] = one[row, :, there]
    return [*wide, at, described]


CALLS = {
    "a token": torch.tensor([[71], [0], [-1]]),
    "a prompt": torch.tensor([[71, 72, 73, 74], [0, 1, 2, 3], [-1, -1, -1, -1]]),
    "a piece": torch.tensor([[-1, 71, 72], [51, 52, -1], [0, -1, 1]]),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("call", "options"),
    [("a token", {}), ("a prompt", {}), ("a piece", {"rerank": 2, "softcap": 2.0, "dense_below": 60})],
)
@pytest.mark.usefixtures("cut_small")
def test_states_in_place_equal_the_reference(method: str, call: str, options: dict[str, Any]) -> None:
    """Both forms in place, by kernels and in float64, give what the functional form gives, and hold what it holds."""
    fixed, positions = rule(method, **options), CALLS[call]
    held, piece = state(fixed), described_tokens(method, fixed["page"])
    shape = Shape(SHAPE.batch, SHAPE.groups, SHAPE.per_group, positions.shape[1], SHAPE.key_size, SHAPE.value_size, 5)
    tokens = [x.float() for x in shape.qkv(shape.generator())]
    sink_logits = torch.randn(SHAPE.heads) if options else None
    wanted = reference.forward(*in_double([*tokens, positions, *held, sink_logits]), **fixed)
    there = (positions >= 0)[:, None]
    for run, kind in ((slots.forward, torch.float64), (device.in_place, torch.float32)):
        given = [x.to(kind) if x.is_floating_point() else x for x in buffers(held, 101, piece)]
        sinks = None if sink_logits is None else sink_logits.to(kind)
        with poisoned():
            out, lse = run(*(x.to(kind) for x in tokens), positions, *given, sinks, **fixed)
        assert_near(out.float(), wanted[0])
        assert_near(lse.float(), wanted[1])
        assert (out[~there.expand(out.shape[:3])] == 0).all()
        following = buffers(list(wanted[2:]), 101, piece)
        assert torch.equal(given[2], following[2])
        # What a sequence before left in slots that are not held is nobody's.
        held_now = (given[2] >= 0)[:, None, :, None]
        for one, other in zip(given[:2], following[:2], strict=True):
            assert_near(one.float() * held_now, other * held_now)
        assert_near(given[3].float(), following[3])


@pytest.mark.usefixtures("cut_small")
def test_a_prompt_in_blocks_is_the_prompt_whole() -> None:
    fixed, positions = rule("moments", rerank=2), CALLS["a piece"]
    shape = Shape(SHAPE.batch, SHAPE.groups, SHAPE.per_group, positions.shape[1], SHAPE.key_size, SHAPE.value_size, 5)
    tokens = [x.float() for x in shape.qkv(shape.generator())]
    found = []
    for entries in (steps.BLOCK_ENTRIES, 500):
        with (
            patch.object(steps, "BLOCK_ENTRIES", entries),
            patch.object(device_code, "attend", wraps=device_code.attend) as run,
        ):
            found.append(device.in_place(*tokens, positions, *buffers(state(fixed), 101, 8), **fixed))
        assert run.call_count == (2 if entries == 500 else 1)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)  # keys may be shared among other numbers of programs


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.usefixtures("cut_small")
def test_a_super_page_is_described_with_its_last_page(tokens: int) -> None:
    shape = Shape(1, 1, 2, 79, SHAPE.key_size, SHAPE.value_size, seed=4)
    fixed, at = rule("bounds2"), torch.arange(79, 79 + tokens)[None]
    held = state(fixed, Shape(2, 1, 2, 79, SHAPE.key_size, SHAPE.value_size, seed=4))
    held = [x[:1] for x in held]
    new = [x.float() for x in Shape(1, 1, 2, tokens, 12, 20, 5).qkv(shape.generator())]
    wanted = reference.forward(*in_double([*new, at, *held]), **fixed)
    given = buffers(held, 101, 16)
    with poisoned():
        out = device.in_place(*new, at, *given, **fixed)[0]
    assert_near(out, wanted[0])
    assert not held[3][:, :, 4, 0].any() and bool(given[3][:, :, 4, 0].any())
    assert_near(given[3], buffers(list(wanted[2:]), 101, 16)[3])


@pytest.mark.usefixtures("cut_small")
def test_no_more_is_read_than_holds_the_mass() -> None:
    fixed = rule("moments", mass=0.2, budget=48)
    held = state(fixed)
    check(token(SHAPE), torch.tensor([[71], [0], [-1]]), held, None, **fixed)
    with pytest.raises(AssertionError), patch.object(steps, "enough", lambda ordered, mass: ordered > -torch.inf):
        check(token(SHAPE), torch.tensor([[71], [0], [-1]]), held, None, **fixed)
