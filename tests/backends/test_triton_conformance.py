"""Every dialect op, run in pieces by the triton backend with interpreted kernels, equals the reference."""

from __future__ import annotations

import op_programs as ops
import pytest

from tests.backends.runs import SCENARIOS, compare
from tests.backends.triton_support import interpret

pytest.importorskip("triton", reason="Triton is not installed")

TOLERANCE = 1e-4

QUICK = ("norm centred with bias", "rotary interleaved", "gated delta", "llama, window", "llama, dense", "bank")
"""Cases that together go through every kernel; the others differ in their options."""

CASES = [
    case if case in QUICK else pytest.param(case, marks=pytest.mark.conformance)
    for case in ops.CASES
    if not case.startswith("sparse")
]


@pytest.mark.parametrize("case", CASES)
def test_op_in_place_equals_reference(case: str) -> None:
    program = ops.CASES[case]()
    runner = interpret(program)
    worst = {name: compare(program, runner, calls) for name, calls in SCENARIOS.items()}
    assert max(worst.values()) < TOLERANCE, worst
