"""Which layers stay: blocks restored in the rewritten program, and their order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memc.analysis.layers import rank_blocks, restored
from memc.program import Program, get_tensor
from memc.progress import Silent
from tests.passes.test_linearize import shake
from tests.passes.tiny_program import tiny
from tests.train.tiny_training import TEACHERS, linearized, packed, transfer

TOKENS, POSITIONS = packed(2, seed=5)


def logits(before: Program, after: Program, objectives: Any, chosen: list[int]) -> torch.Tensor:
    module, states = restored(before, after, objectives, chosen)
    with torch.no_grad():
        found: torch.Tensor = module(TOKENS, POSITIONS, *(spec.empty(len(TOKENS)) for spec in states))
    return found


@pytest.mark.parametrize("teacher", TEACHERS, ids=str)
def test_restored_blocks_are_the_originals(teacher: dict[str, Any]) -> None:
    before = tiny(**teacher)
    after, report = linearized(before)
    shake(after)
    assert torch.equal(logits(before, after, report.objectives, [0, 1]), before.run(TOKENS, POSITIONS))
    assert torch.equal(logits(before, after, report.objectives, []), after.run(TOKENS, POSITIONS))
    for kept in range(2):
        alone, its = linearized(before, keep=f"[{kept}]")
        for name in its.objectives[0].parameters.values():
            with torch.no_grad():
                get_tensor(alone.module, name).copy_(get_tensor(after.module, name))
        assert torch.equal(logits(before, after, report.objectives, [kept]), alone.run(TOKENS, POSITIONS))


@pytest.mark.parametrize("bad", range(3))
def test_a_layer_whose_memory_is_broken_ranks_first(bad: int) -> None:
    before = tiny(layers=3)
    after, report = linearized(before, window=20)  # so that little is lost but where it is broken
    transfer(before, after, report, steps=5)
    with torch.no_grad():
        get_tensor(after.module, report.objectives[bad].parameters["mass_bias"]).add_(10.0)
        get_tensor(after.module, report.objectives[bad].parameters["key_map"]).mul_(-20.0)
    ranking = rank_blocks(before, after, report.objectives, TOKENS, POSITIONS, None, Silent())
    assert ranking.blocks[0] == bad and sorted(ranking.blocks) == [0, 1, 2]
    assert ranking.alone[bad] < ranking.nothing
    with torch.no_grad():
        expected, found = before.run(TOKENS, POSITIONS)[:, 20:], after.run(TOKENS, POSITIONS)[:, 20:]
    kl = torch.nn.functional.kl_div(found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none")
    assert ranking.nothing == pytest.approx(float(kl.sum(-1).mean()), rel=1e-4)
