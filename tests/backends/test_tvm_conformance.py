"""Every dialect op that the tvm backend supports, compiled and run in pieces, equals the reference kernels."""

from __future__ import annotations

from pathlib import Path

import op_programs as ops
import pytest
import torch
from tvm_support import build

from memc.backends.tvm.isa import runs_here
from memc.program import Program, get_tensor
from memc.quantise import quantise
from memc.target import get_target
from tests.backends.runs import SCENARIOS, compare, span

TOLERANCE = 1e-4

QUICK = (
    "norm centred with bias",
    "rotary interleaved",
    "full, bias",
    "gated delta",
    "llama, window",
    "llama, dense",
    "sparse, ranked again",
    "sparse, by channels, again",
    "sparse, by a tree, refreshed",
    "sparse, few bits, every option",
    "sparse, compact, every option",
    "bank",
)
"""Cases that together go through every function; the others differ in their options."""

CASES = [case if case in QUICK else pytest.param(case, marks=pytest.mark.conformance) for case in ops.CASES]


@pytest.mark.parametrize("case", CASES)
def test_compiled_op_equals_reference(case: str, tmp_path: Path) -> None:
    program = ops.CASES[case]()
    runner = build(program, tmp_path)
    worst = {name: compare(program, runner, calls) for name, calls in SCENARIOS.items()}
    assert max(worst.values()) < TOLERANCE, worst


def dequantised(program: Program, bits: int) -> Program:
    """The program with what the codes of its matrices stand for; the last one has 8 bits, tables stay as they are."""
    copy = program.copy()
    products = copy.module.graph.find_nodes(op="call_function", target=ops.aten.linear.default)
    for index, node in enumerate(products):
        weight = get_tensor(copy.module, node.args[1].target).detach()
        values = quantise(weight.numpy(), 8 if node is products[-1] else bits).values(weight.shape[1])
        copy.module.register_buffer(f"values{index}", torch.from_numpy(values.copy()))
        with copy.module.graph.inserting_before(node):
            read = copy.module.graph.get_attr(f"values{index}")
        node.args = (node.args[0], read, *node.args[2:])
    copy.module.recompile()
    return copy


@pytest.mark.conformance
@pytest.mark.parametrize("target", ["x86-64-v2", "x86-64-v3", "x86-64-v4"])
@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_older_and_newer_processors_compute_the_same(target: str, weights: str, tmp_path: Path) -> None:
    if not runs_here(get_target(target)):
        pytest.skip(f"this processor does not run {target}")
    program = ops.llama("attention", layers=1)
    runner = build(program, tmp_path, weights=weights, target=target)
    reference = program if weights == "fp32" else dequantised(program, 4)
    assert compare(reference, runner, SCENARIOS["pieces"]) < TOLERANCE


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantised_weights_are_what_their_codes_stand_for(weights: str, tmp_path: Path) -> None:
    program = ops.rotary()
    runner = build(program, tmp_path, weights=weights)
    reference = dequantised(program, int(weights[3:]))
    for scenario in ("pieces", "restart inside"):  # few rows, whose values are made as they are read, and many
        assert compare(reference, runner, SCENARIOS[scenario]) < TOLERANCE
    assert compare(program, runner, SCENARIOS["pieces"]) > 5 * TOLERANCE


@pytest.mark.conformance
def test_prefix_in_one_call(tmp_path: Path) -> None:
    program = ops.attention(prefix=3)
    runner = build(program, tmp_path)
    calls = [([span(0, 5), span(0, 2, right=3)], None), ([span(5, 2), [-1, -1]], None)]
    assert compare(program, runner, calls) < TOLERANCE
    calls = [([[*span(0, 2), *span(0, 5)], [-1, *span(0, 6)]], None), ([span(5, 2), span(6, 2)], None)]
    assert compare(program, runner, calls) < TOLERANCE


@pytest.mark.conformance
def test_half_precision_program_runs_in_float32(tmp_path: Path) -> None:
    program = ops.llama(dtype=torch.bfloat16)
    for weight in program.module.parameters():  # as they lie in a file: not where TVM and NumPy could take them
        weight.data = torch.cat([weight.data.flatten()[:1], weight.data.flatten()])[1:].view(weight.shape)
    runner = build(program, tmp_path)
    single = ops.llama(dtype=torch.bfloat16)
    single.module.float()
    states = tuple(
        type(s)(s.name, torch.int64 if s.init else torch.float32, s.shape, s.init, s.grows) for s in single.states
    )
    single = Program(single.module, single.inputs, single.outputs, states, single.model)
    assert compare(single, runner, SCENARIOS["pieces"]) < TOLERANCE
