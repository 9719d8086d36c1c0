"""``memc::events`` and what is taken by them in ONNX: long calls, in blocks and token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import op_programs as ops
import pytest
from onnx_support import build, compare, span

from memc.backends.onnx import blocks
from memc.dialect import OPS
from memc.errors import MemcError
from tests.backends.runs import Calls

OPTIONS: dict[str, Any] = {"page": 4, "budget": 24, "sinks": 2, "window": 9, "dense_below": 30, "delay": 10}
CALLS: Calls = [
    ([span(0, 100), span(0, 20, right=80)], [99]),
    ([span(100, 20), span(20, 20)], None),
    *(([[120 + i], [40 + i]], None) for i in range(8)),
    # A new sequence in a row that held another one, whose events are not its own, while the other row waits.
    ([span(0, 40), [-1] * 40], None),
    *(([[40 + i], [48 + i]], None) for i in range(3)),
]


@pytest.mark.parametrize(
    ("refine", "form"),
    [
        ("modularity", "blocks"),
        ("conductance", "tokens"),
        pytest.param("none", "blocks", marks=pytest.mark.conformance),
    ],
)
def test_long_calls_equal_the_reference(
    refine: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "tokens":
        monkeypatch.setitem(blocks.REACH, "em", 0)
    options = {**OPTIONS, "longest": 6, "refine": refine}
    program = ops.eventful_attention(**options)
    runner = build(program, tmp_path, context=160)
    assert compare(program, runner, CALLS) < 1e-4
    for other in ({"contiguity": 0.0}, {"gamma": 3.0}, {"delay": 12}):
        differs = compare(ops.eventful_attention(**{**options, **other}), runner, CALLS)
        assert differs > 1e-3, f"{other} is another function"


def test_numbers_that_are_no_state_are_refused(tmp_path: Path) -> None:
    program = ops.eventful_attention()
    numbers = program.placeholders()[2]
    (node,) = program.module.graph.find_nodes(op="call_function", target=OPS["sparse_attention"].overload)
    with program.module.graph.inserting_before(node):
        added = program.module.graph.call_function(ops.aten.add.Tensor, (numbers, 0))
    added.meta = dict(numbers.meta)
    node.args = tuple(added if argument is numbers else argument for argument in node.args)
    with pytest.raises(MemcError, match=r"E601.*no state"):
        build(program, tmp_path)
