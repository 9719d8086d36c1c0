"""Every dialect op, lowered to ONNX and run in pieces, equals the reference kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import op_programs as ops
import pytest
import torch
from onnx_support import SCENARIOS, build, compare, span

from memc.dialect.bank_ffn import ACTIVATIONS
from memc.program import Program

TOLERANCE = 1e-4

CASES: dict[str, Callable[[], Program]] = {
    "norm": ops.norm,
    "norm centred with bias": lambda: ops.norm(center=True, bias=True),
    "norm without weight": lambda: ops.norm(weight=False, bias=True),
    "rotary": lambda: ops.rotary(rotated=4),
    "rotary interleaved": lambda: ops.rotary(interleaved=True, scaling=1.3, rotated=6, head=10),
    "full": ops.full_attention,
    "full, no mask": lambda: ops.full_attention(positions=False),
    "full, bias": lambda: ops.full_attention(bias=True),
    "full, sink logits": lambda: ops.full_attention(sink_logits=True, softcap=2.0),
    "window": ops.window_memory,
    "window of 1": lambda: ops.window_memory(window=1, sinks=0, left=True),
    "window, every option": lambda: ops.window_memory(slopes=True, sink_logits=True, lse=True, left=True, softcap=2.0),
    "window, log-sum-exp": lambda: ops.window_memory(lse=True, groups=6),
    "attention": lambda: ops.attention(layers=2, window=4),
    "attention, every option": lambda: ops.attention(slopes=True, sink_logits=True, softcap=2.0),
    "attention, chunk": lambda: ops.attention(chunk=4),
    "sparse": lambda: ops.sparse_attention(layers=2),
    "sparse, moments, guarded": lambda: ops.sparse_attention(method="moments", dense_below=7, groups=6),
    "sparse, by channels": lambda: ops.sparse_attention(method="lowbit", channels=3, layers=2, dense_below=5),
    "sparse, by channels, again": lambda: ops.sparse_attention(
        method="lowbit", channels=2, rerank=2, groups=3, page=3, budget=9, window=4, sink_logits=True, lse=True
    ),
    "sparse, ranked again": lambda: ops.sparse_attention(rerank=2, groups=1, page=3, budget=6, sinks=0),
    "sparse, every option": lambda: ops.sparse_attention(
        rerank=3, dense_below=4, sink_logits=True, lse=True, softcap=2.0, layers=2, page=1, budget=4
    ),
    "bank": lambda: ops.bank_ffn(*ACTIVATIONS, units=3),
    "gated": ops.linear_memory,
    "gated, strong": lambda: ops.linear_memory(strength=50.0, per_channel=False, groups=6),
    "gated, shut": lambda: ops.linear_memory(strength=float("inf")),
    "gated delta": lambda: ops.linear_memory(update="gated_delta", strength=40.0),
    "gated delta per head": lambda: ops.linear_memory(update="gated_delta", per_channel=False),
    "llama, window": lambda: ops.llama(softcap=3.0),
    "llama, dense": lambda: ops.llama("attention"),
}

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
    program = CASES[case]()
    runner = build(program, folder, portable=portable)
    worst = {name: compare(program, runner, calls) for name, calls in SCENARIOS.items()}
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("case", CASES)
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
