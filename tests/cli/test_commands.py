"""The commands: help, examples, JSON, and what reaches the Python entry points."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from memc.cli import main
from memc.cli.app import COMMANDS, EXAMPLES, memc
from memc.cli.options import Command, Numbers
from memc.report import facts as f
from memc.report import models as m
from tests.cli import documents as d

Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Replace ``memc.api`` by one that notes its calls and answers with imagined documents."""
    calls: Calls = []

    def answer(document: Callable[[dict[str, Any]], f.Document]) -> Callable[..., f.Document]:
        def call(*args: Any, **kwargs: Any) -> f.Document:
            calls.append((args, kwargs))
            return document(kwargs)

        return call

    module = types.ModuleType("memc.api")
    module.inspect = answer(lambda options: d.inspected())  # type: ignore[attr-defined]
    module.analyse = answer(lambda options: d.analysed("heads"))  # type: ignore[attr-defined]
    module.convert = answer(lambda options: d.converted(dry_run=options["dry_run"]))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "memc.api", module)
    monkeypatch.setattr("memc.api", module, raising=False)
    monkeypatch.setattr("memc.doctor.backend_reason", lambda name: "" if name in ("onnx", "eager") else f"no {name}")
    return calls


def command(name: str) -> Command:
    found = memc.get_command(click.Context(memc), name)
    assert isinstance(found, Command)
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_three_examples_that_parse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    examples = command(name).examples
    assert len(examples) == 3
    assert shown.rstrip().endswith(examples[-1])
    assert max(map(len, shown.splitlines())) <= 90
    for example in examples:
        words = shlex.split(example.partition(" > ")[0])
        assert words[:2] == ["memc", name]
        command(name).make_context(name, words[2:])


def test_top_level_examples_parse() -> None:
    examples = [line.strip() for line in EXAMPLES.splitlines() if line.startswith("  memc")]
    assert len(examples) == 3
    for example in examples:
        _, name, *rest = shlex.split(example)
        command(name).make_context(name, rest)


@pytest.mark.parametrize("name", ["passes", "recipes", "targets", "doctor"])
def test_examples_without_a_model_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for example in command(name).examples:
        words = shlex.split(example.partition(" > ")[0])[1:]
        if {"--coverage", "calibrate"} & set(words):  # reads a table that the families' tests write; takes minutes
            continue
        assert main(words) == 0, capsys.readouterr().err
        assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_the_common_options(name: str) -> None:
    found = command(name)
    for each in found.commands.values() if isinstance(found, click.Group) else [found]:
        options = {option for parameter in each.params for option in parameter.opts}
        assert {"--json", "--no-color", "--quiet", "-q"} <= options


def every_command() -> list[tuple[str, click.Command]]:
    found = []
    for name in COMMANDS:
        each = memc.get_command(click.Context(memc), name)
        members = each.commands.items() if isinstance(each, click.Group) else [("", each)]
        found += [(f"{name} {member}".strip(), one) for member, one in members]
    return found


def test_no_whole_number_is_too_large_for_any_option() -> None:
    checked = 0
    for name, each in every_command():
        assert each is not None
        for parameter in each.params:
            if not isinstance(parameter.type, click.types.IntParamType | Numbers):
                continue
            for value in (str(2**63), "9" * 30):
                with pytest.raises(click.UsageError, match=r"range|at most"):
                    parameter.type.convert(value, parameter, click.Context(each, info_name=name))
                checked += 1
    assert checked > 50


def test_numbers_are_read_as_they_are_meant() -> None:
    assert Numbers().convert("4096, 512,512", None, None) == [512, 4096]
    assert Numbers(0, ordered=True).convert("64,16,0", None, None) == [64, 16, 0]
    for wrong in ("0", "512,x", "", "-1", "1.5", "9" * 5000):
        with pytest.raises(click.UsageError):
            Numbers().convert(wrong, None, None)


def test_help_of_a_command_of_a_bank_ends_with_examples_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    group = command("bank")
    assert isinstance(group, click.Group)
    for name, each in group.commands.items():
        assert main(["bank", name, "--help"]) == 0
        shown = capsys.readouterr().out
        assert isinstance(each, Command) and len(each.examples) == 3
        assert shown.rstrip().endswith(each.examples[-1])
        assert max(map(len, shown.splitlines())) <= 90
        for example in each.examples:
            words = shlex.split(example)
            assert words[:3] == ["memc", "bank", name]
            each.make_context(name, words[3:])


def test_help_imports_no_torch_and_is_quick() -> None:
    code = (
        "import sys, time; began = time.perf_counter(); from memc.cli import main; code = main(['--help'])\n"
        "print(time.perf_counter() - began, file=sys.stderr)\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'numpy', 'pydantic', 'rich'} & set(sys.modules)\n"
        "sys.exit(code or bool(heavy))"
    )
    results = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(3)]
    assert all(result.returncode == 0 for result in results), results[0].stderr
    assert min(float(result.stderr) for result in results) < 0.3
    assert all(name in results[0].stdout for name in COMMANDS)


@pytest.mark.parametrize(
    "words", [["recipes"], ["report", "nowhere"], ["eval", "x", "--task", "copy"], ["generate", "x", "--prompt", " "]]
)
def test_commands_that_need_no_torch_import_none(words: list[str]) -> None:
    code = f"import sys; from memc.cli import main; main({words}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_analyse(api: Calls, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, page = tmp_path / "heads.json", tmp_path / "heads.html"
    words = ["analyse", "m.gguf", "--method", "heads:prompts=8", "--data", "a.txt", "-o", str(out), "--html", str(page)]
    assert main([*words, "-q"]) == 0
    assert "strongest heads" in capsys.readouterr().out
    (arguments, options) = api[-1]
    assert arguments == ("m.gguf", "heads:prompts=8") and options["data"] == ("a.txt",)
    assert m.AnalysisDocument.model_validate_json(out.read_text()) == d.analysed("heads")
    assert "<figure" in page.read_text()
    assert main(["analyse", "m.gguf", "--method", "heads", "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == "memc.analysis/1"
    assert main(["analyse", "m.gguf", "--method", "heads", "-o", str(tmp_path / "none" / "x.json"), "-q"]) == 2
    assert "E200" in capsys.readouterr().err


def test_inspect(api: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "some/model", "--layer", "7", "--why", "-q"]) == 0
    shown = capsys.readouterr()
    assert "modeling_mine.py:88" in shown.out
    assert shown.err == ""
    assert api == [(("some/model",), {"remote_code": False})]
    assert main(["inspect", "some/model", "--layer", "99", "-q"]) == 2
    assert "E200 there is no layer 99 [--layer] Next: give one of " in capsys.readouterr().err


def test_progress_and_notes_go_to_stderr(api: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "some/model", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["schema"] == "memc.inspect/1"
    assert shown.err.startswith("inspecting some/model ... ")
    assert shown.err.endswith(" s\n")


def test_convert_passes_everything_on(api: Calls, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = "convert m.gguf -o OUT --pass window:window=32 --weights int8 --context 64 --seed 3 --threads 2 --dry-run"
    words = [str(tmp_path / "out") if word == "OUT" else word for word in text.split()]
    assert main([*words, "--data", "a.txt", "--data", "b.txt", "--tokens", "9"]) == 0
    assert "dry run: nothing was written" in capsys.readouterr().out
    ((args, options),) = api
    assert args == ("m.gguf", str(tmp_path / "out"))
    assert options["recipe"].specs() == ["window:window=32"]
    expected = {"target": "cpu", "weights": "int8", "context": 64, "seed": 3, "threads": 2, "tokens": 9}
    assert {key: options[key] for key in expected} == expected
    assert options["data"] == ["a.txt", "b.txt"]


def test_convert_takes_long_context_by_default(api: Calls) -> None:
    assert main(["convert", "m", "-o", "out", "-q"]) == 0
    assert api[0][1]["recipe"].specs() == ["linearize:window=256,sinks=4"]


def test_passes_come_after_those_of_the_recipe(api: Calls) -> None:
    assert main(["convert", "m", "-o", "out", "-q", "--recipe", "streaming", "--pass", "window:window=8"]) == 0
    assert api[0][1]["recipe"].specs() == ["window:window=256,sinks=4", "window:window=8"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--recipe", "streamin"], "E202", "did you mean 'streaming'?"),
        (["--pass", "windw"], "E202", "did you mean 'window'?"),
        (["--pass", "window:windw=3"], "E203", "did you mean 'window'?"),
        (["--pass", "window:window=0"], "E203", "at least 1"),
        (["--target", "cqu"], "E202", "did you mean 'cpu'?"),
        (["--backend", "onx"], "E202", "did you mean 'onnx'?"),
        (["--weights", "int3"], "E200", "'int3' is not one of"),
        (["--context", "-1"], "E200", "x>=1"),
        (["--tokens", "5"], "E200", "--data"),
        (["--speed"], "E200", "no such option"),
    ],
)
def test_convert_refuses_before_it_reads_the_model(
    api: Calls, capsys: pytest.CaptureFixture[str], words: list[str], code: str, said: str
) -> None:
    assert main(["convert", "m", "-o", "out", *words]) == 2
    line = capsys.readouterr().err
    assert line.startswith(code)
    assert said in line
    assert line.count("\n") == 1
    assert api == []


def test_a_target_without_backend_is_refused_with_the_reason(api: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "m", "-o", "out", "--target", "nvidia-sm90"]) == 6
    assert "no triton (target 'nvidia-sm90' needs it)" in capsys.readouterr().err


def test_recipe_errors_name_file_and_line(api: Calls, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("recipe: 1\npasses:\n  - window: {windw: 8}\n")
    assert main(["convert", "m", "-o", "out", "--recipe", str(recipe)]) == 2
    assert f"{recipe}:3" in capsys.readouterr().err


def test_report_reads_an_artifact(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = d.write_artifact(tmp_path / "out")
    assert main(["report", str(out)]) == 0
    assert "verified" in capsys.readouterr().out
    assert main(["report", str(out), "--json"]) == 0
    document = m.ReportDocument.model_validate_json(capsys.readouterr().out)
    assert document.finished
    assert document.passes == [d.pass_file_of()]
    assert main(["report", str(out), "--pass", "linearize", "--layer", "7", "--why"]) == 0
    assert "half_life" in capsys.readouterr().out
    assert main(["report", str(out), "--pass", "linearize", "--layer", "99"]) == 2
    assert "E200 there is no layer 99" in capsys.readouterr().err
    assert main(["report", str(out), "--pass", "linearise"]) == 2
    assert "did you mean 'linearize'?" in capsys.readouterr().err


def test_report_reads_a_conversion_that_failed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    d.write_artifact(tmp_path / "out.partial", finished=False)
    assert main(["report", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "how far it came" in " ".join(shown.split())
    assert "E401 verification failed" in shown


def test_report_diff(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    a, b = (d.write_artifact(tmp_path / name) for name in ("a", "b"))
    assert main(["report", "diff", str(a), str(b)]) == 0
    assert "report the same" in capsys.readouterr().out
    path = b / "report" / "02-linearize.json"
    path.write_text(path.read_text().replace("window=256", "window=64"))
    assert main(["report", "diff", str(a), str(b), "--json"]) == 0
    (difference,) = m.DiffDocument.model_validate_json(capsys.readouterr().out).differences
    assert (difference.a, difference.b) == ("linearize:window=256", "linearize:window=64")


def test_html_page_is_escaped_and_needs_no_network(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = d.write_artifact(tmp_path / "out")
    path = out / "report" / "01-raise.json"
    path.write_text(path.read_text().replace("[red]two[/red]", "<script>alert(1)</script>"))
    assert main(["report", str(out), "--html"]) == 0
    page = (out / "report" / "report.html").read_text()
    assert page.count("<script>") == 1, "the one of the page itself"
    assert "&lt;script&gt;" in page
    assert "http" not in page.replace("http-equiv", "")
    assert "prefers-color-scheme" in page
    assert main(["report", str(out), "--html", str(tmp_path / "no" / "page.html")]) == 2


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["report"], "E200"),
        (["report", "a", "b"], "E200"),
        (["report", "a", "--layer", "3"], "E200"),
        (["report", "diff", "a", "b"], "E309"),
        (["report", "missing"], "E309"),
        (["generate", "missing", "--prompt", "x"], "E309"),
        (["generate", "missing", "--prompt", ""], "E205"),
        (["generate", "missing"], "E200"),
        (["bench", "missing"], "E309"),
        (["bench", "missing", "--contexts", "12,x"], "E200"),
        (["eval", "missing", "--text", "missing.txt"], "E207"),
        (["lower", "missing", "--target", "cpu"], "E309"),
        (["lower", "missing", "--target", "cpux"], "E309"),
        (["passes", "windw"], "E202"),
        (["recipes", "streamin"], "E202"),
        (["targets", "cqu"], "E202"),
        (["targets", "cpu", "--threads", "1"], "E200"),
        (["generate", "missing", "--prompt", "x", "--threads", "1000000000"], "E200"),
        (["convert", "missing", "-o", "out", "--pass", f"window:window={10**20}"], "E203"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], code: str) -> None:
    status = main(words)
    shown = capsys.readouterr()
    assert shown.err.startswith(code)
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert status == int(code[1])


def test_a_group_without_a_command_asks_for_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bank"]) == 2
    shown = capsys.readouterr()
    assert shown.err == "E200 which of build, fuse, train, inspect? [memc bank] Next: memc bank --help\n"
    assert main(["bank", "--help"]) == 0


def test_a_corrupt_report_file_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = d.write_artifact(tmp_path / "out")
    (out / "report" / "verify.json").write_text('{"schema": "memc.report.verify/1"')
    assert main(["report", str(out)]) == 3
    assert "verify.json" in capsys.readouterr().err
