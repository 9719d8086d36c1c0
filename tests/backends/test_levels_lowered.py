"""Pages ranked in two levels, lowered: the choice is the reference's, among super-pages that are not all entered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_support
import op_programs as ops
import pytest
import torch
import tvm_support

from memc.backends.onnx import blocks
from memc.kernels.sparse_attention import levels
from tests.backends.runs import Calls, compare, span

OPTIONS: dict[str, Any] = {"method": "bounds2", "page": 1, "budget": 16, "sinks": 2, "window": 5, "beam": 1}
LONG: Calls = [
    ([span(0, 100), span(0, 20, right=80)], [99]),
    ([span(100, 7), span(20, 7)], None),
    *(([[107 + i], [27 + i]], None) for i in range(12)),
    ([span(0, 40), [-1] * 40], None),
    ([[40], [39]], None),
]
"""Seven super-pages of 16 tokens, one of them entered: a prompt, pieces, tokens; at last a new sequence in a row."""


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("blocks", {"rerank": 2, "dense_below": 30}),
        ("tokens", {}),
        pytest.param("tokens", {"refresh": 4, "rerank": 2, "dense_below": 30}, marks=pytest.mark.conformance),
    ],
)
def test_onnx_equals_the_reference(
    form: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "tokens":
        monkeypatch.setitem(blocks.REACH, "bounds2", 0)
    program = ops.sparse_attention(**OPTIONS, **options)
    runner = onnx_support.build(program, tmp_path, context=160)
    assert compare(program, runner, LONG) < 1e-4
    wide = ops.sparse_attention(**{**OPTIONS, **options, "beam": 99})
    assert compare(wide, runner, LONG) > 1e-3, "entering every super-page is another function"


@pytest.mark.parametrize(
    "form", ["tokens", *(pytest.param(x, marks=pytest.mark.conformance) for x in ("blocks", "tvm"))]
)
def test_the_lower_of_equal_super_pages_is_entered(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "tokens":
        monkeypatch.setitem(blocks.REACH, "bounds2", 0)
    program = ops.sparse_attention(**OPTIONS)
    with torch.no_grad():
        program.module.key_weight.zero_()  # type: ignore[union-attr, operator]
    runner = (tvm_support if form == "tvm" else onnx_support).build(program, tmp_path, context=160)
    assert compare(program, runner, LONG) < 1e-5
    right = levels.ranked
    monkeypatch.setattr(levels, "ranked", lambda x, *rest: right(x + 1e-5 * torch.arange(x.shape[-1]), *rest))
    assert compare(program, runner, LONG) > 1e-3, "the higher index of equals is another function"


@pytest.mark.parametrize(
    "options", [{"rerank": 2, "dense_below": 30}, pytest.param({"refresh": 4}, marks=pytest.mark.conformance)]
)
def test_tvm_equals_the_reference(options: dict[str, Any], tmp_path: Path) -> None:
    program = ops.sparse_attention(**OPTIONS, **options)
    runner = tvm_support.build(program, tmp_path, context=160)
    assert compare(program, runner, LONG) < 1e-4
    wide = ops.sparse_attention(**{**OPTIONS, **options, "beam": 99})
    assert compare(wide, runner, LONG) > 1e-3, "entering every super-page is another function"
