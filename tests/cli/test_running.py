"""generate on an artifact in memory; lower on a small real one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from memc import api, runtime
from memc.artifact import read_manifest
from memc.cli import main
from memc.report import models as m
from memc.report.read import read_report
from tests.core.converting import make_llama
from tests.core.runtime_fakes import byte_tokenizer, make_artifact
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


def test_generating_past_the_training_is_warned_of_in_one_line(tmp_path: Path, capsys: Capture) -> None:
    out = str(make_artifact(tmp_path / "out", tokenizer=byte_tokenizer(), trained_positions=20))
    words = ["generate", out, "--prompt", "the quick", "--quiet", "--max-new-tokens"]
    assert main([*words, "4"]) == 0 and capsys.readouterr().err == ""
    assert main([*words, "40"]) == 0
    told = capsys.readouterr().err
    assert told.startswith("warning: beyond_trained: ") and "past the 20 positions" in told and told.count("\n") == 1


def test_lowering_for_a_context_past_the_training_is_warned_of(tmp_path: Path, capsys: Capture) -> None:
    program = replace(tiny_program(), model=replace(tiny_program().model, max_positions=64))
    api.convert(program, tmp_path / "out", recipe="dense", backend="eager")
    capsys.readouterr()
    words = ["lower", str(tmp_path / "out"), "--target", "cpu", "--backend", "eager", "--force"]
    for context, told in (("64", 0), ("65", 1)):
        assert main([*words, "-o", str(tmp_path / "second"), "--context", context]) == 0
        assert capsys.readouterr().err.count("beyond_trained: context 65 is past the 64 positions") == told


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


def test_lower_changes_what_is_given_alone(tmp_path: Path, capsys: Capture) -> None:
    first = tmp_path / "first"
    api.convert(tiny_program(), first, passes=["window:window=8,sinks=2"], backend="onnx", weights="int8")
    assert main(["lower", str(first), "--weights", "fp32", "-q"]) == 0
    assert main(["lower", str(first), "--target", "x86-64-v3", "--backend", "eager", "-q"]) == 0
    made = [read_manifest(tmp_path / name) for name in ("first-fp32", "first-x86-64-v3-eager")]
    facts = [(one.target, one.backend, one.weights) for one in made]
    assert facts == [("cpu", "onnx", "fp32"), ("x86-64-v3", "eager", "fp32")]
    capsys.readouterr()
    assert main(["lower", str(first)]) == 2
    assert capsys.readouterr().err.startswith("E200 nothing is to be different")


@pytest.mark.parametrize(
    "words",
    [["generate", "{out}", "--prompt", "the"], ["eval", "{out}", "--text", "{text}"], ["serve", "{out}"]],
)
def test_a_changed_file_is_named(out: str, text: str, capsys: Capture, words: list[str]) -> None:
    (Path(out) / "lowered/fake/model.bin").write_bytes(b"altered")
    assert main([word.format(out=out, text=text) for word in words]) == 4
    shown = capsys.readouterr().err
    assert shown.startswith("E402 digest of lowered/fake/model.bin does not match the manifest")


@pytest.mark.parametrize("command", ["lower", "export"])
def test_what_reads_the_program_looks_at_its_digest(tmp_path: Path, capsys: Capture, command: str) -> None:
    model, out = make_llama(tmp_path / "model"), tmp_path / "out"
    api.convert(model, out, recipe="dense", backend="eager")
    weights = out / "program" / "params.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    words = ["--target", "cpu"] if command == "lower" else []
    assert main([command, str(out), "-o", str(tmp_path / "other"), *words]) == 4
    assert "E402 digest of program/params.safetensors does not match" in capsys.readouterr().err
