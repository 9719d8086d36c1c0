"""eval on an artifact in memory: texts, windows, tasks, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from memc import api
from memc.cli import main
from memc.report import models as m
from tests.core.runtime_fakes import byte_tokenizer, make_artifact, metaspace_tokenizer
from tests.core.tiny import tiny_program

pytestmark = pytest.mark.usefixtures("fake_backend")

Capture = pytest.CaptureFixture[str]


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


def test_measuring_past_the_training_is_warned_of(tmp_path: Path, text: str, out: str, capsys: Capture) -> None:
    trained = str(make_artifact(tmp_path / "trained", tokenizer=byte_tokenizer(), trained_positions=20))
    words = ["eval", trained, "--text", text, "--quiet"]
    assert main([*words, "--context", "20"]) == 0 and "beyond_trained" not in capsys.readouterr().out
    assert main([*words, "--contexts", "8,24"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "warning: beyond_trained: 24 tokens are past the 20 positions that the model was trained on" in told
    assert main(["eval", out, "--against", trained, "--text", text, "--context", "24", "--json"]) == 0
    document = m.EvalDocument.model_validate_json(capsys.readouterr().out)
    assert [warning.rpartition(" ")[2] for warning in document.warnings] == [f"({trained})"]


def test_eval_of_token_ids_needs_no_tokenizer(text: str, tmp_path: Path, capsys: Capture) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(Path(text).read_text()).ids
    np.save(tmp_path / "ids.npy", ids)
    bare, named = str(make_artifact(tmp_path / "bare")), str(make_artifact(tmp_path / "named", tokenizer=tokenizer))
    found = []
    for out, source in ((bare, str(tmp_path / "ids.npy")), (named, text)):
        assert main(["eval", out, "--text", source, "--context", "16", "--json", "-q"]) == 0
        found.append(m.EvalDocument.model_validate_json(capsys.readouterr().out).sides["a"].perplexity)
    assert found[0] == found[1] and found[0]
    assert main(["eval", bare, "--text", str(tmp_path / "ids.npy"), "--against", bare, "--context", "16", "-q"]) == 0
    np.save(tmp_path / "ids.npy", [0.5])
    assert main(["eval", bare, "--text", str(tmp_path / "ids.npy"), "-q"]) == 2
    assert "no token ids" in capsys.readouterr().err


def test_eval_refuses_different_tokenizers(out: str, text: str, tmp_path: Path, capsys: Capture) -> None:
    other = str(make_artifact(tmp_path / "other", tokenizer=metaspace_tokenizer()))
    assert main(["eval", out, "--text", text, "--against", other, "-q"]) == 2
    assert capsys.readouterr().err.startswith("E208 the two have different tokenizers")


def test_eval_refuses_a_window_of_one(out: str, text: str, capsys: Capture) -> None:
    assert main(["eval", out, "--text", text, "--context", "1"]) == 2
    assert "at least 2 tokens" in capsys.readouterr().err


def test_eval_of_several_windows_and_free_running(out: str, text: str, tmp_path: Path, capsys: Capture) -> None:
    other = str(make_artifact(tmp_path / "other", tokenizer=byte_tokenizer()))
    words = ["eval", out, "--text", text, "--contexts", "16,4,999", "--against", other, "--free-run", "9", "--json"]
    assert main(words) == 0
    document = m.EvalDocument.model_validate_json(capsys.readouterr().out)
    assert [row.context for row in document.by_context] == [4, 16, 999]
    for side in document.sides.values():
        assert [row.context for row in side.by_context] == [4, 16, 999]
        assert (side.perplexity, side.tokens) == (side.by_context[-1].perplexity, side.by_context[-1].tokens)
    assert document.window == 999
    assert "no window of 999 is full" in document.warnings[0]
    assert document.free_running is not None
    assert document.free_running.first_difference == [9] * document.free_running.prompts
    assert (document.free_running.equal_before, document.free_running.equal) == (1.0, 1.0)
    assert main(["eval", out, "--text", text, "--context", "4", "--json"]) == 0
    alone = m.EvalDocument.model_validate_json(capsys.readouterr().out)
    assert alone.sides["a"].by_context == document.sides["a"].by_context[:1]
    assert alone.free_running is None


def test_free_running_where_it_does_not_fit(tmp_path: Path, text: str, capsys: Capture) -> None:
    out = str(make_artifact(tmp_path / "small", tokenizer=byte_tokenizer(), capacity=40))
    words = ["eval", out, "--text", text, "--context", "16", "--against", out, "--json", "-q"]
    assert main(words) == 0
    document = m.EvalDocument.model_validate_json(capsys.readouterr().out)
    assert document.free_running is None
    assert "256 new tokens are past the capacity of 40" in document.warnings[0]
    assert main([*words, "--free-run", "40"]) == 2
    assert capsys.readouterr().err.startswith("E206")
    assert main([*words, "--free-run", "30"]) == 0
    document = m.EvalDocument.model_validate_json(capsys.readouterr().out)
    assert document.free_running is not None
    assert (document.free_running.prompt_tokens, document.free_running.new_tokens) == (10, 30)
    assert main([*words, "--free-run", "0"]) == 0
    assert m.EvalDocument.model_validate_json(capsys.readouterr().out).warnings == []


def test_eval_of_tasks(out: str, tmp_path: Path, capsys: Capture) -> None:
    words = ["eval", out, "--task", "mqar:pairs=2,gap=9,passkey", "--lengths", "300,400", "--samples", "2", "--json"]
    assert main(words) == 0
    alone = m.EvalDocument.model_validate_json(capsys.readouterr().out)
    cells = alone.sides["a"].cells
    assert list(alone.sides["a"].tasks) == ["mqar:pairs=2,gap=9", "passkey"]
    assert [(cell.task, cell.length, cell.depth) for cell in cells] == [
        *(("mqar:pairs=2,gap=9", length, None) for length in (300, 400)),
        *(("passkey", length, depth) for length in (300, 400) for depth in (0.0, 0.25, 0.5, 0.75, 1.0)),
    ]
    assert {(cell.samples, cell.questions, cell.chance) for cell in cells} == {(2, 4, 0.5), (2, 2, None)}
    assert (alone.samples, alone.seed, alone.window) == (2, 0, None)
    other = str(make_artifact(tmp_path / "other", tokenizer=byte_tokenizer()))
    assert main([*words, "--against", other, "-q"]) == 0
    both = m.EvalDocument.model_validate_json(capsys.readouterr().out)
    assert both.sides["a"] == alone.sides["a"]
    assert both.sides["b"].cells == alone.sides["a"].cells
    assert main([*words[:-1], "--against", other]) == 0
    shown = capsys.readouterr()
    assert "by chance, %: mqar:pairs=2,gap=9 50" in shown.out
    assert "passkey at 400 tokens ... " in shown.err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], "E200", "--text FILE, --task NAME"),
        (["--task", "pass_key"], "E202", "did you mean 'passkey'?"),
        (["--task", "mqar:pairs=0"], "E203", "at least 1"),
        (["--task", "passkey", "--lengths", "50"], "E200", "needs"),
        (["--task", "copy", "--lengths", "41"], "E206", "past the capacity of 40"),
        (["--task", "mqar", "--lengths", "a"], "E200", "a list of numbers"),
        (["--text", "TEXT", "--context", "4", "--contexts", "4,8"], "E200", "exclude each other"),
        (["--text", "TEXT", "--contexts", "1,8"], "E200", "at least 2 tokens"),
        (["--text", "TEXT", "--contexts", "8,64"], "E206", "past the capacity of 40"),
        (["--task", "copy", "--contexts", "8,16"], "E200", "--lengths"),
        (["--task", "copy", "--context", "8"], "E200", "none is given"),
    ],
)
def test_eval_refuses(tmp_path: Path, text: str, capsys: Capture, words: list[str], code: str, said: str) -> None:
    capacity = None if "50" in words else 40
    out = str(make_artifact(tmp_path / "small", tokenizer=byte_tokenizer(), capacity=capacity))
    assert main(["eval", out, *(text if word == "TEXT" else word for word in words), "-q"]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(code) and said in shown.err
    assert shown.out == ""


def test_a_window_that_nobody_asked_for_is_no_longer_than_the_capacity(
    tmp_path: Path, text: str, capsys: Capture
) -> None:
    small = str(make_artifact(tmp_path / "small", tokenizer=byte_tokenizer(), capacity=40))
    assert main(["eval", small, "--text", text, "--tokens", "90", "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["window"] == 40


def test_eval_refuses_tasks_that_an_artifact_cannot_do(tmp_path: Path, out: str, capsys: Capture) -> None:
    encoder = str(make_artifact(tmp_path / "encoder", tokenizer=byte_tokenizer(), decoder=False))
    assert main(["eval", encoder, "--task", "copy", "-q"]) == 2
    assert capsys.readouterr().err.startswith("E208")
    bare = str(make_artifact(tmp_path / "bare"))
    assert main(["eval", bare, "--task", "passkey", "-q"]) == 3
    assert capsys.readouterr().err.startswith("E308")
    assert main(["eval", bare, "--task", "copy", "--samples", "1", "--lengths", "70", "-q"]) == 0
    metaspace = str(make_artifact(tmp_path / "metaspace", tokenizer=metaspace_tokenizer()))
    assert main(["eval", out, "--task", "copy", "--against", metaspace, "-q"]) == 2
    assert capsys.readouterr().err.startswith("E208 the two have different tokenizers")
    larger = str(make_artifact(tmp_path / "larger", vocab_size=500))
    assert main(["eval", bare, "--task", "copy", "--against", larger, "-q"]) == 2
    assert capsys.readouterr().err.startswith("E208 the two have different vocabularies")


def test_eval_tells_a_missing_side_before_converting_the_other(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    words = ["eval", str(tmp_path / "model.gguf"), "--task", "copy", "--against", str(tmp_path / "missing")]
    assert main(words) == 3
    shown = capsys.readouterr().err
    assert shown.startswith("E309") and "converted" not in shown


def test_an_artifact_that_keeps_a_model_configuration_is_no_model(tmp_path: Path, capsys: Capture) -> None:
    out = make_artifact(tmp_path / "out", tokenizer=byte_tokenizer(), files={"config.json": {}})
    assert main(["eval", str(out), "--task", "copy", "--lengths", "70", "--samples", "1"]) == 0
    assert "is a model" not in capsys.readouterr().err


def test_eval_of_a_real_artifact_answers_the_same_through_both_backends(tmp_path: Path, capsys: Capture) -> None:
    words = ["--task", "mqar:pairs=3,joint_recall:contexts=2,keys=2,queries=3,copy:asked=4"]
    words += ["--lengths", "24", "--samples", "6", "--json", "-q"]
    sides = []
    for backend in ("eager", "onnx"):
        api.convert(tiny_program(), tmp_path / backend, passes=["window:window=8,sinks=2"], backend=backend)
        assert main(["eval", str(tmp_path / backend), *words]) == 0
        sides.append(m.EvalDocument.model_validate_json(capsys.readouterr().out).sides["a"])
    assert sides[0].cells == sides[1].cells
    assert [cell.questions for cell in sides[0].cells] == [18, 18, 24]
