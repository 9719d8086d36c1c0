"""Single tokens in ONNX: of attention, which reads a whole buffer or a copy of what is in use, and of windows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import op_programs as ops
import pytest
from onnx_support import Calls, build, compare, span
from test_onnx_conformance import TOLERANCE

from memc.backends.onnx import attend

# Rows of other lengths, one that waits, one that starts anew over what it held, and calls of several tokens between.
CALLS: Calls = [
    ([span(0, 4), span(0, 2, left=2), [-1] * 4], None),
    ([[4], [2], [0]], None),
    ([[5], [-1], [1]], None),
    ([span(6, 5), span(3, 5), span(2, 3, right=2)], None),
    ([[11], [8], [5]], None),
    ([[0], [9], [6]], None),
    ([[1], [10], [-1]], None),
]
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"layers": 2},
    "every option": {"slopes": True, "sink_logits": True, "softcap": 2.0, "window": 5},
    "chunk": {"chunk": 4, "groups": 1},
    "prefix": {"prefix": 3, "groups": 6},
}


@pytest.mark.parametrize("portable", [False, True], ids=["kernels", "portable"])
@pytest.mark.parametrize("context", [12, 60], ids=["whole", "used"])
@pytest.mark.parametrize("form", FORMS)
def test_single_tokens_equal_the_reference(form: str, context: int, portable: bool, tmp_path: Path) -> None:
    program = ops.attention(**FORMS[form])
    assert compare(program, build(program, tmp_path, context=context, portable=portable), CALLS) < TOLERANCE


WINDOWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "log-sum-exp": {"lse": True, "left": True},
    "one group": {"lse": True, "groups": 1, "sinks": 0, "window": 1},
    "no heads that share": {"lse": True, "groups": 6},
}


@pytest.mark.parametrize("portable", [False, True], ids=["kernels", "portable"])
@pytest.mark.parametrize("form", WINDOWS)
def test_single_tokens_of_a_window_equal_the_reference(form: str, portable: bool, tmp_path: Path) -> None:
    program = ops.window_memory(**WINDOWS[form])
    assert compare(program, build(program, tmp_path, portable=portable), CALLS) < TOLERANCE


def test_a_row_that_reads_what_another_sequence_left_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, right = attend.attention_plan, "mask0 = LessOrEqual(slots, p)"

    def faulty(*a: Any) -> Any:
        plan = write(*a)
        assert right in plan.text
        wrong = "p_less = Sub(p, p)\nlast = Add(p_less, highest)\nmask0 = LessOrEqual(slots, last)"
        return replace(plan, text=plan.text.replace(right, wrong))

    program = ops.attention()
    calls: Calls = [([[place], [place]], None) for place in range(8)] + [([[8], [0]], None)]
    assert compare(program, build(program, tmp_path / "a", context=12), calls) < TOLERANCE
    monkeypatch.setattr(attend, "attention_plan", faulty)
    faulty_one = build(program, tmp_path / "b", context=12)
    assert compare(program, faulty_one, calls[:-1]) < TOLERANCE
    assert compare(program, faulty_one, calls) > 1e-3
