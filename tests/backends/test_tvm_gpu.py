"""The functions for GPUs, run on this processor, equal the reference kernels: as written, and as mapped to threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import op_programs as ops
import pytest
import tvm_gpu_support as support
from tvm import tirx
from tvm_gpu_support import emulate

from memc.backends.tvm.gpu.kernels import window
from memc.program import Program, get_tensor
from tests.backends.runs import SCENARIOS, compare

TOLERANCE = 1e-4
WRITTEN = ("norm centred with bias", "rotary interleaved", "full, bias", "attention, every option", "bank")
MAPPED = ("window, every option", "gated delta", "llama, dense", "llama, window")
"""Cases that together go through every function, as it is written and as it is mapped to threads."""

SORTED = ("product keys", "side copy", "engram")
"""What TVM sorts starts threads itself, and runs on a GPU alone once it is mapped."""

ALL = [case for case in ops.CASES if not case.startswith("sparse")]


def worst(program: Program, runner: Any, *scenarios: str) -> dict[str, float]:
    return {name: compare(program, runner, SCENARIOS[name]) for name in scenarios or SCENARIOS}


@pytest.mark.parametrize(
    "case", [case if case in WRITTEN else pytest.param(case, marks=pytest.mark.conformance) for case in ALL]
)
def test_functions_as_written_equal_the_reference(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = ops.CASES[case]()
    found = worst(program, emulate(program, tmp_path, monkeypatch))
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize(
    "case",
    [
        case if case in MAPPED else pytest.param(case, marks=pytest.mark.conformance)
        for case in ALL
        if not case.endswith(SORTED)
    ],
)
def test_functions_mapped_to_threads_equal_the_reference(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = ops.CASES[case]()
    found = worst(program, emulate(program, tmp_path, monkeypatch, threads=True))
    assert max(found.values()) < TOLERANCE, found


# ---- what the checks find


def test_a_token_that_stays_in_the_window_too_long_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = window.held_position
    monkeypatch.setattr(window, "held_position", lambda r, slot, first: right(r, slot, first) + 1)
    window.window_scores.cache_clear()
    program = ops.window_memory()
    try:
        runner = emulate(program, tmp_path, monkeypatch)
    finally:
        window.window_scores.cache_clear()
    assert max(worst(program, runner, "pieces").values()) > 100 * TOLERANCE


def test_a_thread_that_is_left_out_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_out: list[str] = []

    def without_last(loop: tirx.For) -> tirx.For:
        if loop.kind != tirx.ForKind.THREAD_BINDING:
            return loop
        extent = loop.extent
        if loop.thread_binding.thread_tag == "threadIdx.x":
            left_out.append(str(extent))
            extent = extent - 1
        return tirx.For(loop.loop_var, loop.min, extent, tirx.ForKind.SERIAL, loop.body)

    monkeypatch.setattr(support, "serial", without_last)
    program = ops.norm()
    runner = emulate(program, tmp_path, monkeypatch, threads=True)
    assert left_out and not max(worst(program, runner, "prompt").values()) < 100 * TOLERANCE


# ---- weights and states


def halved(program: Program) -> Program:
    """The program with its matrices and tables rounded to half precision."""
    copy = program.copy()
    for node in list(copy.module.graph.find_nodes(op="get_attr")):
        tensor = get_tensor(copy.module, str(node.target)).detach()
        if tensor.ndim == 2:
            name = f"half_{str(node.target).replace('.', '_')}"
            copy.module.register_buffer(name, tensor.half().float())
            node.target = name
    copy.module.recompile()
    return copy


def test_weights_of_half_precision_are_read_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = ops.llama("attention", layers=1)
    runner = emulate(program, tmp_path, monkeypatch, weights="fp16", threads=True)
    assert max(worst(halved(program), runner, "pieces").values()) < TOLERANCE
    assert max(worst(program, runner, "pieces").values()) > 5 * TOLERANCE
    assert {str(parameter.dtype) for parameter in runner._parameters} == {"float16", "float32"}


def test_states_stay_where_they_are_until_they_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = emulate(ops.attention(), tmp_path, monkeypatch)
    positions, state = np.array([[0, 1, 2], [0, 1, -1]]), runner.new_state(2)
    tokens = np.maximum(positions, 0) + 3
    runner.run(tokens, positions, state)
    placed = state.placed()
    runner.run(tokens[:, :1], np.array([[3], [2]]), state)
    assert state.placed() is placed and state.bytes == sum(array.nbytes for array in state._arrays.values())
    copies = [state.copy(), runner.restore(state.arrays()), state.select([1, 0])]
    assert state.current["past_value0"][:, 0, :3].any(axis=-1).all()
    then = np.array([[4], [3]])
    wanted = runner.run(tokens[:, :1], then, state)
    for copy, order in zip(copies, ([0, 1], [0, 1], [1, 0]), strict=True):
        copy.lengths = np.array([4, 3])[order]
        found = runner.run(tokens[order, :1], then[order], copy)
        np.testing.assert_allclose(found, wanted[order], atol=1e-6)
