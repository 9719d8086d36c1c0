"""Host code of ``memc::refreshed_attention``, its kernels in Triton's interpreter, against the reference in float64."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from memc.dialect.refreshed_attention import most_chosen, refreshed_attention
from memc.dialect.sparse_attention import described_tokens, description
from memc.kernels.launch import GPUS, Notes, launching
from memc.kernels.refreshed_attention import device as device_code
from memc.kernels.refreshed_attention import reference as reference_code
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

device = Code(refreshed_attention, device_code)
reference = Code(refreshed_attention, reference_code)

SHAPE = Shape(batch=3, groups=1, per_group=2, tokens=0, key_size=12, value_size=20, seed=3)
RULE: dict[str, Any] = {"scale": 0.4, "method": "bounds", "page": 2, "budget": 8, "sinks": 1, "window": 3, "refresh": 3}
SLOTS = 51

_COLUMNS = torch.arange(27)
PROMPT = torch.stack([_COLUMNS, (_COLUMNS - 3).clamp_min(-1), _COLUMNS.where(_COLUMNS < 22, -1)])
# Tokens one by one, of which those of one row or another choose; a piece with padding in which a sequence starts anew
# and others choose several times; and what comes behind it.
CALLS = (
    torch.tensor([[27], [24], [-1]]),
    torch.tensor([[28], [25], [22]]),
    torch.tensor([[-1, 29, 30, 31, -1, 32, 33], [0, 1, -1, 2, 3, 4, 5], [23, 24, 25, 26, 27, 28, 29]]),
    torch.tensor([[34], [6], [30]]),
)
METHODS = {
    "bounds": {},
    "bounds2": {"page": 1, "beam": 1},
    "moments": {"rerank": 2, "dense_below": 25, "softcap": 2.0},
    "lowbit": {"channels": 4, "rerank": 2, "mass": 0.7},
    "hip": {"budget": 10},
}


def rule(method: str) -> dict[str, Any]:
    return {**RULE, "method": method, **METHODS[method]}


def empty(slots: int, options: dict[str, Any]) -> list[Tensor]:
    """The state before the first token in float64, with room for ``slots`` tokens."""
    page, method, leading = options["page"], options["method"], (SHAPE.batch, SHAPE.groups)
    sizes = description(method, page, SHAPE.key_size)
    most = most_chosen(method, page, options["budget"], options.get("rerank", 1))
    return [
        *(torch.zeros(*leading, slots, size, dtype=torch.float64) for size in (SHAPE.key_size, SHAPE.value_size)),
        torch.full((SHAPE.batch, slots), -1),
        torch.zeros(*leading, -(-slots // described_tokens(method, page)), *sizes, dtype=torch.float64),
        torch.full((*leading, most), -1),
    ]


def check(**options: Any) -> None:
    buffers, state = (empty(slots, options) for slots in (SLOTS, 0))
    given = in_double(tokens(PROMPT, SHAPE, torch.float32))
    state = list(reference.forward(*given, PROMPT, *state, **options)[2:])
    torch.ops.memc.refreshed_attention_(*given, PROMPT, *buffers, **options)
    assert torch.equal(buffers[4], state[4])
    buffers = [x.float() if x.is_floating_point() else x for x in buffers]
    for positions in CALLS:
        given = tokens(positions, SHAPE, torch.float32)
        with poisoned():
            out, lse = device.in_place(*given, positions, *buffers, **options)
        wanted = reference.forward(*in_double([*given, positions, *state]), **options)
        state = list(wanted[2:])
        assert_near(out, wanted[0])
        assert_near(lse, wanted[1])
        assert torch.equal(buffers[2].amax(1), state[2].amax(1))
        assert torch.equal(buffers[4], state[4]), "the same choices"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("cut_small")
def test_states_in_place_equal_the_reference(method: str) -> None:
    check(**rule(method))


@pytest.mark.parametrize("fault", ["_lists", "_taken"])
@pytest.mark.usefixtures("cut_small")
def test_a_fault_is_found(fault: str) -> None:
    right = getattr(device, fault)
    wrong = {"_lists": lambda *a: right(*a).flip(3), "_taken": lambda listed, *rest: right(listed - 1, *rest)}[fault]
    with patch.object(device_code, fault, wrong), pytest.raises(AssertionError):
        check(**RULE)


def test_no_more_tokens_score_than_choose() -> None:
    """What is launched depends on no length, and of tokens in a row each third scores pages."""
    noted = []
    for length in (1, 9):
        arguments = [x.to("meta") for x in (*tokens(torch.zeros(3, length).long(), SHAPE, torch.float32),)]
        positions = torch.empty(3, length, dtype=torch.long, device="meta")
        held = [x.float().to("meta") if x.is_floating_point() else x.to("meta") for x in empty(SLOTS, RULE)]
        with launching(notes := Notes(GPUS["nvidia-sm120"])):
            device.in_place(*arguments, positions, *held, **RULE)
        noted.append([(one.kernel, one.constants, one.warps, one.stages) for one in notes.launches])
        scoring = next(one for one in notes.launches if one.kernel.endswith("score_pages"))
        assert scoring.arguments["tokens"] == (length + 2) // 3
    assert noted[0] == noted[1]
