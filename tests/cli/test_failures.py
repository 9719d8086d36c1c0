"""From an exception to one line, an exit code and a log."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from memc.cli import main
from memc.cli.failures import KEPT_LOGS, fail
from memc.cli.invocation import Invocation
from memc.errors import MemcError


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MEMC_DEBUG", raising=False)
    return tmp_path / "memc" / "log"


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Make ``memc recipes`` raise."""

    def arrange(error: BaseException) -> None:
        def explode(name: str) -> None:
            raise error

        monkeypatch.setattr("memc.cli.recipes.load_recipe", explode)

    import memc.cli.recipes  # noqa: F401 - the name above must be there to be replaced

    return arrange


Arrange = Callable[[BaseException], None]


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (MemcError("E301", "model not found", "here", "look there"), 3, "E301 model not found [here] Next: look there"),
        (MemoryError(), 5, "E501 out of memory"),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you tried"), 5, "E501 out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), 5, "E502 no space left on the disk [out/x]"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.UsageError("No such thing."), 2, "E200 no such thing [memc recipes] Next: memc recipes --help"),
        (ValueError("first\nsecond"), 1, "E100 internal error: ValueError: first second"),
    ],
)
def test_every_exception_is_one_line(
    raising: Arrange, capsys: pytest.CaptureFixture[str], error: BaseException, status: int, line: str
) -> None:
    raising(error)
    assert main(["recipes", "x"]) == status
    shown = capsys.readouterr()
    said = shown.err.strip()  # click ends the line of ^C
    assert said.startswith(line)
    assert "\n" not in said
    assert shown.out == ""


def test_a_full_disk_names_the_output_where_the_system_names_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    assert fail(full, Invocation(["convert"], Path("made"))) == 5
    assert capsys.readouterr().err.startswith("E502 no space left on the disk [made]")


def test_traceback_goes_to_a_log_that_the_line_names(
    raising: Arrange, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    raising(ValueError("why"))
    assert main(["recipes", "x"]) == 1
    (log,) = cache.iterdir()
    assert str(log) in capsys.readouterr().err
    assert "Traceback" in log.read_text()
    assert log.read_text().startswith("$ memc recipes x\n")


def test_debug_shows_the_traceback(
    raising: Arrange, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMC_DEBUG", "1")
    raising(MemcError("E301", "model not found"))
    assert main(["recipes", "x"]) == 3
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("error", [MemcError("E301", "gone", "here", "look"), ValueError("why"), KeyboardInterrupt()])
def test_json_gives_an_error_document(
    raising: Arrange, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    raising(error)
    status = main(["recipes", "x", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "memc.error/1"
    assert document["exit_code"] == status
    assert {"code", "message", "where", "next", "exit_code"} <= document.keys()


def test_json_counts_when_the_rest_does_not_parse(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--json", "--nonsense"]) == 2
    assert json.loads(capsys.readouterr().out)["code"] == "E200"


def test_unknown_command_is_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convrt"]) == 2
    assert "Did you mean convert?" in capsys.readouterr().err


def test_log_goes_to_the_partial_artifact(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    invocation = Invocation(["convert"], tmp_path / "out")
    assert fail(ValueError("why"), invocation) == 1
    assert list((tmp_path / "out.partial" / "log").iterdir())


def test_a_log_that_cannot_be_written_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert fail(ValueError("why"), Invocation(["recipes"])) == 1
    assert "could not be written" in capsys.readouterr().err


def test_old_logs_are_removed(cache: Path) -> None:
    cache.mkdir(parents=True)
    for index in range(30):
        (cache / f"memc-2020{index:04d}.log").write_text("")
    fail(ValueError("why"), Invocation([]))
    assert len(list(cache.iterdir())) == KEPT_LOGS
