"""Quantised weights and a memory whose rows are chosen by scores: the table stays as it is, the choice may not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir

from memc import api
from memc.backend import LowerOptions
from memc.backends.onnx import OnnxBackend
from memc.conversion.again import lower_again
from memc.conversion.lowering import CHOSEN_ROWS, lower
from memc.pipeline import parse_spec
from memc.plugins import load_kernels
from memc.program import get_tensor
from memc.report.read import read_report
from memc.target import get_target
from tests.core.tiny import tiny_program

load_kernels()

PKM = "memory_bank:kind=pkm,slots=16,heads=2,top=3,row=32,layers=all"
ENGRAM = "memory_bank:kind=engram,slots=30,heads=2,row=4,layers=all"


def test_the_table_keeps_its_values(tmp_path: Path) -> None:
    pass_, target, name = parse_spec(PKM), get_target("cpu"), "memc.memory_bank.values"
    program, _ = pass_.apply(tiny_program(), pass_.plan(tiny_program(), target))
    lowered, _ = lower(program, OnnxBackend(), target, tmp_path, LowerOptions("int8", 64, 1))
    stored = onnx_ir.load(tmp_path / lowered.path).graph.initializers[name].const_value
    wanted = get_tensor(program.module, name).detach().numpy()
    assert stored is not None and np.array_equal(stored.numpy(), wanted)
    assert name in lowered.forms["weights"].partition("float32 matrices:")[2]


def test_the_report_says_that_other_rows_are_read_for_as_long_as_they_are(tmp_path: Path) -> None:
    first = api.convert(tiny_program(), tmp_path / "first", passes=[PKM], weights="bf16", backend="eager", threads=1)
    before, said = tmp_path / "first", [first.warnings]
    for weights in ("fp32", "bf16"):
        lower_again(before, tmp_path / weights, target="cpu", backend="eager", weights=weights)
        before = tmp_path / weights
        report = read_report(before).convert
        assert report is not None
        said.append(report.warnings)
    assert said == [first.warnings, [], first.warnings]
    assert [warning.split()[:3] for warning in first.warnings] == [[f"{CHOSEN_ROWS}:", "with", "bf16"]]


def test_rows_that_no_score_chooses_are_no_matter() -> None:
    for spec, weights, said in ((PKM, "fp32", 0), (PKM, "int8", 1), (ENGRAM, "int8", 0)):
        document = api.convert(tiny_program(), "out", passes=[spec], weights=weights, dry_run=True)
        assert len(document.warnings) == said
