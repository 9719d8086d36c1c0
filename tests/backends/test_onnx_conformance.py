"""Every dialect op, lowered to ONNX and run in pieces, equals the reference kernels."""

from __future__ import annotations

from pathlib import Path

import op_programs as ops
import pytest
import torch
from onnx_support import SCENARIOS, build, compare, span

from memc.program import Program

TOLERANCE = 1e-4

# Forms that differ when the runtime lacks the special kernels.
PORTABLE = (
    "norm",
    "norm centred with bias",
    "rotary",
    "rotary interleaved",
    "full",
    "window",
    "bank",
    "gated",
    "gated delta per head",
)


def check(case: str, folder: Path, *, portable: bool) -> None:
    program = ops.CASES[case]()
    runner = build(program, folder, portable=portable)
    worst = {name: compare(program, runner, calls) for name, calls in SCENARIOS.items()}
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("case", ops.CASES)
def test_lowered_op_equals_reference(case: str, tmp_path: Path) -> None:
    check(case, tmp_path, portable=False)


@pytest.mark.parametrize("case", PORTABLE)
def test_portable_form_equals_reference(case: str, tmp_path: Path) -> None:
    check(case, tmp_path, portable=True)


def test_prefix_in_one_call(tmp_path: Path) -> None:
    program = ops.attention(prefix=3)
    runner = build(program, tmp_path)
    calls = [([span(0, 5), span(0, 2, right=3)], None), ([span(5, 2), [-1, -1]], None)]
    assert compare(program, runner, calls) < TOLERANCE
    # A row that starts anew does not cut the prefix of another, which must come in one call.
    calls = [([[*span(0, 2), *span(0, 5)], [-1, *span(0, 6)]], None), ([span(5, 2), span(6, 2)], None)]
    assert compare(program, runner, calls) < TOLERANCE


def test_half_precision_program_runs_in_float32(tmp_path: Path) -> None:
    program = ops.llama(dtype=torch.bfloat16)
    runner = build(program, tmp_path)
    single = ops.llama(dtype=torch.bfloat16)
    single.module.float()
    single = Program(
        single.module,
        single.inputs,
        single.outputs,
        tuple(type(s)(s.name, torch.int64 if s.init else torch.float32, s.shape, s.init) for s in single.states),
        single.model,
    )
    assert compare(single, runner, SCENARIOS["pieces"]) < TOLERANCE


def test_the_comparison_sees_a_planted_fault(tmp_path: Path) -> None:
    runner = build(ops.window_memory(window=4), tmp_path / "narrow")
    assert (
        compare(ops.window_memory(window=5), build(ops.window_memory(), tmp_path / "same"), SCENARIOS["prompt"])
        < TOLERANCE
    )
    wide = ops.window_memory(window=5)
    with torch.no_grad():
        tokens = torch.arange(13)[None]
        want = wide.run(tokens)
    got = runner.run(tokens.numpy(), tokens.numpy(), runner.new_state(1))
    assert abs(want.numpy() - got).max() > 100 * TOLERANCE


def test_a_block_that_is_computed_is_cut_within_the_file(tmp_path: Path) -> None:
    b = ops.Builder()
    block = b.fetch("bank_0", "B", 3, 6, 24)
    halved = b.call(torch.ops.aten.mul.Scalar, block, 0.5)
    x = b.embed(24)
    made = [b.call(torch.ops.memc.bank_ffn.default, x, each, activation="silu") for each in (halved, block)]
    program = b.finish(b.linear(b.call(torch.ops.aten.add.Tensor, *made), "logits", ops.VOCAB, 24))
    runner = build(program, tmp_path)
    (port,) = (port for port in runner.manifest.inputs if port.role == "fetched")
    assert not port.parts
    assert compare(program, runner, next(iter(SCENARIOS.values()))) < TOLERANCE
