"""The conformance suite on a GPU: compiled ahead of time, loaded without Triton's compiler, stepped as CUDA graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memc.backend import LowerOptions
from memc.backends.triton import TritonBackend
from memc.backends.triton import backend as lowering
from memc.target import get_target
from tests.backends import op_programs as ops
from tests.backends.runs import SCENARIOS, compare, manifest_of

TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    # The suite before may have asked for the interpreter.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("compiled", [False, True], ids=["graphs", "torch.compile"])
@pytest.mark.parametrize("case", ops.CASES)
def test_op_on_the_gpu_equals_reference(
    case: str, compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(lowering.COMPILE, "1" if compiled else "0")
    program = ops.CASES[case]()
    target = get_target(lowering.here())
    lowered = TritonBackend().lower(program, target, tmp_path, LowerOptions(context=40))
    manifest = manifest_of(lowered, program, "fp32", "triton").model_copy(update={"target": target.name})
    runner = TritonBackend().load(tmp_path, manifest)
    for name, calls in SCENARIOS.items():
        assert compare(program, runner, calls) < TOLERANCE, name


def test_conversations_take_turns_on_one_graph(tmp_path: Path) -> None:
    program = ops.llama("window_memory", layers=1)
    target = get_target(lowering.here())
    lowered = TritonBackend().lower(program, target, tmp_path, LowerOptions(context=40))
    manifest = manifest_of(lowered, program, "fp32", "triton").model_copy(update={"target": target.name})
    runner = TritonBackend().load(tmp_path, manifest)
    token, first, second = torch.tensor([[3]]).numpy(), runner.new_state(1), runner.new_state(1)
    alone = runner.new_state(1)
    expected = [runner.run(token, torch.tensor([[p]]).numpy(), alone) for p in range(4)]
    for p in range(4):
        for state in (first, second):
            found = runner.run(token, torch.tensor([[p]]).numpy(), state)
            assert abs(found - expected[p]).max() < 1e-6
    kept = first.copy()
    after = runner.run(token, torch.tensor([[4]]).numpy(), first)
    assert abs(runner.run(token, torch.tensor([[4]]).numpy(), kept) - after).max() < 1e-6
