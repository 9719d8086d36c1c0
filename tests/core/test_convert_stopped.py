"""What stands in a conversion's way, and one that was stopped: it goes on, starts over, or asks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from memc import partial
from memc.artifact import read_manifest
from memc.errors import MemcError
from memc.program import Program
from memc.report.models import ConvertDocument
from tests.core.converting import make_llama, register_toy, run
from tests.core.toy import Toy

pytestmark = pytest.mark.usefixtures("toy")


def test_an_output_that_exists_is_kept(program: Program, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(program, out)
    with pytest.raises(MemcError, match=r"E204.*this recipe.*--force"):
        run(program, out)
    with pytest.raises(MemcError, match=r"E204.*another artifact.*--force"):
        run(program, out, seed=1)
    before = (out / "memc.json").read_bytes()
    run(program, out, force=True)
    assert (out / "memc.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_foreign_output_is_refused(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(MemcError, match=r"E204.*file"):
        run(program, tmp_path / "file", force=True)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(MemcError, match=r"E204.*no artifact.*--force"):
        run(program, folder)
    monkeypatch.chdir(folder)
    with pytest.raises(MemcError, match=r"E204.*cannot be replaced"):
        run(program, folder, force=True)
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "mine.txt").write_text("mine")
    with pytest.raises(MemcError, match=r"E204.*in the way"):
        run(program, tmp_path / "new", fresh=True)
    assert (folder / "mine.txt").read_text() == (tmp_path / "new.partial" / "mine.txt").read_text() == "mine"


def killed_writing(patch: pytest.MonkeyPatch, name: str) -> None:
    """Have a kill come when half of the file of a name is written, which stays where it is made."""
    whole = partial.replacing

    @contextmanager
    def half(path: Path) -> Iterator[Path]:
        if path.name != name:
            with whole(path) as beside:
                yield beside
            return
        yield (beside := partial.partial_of(path))
        os.truncate(beside, beside.stat().st_size // 2)
        raise KeyboardInterrupt

    patch.setattr(partial, "replacing", half)


@pytest.mark.parametrize("name", ["resume.json", "text.json", "00-capture.json", "convert.json"])
def test_a_kill_while_a_file_is_written_is_gone_on_from(
    name: str, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        killed_writing(patch, name)
        with pytest.raises(KeyboardInterrupt):
            run(program, tmp_path / "out")
    assert run(program, tmp_path / "out").verified
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_another_recipe_needs_fresh_where_something_was_finished(program: Program, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(MemcError, match="E401"):
        run(program, out, "toy:op=shift,by=0", "toy:op=shift,by=0.01,relation=close")
    assert list((tmp_path / "out.partial").glob("stage-*"))
    with pytest.raises(MemcError, match=r"E204.*--fresh"):
        run(program, out)
    assert list((tmp_path / "out.partial").glob("stage-*"))
    assert run(program, out, fresh=True).verified


def test_another_recipe_starts_over_where_nothing_was_finished(program: Program, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(MemcError, match="E401"):
        run(program, out, "toy:op=shift,by=0.01,relation=close")
    assert (tmp_path / "out.partial" / "report" / "error.json").is_file()
    assert run(program, out).verified and not (tmp_path / "out.partial").exists()


SCRIPT = """
import sys
from pathlib import Path
from tests.core.test_convert_stopped import killable
killable(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
"""


def killable(llama: Path, out: Path, trigger: str) -> ConvertDocument:
    """Convert with two passes of which the second is killed while ``trigger`` exists."""
    torch.set_num_threads(1)
    register_toy(dict.__setitem__)
    return run(llama, out, "window:window=8,sinks=2", f"toy:kill={trigger}")


def test_a_killed_conversion_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    llama = make_llama(tmp_path / "model", layers=1)
    trigger = tmp_path / "kill"
    trigger.touch()
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", SCRIPT, str(llama), str(tmp_path / "a"), str(trigger)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    killed = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "a.partial" / "stage-02").is_dir() and not (tmp_path / "a").exists()
    trigger.unlink()
    resumed = killable(llama, tmp_path / "a", str(trigger))
    assert [facts.resumed for facts in resumed.passes] == [True, False]
    killable(llama, tmp_path / "b", str(trigger))
    first, second = (read_manifest(tmp_path / name).files for name in "ab")
    assert first == second and Toy.name in (tmp_path / "a" / "recipe.yaml").read_text()
