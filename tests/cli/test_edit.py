"""``memc edit``: facts taught to an artifact, which is lowered again, and what cannot be taught."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree

import pytest

from memc import api, runtime
from memc.artifact import read_manifest
from memc.cli import main
from memc.conversion.edits import read_edits
from memc.report.read import read_report
from tests.core.runtime_fakes import CORPUS, byte_tokenizer
from tests.core.tiny import TinyConfig, tiny_program

Capture = pytest.CaptureFixture[str]

EDITS = [{"prompt": ["abc", "ab"], "target": "x"}, {"prompt": "The fox", "target": "yz"}]
SMALL = TinyConfig(vocab=byte_tokenizer().get_vocab_size(), layers=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edit") / "out"
    api.convert(tiny_program(SMALL), folder, passes=["memory_bank:kind=side"], backend="onnx")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "notes.txt"
    path.write_text(" ".join(CORPUS * 60))
    return str(path)


def lines(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_edits_are_followed_and_the_rest_stays(source: Path, notes: str, tmp_path: Path, capsys: Capture) -> None:
    edits, made = lines(tmp_path / "edits.jsonl", *EDITS), tmp_path / "made"
    words = [
        "edit",
        str(source),
        "--edits",
        edits,
        "--data",
        notes,
        "-o",
        str(made),
        "--steps",
        "120",
        "--rate",
        "0.02",
    ]
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "memc.edit/1" and document["backend"] == "onnx"
    assert [edit["followed"] for edit in document["edits"]] == [True, True]
    assert [edit["wordings"] for edit in document["edits"]] == [2, 1] and document["edits"][0]["prompt"] == "abc"
    assert document["unrelated"] < document["threshold"] < min(edit["difference"] for edit in document["edits"])
    before, after = runtime.load(source), runtime.load(made, verify=True)
    prompt = byte_tokenizer().encode("The fox").ids
    wanted = byte_tokenizer().encode("yz").ids
    for session, follows in ((before, False), (after, True)):
        assert (session.logits([*prompt, wanted[0]])[0, -2:].argmax(-1).tolist() == wanted) == follows
    unrelated = byte_tokenizer().encode(CORPUS[0]).ids
    assert document["kept"] > 0.9 and (before.logits(unrelated) == after.logits(unrelated)).all()
    assert any(command.startswith("memc edit") for command in document["next"])
    report = read_report(made)
    assert report.verify is not None
    assert {"edits_followed", "unrelated_kept", "lowered_logits"} <= {check.name for check in report.verify.checks}
    assert read_manifest(made).weights == read_manifest(source).weights
    assert main(words) == 2 and capsys.readouterr().err.startswith("E204 output folder holds")
    # An edited artifact is edited again.
    more = lines(tmp_path / "more.jsonl", EDITS[0])
    again = ["edit", str(made), "--edits", more, "--data", notes, "--steps", "1", "--keep", "0.5", "--json"]
    assert main(again) == 0
    document = json.loads(capsys.readouterr().out)
    least = min(edit["difference"] for edit in document["edits"])
    assert document["kept"] > 0.4 and document["threshold"] < (document["unrelated"] * least) ** 0.5


def test_what_is_not_followed_is_said(source: Path, notes: str, tmp_path: Path, capsys: Capture) -> None:
    edits = lines(tmp_path / "edits.jsonl", *EDITS)
    assert (
        main(["edit", str(source), "--edits", edits, "--data", notes, "-o", str(tmp_path / "made"), "--steps", "1"])
        == 0
    )
    shown = capsys.readouterr().out
    assert "warning: 2 of 2 edits are not followed" in shown and "abc (of 2 wordings)" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_edits_are_the_lines_of_a_file_as_data_are(tmp_path: Path) -> None:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    written = [{"prompt": f"a{mark}b", "target": " c"} for mark in "\u2028\u0085\x0b\U0001f98a"]
    text = "\r\n".join(json.dumps(each, ensure_ascii=False) for each in written)
    (tmp_path / "edits.jsonl").write_bytes(f"\ufeff{text}\n".encode())
    assert [each.prompt for each in read_edits(tmp_path / "edits.jsonl", tmp_path, 400)] == [
        each["prompt"] for each in written
    ]


BAD = {
    "missing file": (None, "E207"),
    "no edit": ("\n\n", "E207"),
    "no JSON": ("prompt: a\n", "E207"),
    "no target": ('{"prompt": "a"}\n', "E207"),
    "a number": ('{"prompt": "a", "target": 3}\n', "E207"),
    "a number among wordings": ('{"prompt": ["a", 3], "target": "b"}\n', "E207"),
    "no wording": ('{"prompt": [], "target": "b"}\n', "E205"),
    "an empty wording": ('{"prompt": ["a", ""], "target": "b"}\n', "E205"),
    "an empty target": ('{"prompt": "a", "target": ""}\n', "E205"),
    "an empty prompt": ('{"prompt": "", "target": "b"}\n', "E205"),
}


@pytest.mark.parametrize("case", BAD)
def test_edits_that_cannot_be_used_leave_nothing(
    case: str, source: Path, notes: str, tmp_path: Path, capsys: Capture
) -> None:
    written, code = BAD[case]
    path, made = tmp_path / "edits.jsonl", tmp_path / "made"
    if written is not None:
        path.write_text(written)
    assert main(["edit", str(source), "--edits", str(path), "--data", notes, "-o", str(made)]) == 2
    assert capsys.readouterr().err.startswith(code) and not list(tmp_path.glob("made*"))


def test_what_has_no_side_copy_or_too_little_text_is_refused(
    source: Path, notes: str, tmp_path: Path, capsys: Capture
) -> None:
    edits, made = lines(tmp_path / "edits.jsonl", *EDITS), tmp_path / "made"
    (tmp_path / "short.txt").write_text("too short")
    words = ["edit", str(source), "--edits", edits, "-o", str(made), "--data"]
    assert main([*words, str(tmp_path / "short.txt")]) == 2
    assert "E207 unrelated text of less than 48 tokens" in capsys.readouterr().err
    plain = tmp_path / "plain"
    api.convert(tiny_program(SMALL), plain, passes=[], backend="eager")
    byte_tokenizer().save(str(plain / "tokenizer.json"))
    assert main(["edit", str(plain), "--edits", edits, "--data", notes, "-o", str(made)]) == 2
    assert "E208 the model has no side copy to edit" in capsys.readouterr().err
    bare = copytree(source, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    assert main(["edit", str(bare), "--edits", edits, "--data", notes, "-o", str(made)]) == 3
    assert "E308" in capsys.readouterr().err and not made.exists()
