"""``memc::events`` and what is taken by them as compiled: long calls, pieces, tokens one at a time, new sequences."""

from __future__ import annotations

from pathlib import Path

import op_programs as ops
import pytest
from tvm_support import build

from memc.backend import No
from memc.backends.tvm import support
from memc.dialect import OPS
from tests.backends.runs import compare
from tests.backends.test_onnx_events import CALLS, OPTIONS


@pytest.mark.parametrize("refine", ["modularity", pytest.param("conductance", marks=pytest.mark.conformance)])
def test_long_calls_equal_the_reference(refine: str, tmp_path: Path) -> None:
    options = {**OPTIONS, "longest": 6, "refine": refine}
    program = ops.eventful_attention(**options)
    runner = build(program, tmp_path, context=160)
    assert compare(program, runner, CALLS) < 1e-4
    for other in ({"contiguity": 0.0}, {"gamma": 3.0}, {"delay": 12}, {"refine": "none"}):
        differs = compare(ops.eventful_attention(**{**options, **other}), runner, CALLS)
        assert differs > 1e-3, f"{other} is another function"


def test_numbers_that_are_no_state_are_refused() -> None:
    program = ops.eventful_attention()
    (node,) = program.module.graph.find_nodes(op="call_function", target=OPS["sparse_attention"].overload)
    node.args = node.args[:-1]
    match support.form(node):
        case No(reason):
            assert "no state" in reason
        case _:
            pytest.fail("without numbers there is nothing that a slot could hold")
