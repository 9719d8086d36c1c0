"""generate, eval and bench on an artifact in memory; lower on a small real one."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from memc import api, plugins, runtime
from memc.artifact import read_manifest
from memc.cli import main
from memc.report import models as m
from memc.report.read import read_report
from tests.core.runtime_fakes import CORPUS, byte_tokenizer, make_artifact, metaspace_tokenizer
from tests.core.tiny import tiny_program


@pytest.fixture(autouse=True)
def fake_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("fake", "tests.core.runtime_fakes:FakeBackend", "memc.backends")
    known = plugins.registered

    def registered(group: str) -> dict[str, EntryPoint]:
        return {**known(group), **({"fake": point} if group == "memc.backends" else {})}

    monkeypatch.setattr(plugins, "registered", registered)


@pytest.fixture
def out(tmp_path: Path) -> str:
    return str(make_artifact(tmp_path / "out", tokenizer=byte_tokenizer()))


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(" ".join(CORPUS))
    return str(tmp_path / "text.txt")


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


def test_eval_alone_and_against(out: str, text: str, tmp_path: Path, capsys: Capture) -> None:
    assert main(["eval", out, "--text", text, "--context", "16", "--json"]) == 0
    alone = m.EvalDocument.model_validate_json(capsys.readouterr().out)
    assert alone.sides["a"].perplexity
    assert alone.ratio is None
    other = str(make_artifact(tmp_path / "other", tokenizer=byte_tokenizer()))
    assert main(["eval", out, "--text", text, "--context", "16", "--against", other, "--json", "-q"]) == 0
    both = m.EvalDocument.model_validate_json(capsys.readouterr().out)
    assert both.sides["a"] == alone.sides["a"]
    assert (both.ratio, both.top1_agreement) == (1.0, 1.0)
    assert main(["eval", out, "--text", text, "--context", "16", "--against", other]) == 0
    assert "perplexity ratio" in capsys.readouterr().out


def test_eval_refuses_different_tokenizers(out: str, text: str, tmp_path: Path, capsys: Capture) -> None:
    other = str(make_artifact(tmp_path / "other", tokenizer=metaspace_tokenizer()))
    assert main(["eval", out, "--text", text, "--against", other, "-q"]) == 2
    assert capsys.readouterr().err.startswith("E208 the two have different tokenizers")


def test_eval_refuses_a_window_of_one(out: str, text: str, capsys: Capture) -> None:
    assert main(["eval", out, "--text", text, "--context", "1"]) == 2
    assert "at least 2 tokens" in capsys.readouterr().err


def test_bench_takes_turns_and_leaves_out_what_does_not_fit(out: str, tmp_path: Path, capsys: Capture) -> None:
    small = str(make_artifact(tmp_path / "small", tokenizer=byte_tokenizer(), capacity=40))
    words = ["bench", out, "--against", small, "--contexts", "60,16", "--steps", "6", "--json"]
    assert main(words) == 0
    document = m.BenchDocument.model_validate_json(capsys.readouterr().out)
    assert [(row.context, row.side) for row in document.rows] == [(16, "a"), (16, "b"), (60, "a")]
    assert "past the capacity of b" in document.warnings[0]
    for row in document.rows:
        assert row.decode_ms_p90 >= row.decode_ms_median > 0
        assert min(row.prefill_tokens_per_s, row.decode_tokens_per_s, row.state_bytes, row.rss_bytes) > 0
    assert main(["bench", small, "--contexts", "512"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("E206")


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
