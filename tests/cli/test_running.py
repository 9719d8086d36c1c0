"""generate on an artifact in memory; lower on a small real one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memc import api, runtime
from memc.artifact import read_manifest
from memc.cli import main
from memc.report import models as m
from memc.report.read import read_report
from tests.core.tiny import tiny_program

pytestmark = pytest.mark.usefixtures("fake_backend")

Capture = pytest.CaptureFixture[str]


def test_generate_streams_to_stdout_and_figures_to_stderr(out: str, capsys: Capture) -> None:
    words = ["generate", out, "--prompt", "the quick", "--max-new-tokens", "5", "--seed", "3", "--temperature", "0.8"]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert main([*words, "--json"]) == 0
    document = m.GenerateDocument.model_validate_json(capsys.readouterr().out)
    assert shown.out == document.text + "\n"
    assert "tokens/s; state" in shown.err
    assert shown.err.rstrip().endswith("seed 3")
    assert (document.new_tokens, document.seed, document.stopped) == (5, 3, "length")


@pytest.mark.parametrize("words", [["--top-p", "1.5"], ["--temperature", "-1"], ["--max-new-tokens", "0"]])
def test_generate_refuses_options_out_of_range(out: str, capsys: Capture, words: list[str]) -> None:
    assert main(["generate", out, "--prompt", "a", *words]) == 2
    assert capsys.readouterr().err.startswith("E200")


def test_lower_makes_a_second_artifact(tmp_path: Path, capsys: Capture) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    api.convert(tiny_program(), first, passes=["window:window=8,sinks=2"], backend="eager")
    words = ["lower", str(first), "--target", "cpu", "-o", str(second)]
    assert main([*words, "--backend", "onnx", "--weights", "fp16"]) == 6
    assert capsys.readouterr().err.startswith("E601")
    assert not second.exists()
    assert main([*words, "--backend", "onnx", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "memc.lower/1"
    assert [check["passed"] for check in document["checks"]] == [True]
    assert read_manifest(second, verify=True).backend == "onnx"
    ids = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    assert runtime.load(second).logits(ids) == pytest.approx(runtime.load(first).logits(ids), abs=1e-4)
    report = read_report(second)
    assert report.convert is not None
    assert (report.convert.backend, report.convert.out) == ("onnx", str(second))
    assert main([*words, "--backend", "eager"]) == 2
    assert capsys.readouterr().err.startswith("E204")
    assert main([*words, "--backend", "eager", "--force", "-q"]) == 0
    assert read_manifest(second).backend == "eager"
    assert main(["lower", str(first), "--target", "cpu", "-o", str(first), "--force"]) == 2
