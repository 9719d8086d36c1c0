"""Outputs that cannot be written, or must not be: one line with a code, and nothing is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from memc.cli import main
from memc.cli.failures import classify
from memc.conversion.folder import OutFolder
from memc.errors import MemcError
from tests.core.converting import make_llama

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("hostile") / "box" / "llama")


@pytest.mark.parametrize("above", [False, True])
def test_no_model_is_replaced_by_what_is_made_from_it(model: Path, above: bool, capsys: Capture) -> None:
    before = sorted(path.name for path in model.parent.rglob("*"))
    out = model.parent if above else model
    assert main(["convert", str(model), "-o", str(out), "--recipe", "dense", "--force"]) == 2
    assert "E204 the result would replace what it is made from" in capsys.readouterr().err
    assert sorted(path.name for path in model.parent.rglob("*")) == before


def test_no_data_are_replaced_either(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("notes")
    folder = OutFolder(tmp_path / "out")
    with pytest.raises(MemcError, match=r"E204 .*notes\.txt"):
        folder.refuse_existing("", {}, force=True, sources=[str(tmp_path / "out/notes.txt")])
    folder.refuse_existing("", {}, force=True, sources=[tmp_path / "elsewhere", "hub:org/name"])


@pytest.mark.parametrize("out", ["", ".", "/"])
def test_an_output_without_a_name_is_refused_in_one_line(out: str, model: Path, capsys: Capture) -> None:
    assert main(["convert", str(model), "-o", out, "--recipe", "dense", "--force"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("E200 output folder has no name") and len(shown.splitlines()) == 1


@pytest.mark.parametrize("words", [["report", ""], ["generate", "", "--prompt", "x"]])
def test_an_artifact_without_a_name_is_none(words: list[str], capsys: Capture) -> None:
    assert main(words) == 3
    assert capsys.readouterr().err.startswith("E309")


@pytest.mark.parametrize("kind", [PermissionError, IsADirectoryError, NotADirectoryError])
def test_what_the_system_refuses_is_the_users(kind: type[OSError]) -> None:
    number = {PermissionError: 13, IsADirectoryError: 21, NotADirectoryError: 20}[kind]
    code, known = classify(kind(number, os.strerror(number), "/some/place"))
    assert code == 2 and isinstance(known, MemcError) and known.code == "E200" and "/some/place" in str(known)


def test_a_page_is_whole_or_not_there(tmp_path: Path, capsys: Capture) -> None:
    from memc.cli.console import Console
    from memc.cli.options import write_file

    page = tmp_path / "page.html"
    page.write_text("earlier")
    with pytest.raises(UnicodeEncodeError):
        write_file(Console(quiet=True), str(page), "cut \ud800")
    assert page.read_text() == "earlier"
    write_file(Console(quiet=True), str(page), "later")
    assert page.read_text() == "later" and [path.name for path in tmp_path.iterdir()] == ["page.html"]


RUN = "import sys; from memc.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_a_full_output_is_one_line(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", RUN, "targets", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 5 and done.stderr.startswith("E502") and len(done.stderr.splitlines()) == 1


def test_a_reader_that_leaves_is_no_failure() -> None:
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-c", RUN, "passes", "sparsify"]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == 0 and not done.stderr


def test_a_folder_in_the_way_of_a_page_is_said(tmp_path: Path, capsys: Capture) -> None:
    from memc.cli.console import Console
    from memc.cli.options import write_file

    with pytest.raises(OSError) as caught:
        write_file(Console(quiet=True), str(tmp_path), "page")
    code, known = classify(caught.value)
    assert code == 2 and isinstance(known, MemcError)
    assert not list(tmp_path.parent.glob("*.partial"))


@pytest.mark.parametrize(
    "words",
    [["eval", "out", "--text", "t"], ["bench", "out"], ["analyse", "m", "--method", "heads"]],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("place", ["no/such/page.html", ""])
def test_where_a_page_cannot_go_is_told_before_any_work(
    words: list[str], place: str, tmp_path: Path, capsys: Capture
) -> None:
    where = str(tmp_path / place)
    for option in ["--html", *(["-o"] if words[0] == "analyse" else [])]:
        assert main([*words, option, where]) == 2  # neither model nor artifact is there: nothing looked for them
        said = capsys.readouterr().err
        assert said.startswith("E200") and where in said and len(said.splitlines()) == 1


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    from memc.cli.console import Console
    from memc.cli.options import write_file

    os.mkfifo(pipe := tmp_path / "pipe")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_file(Console(quiet=True), str(pipe), "page")
    assert os.read(reader, 9) == b"page" and pipe.is_fifo()
    os.close(reader)


def test_a_link_is_written_through(tmp_path: Path) -> None:
    from memc.cli.console import Console
    from memc.cli.options import write_file

    (tmp_path / "page").write_text("before")
    (link := tmp_path / "link").symlink_to("page")
    write_file(Console(quiet=True), str(link), "after")
    assert link.is_symlink() and (tmp_path / "page").read_text() == "after"
