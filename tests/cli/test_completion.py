"""Completion: the scripts, and what they are told."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from memc.cli import main
from memc.cli.completion import SHELLS
from memc.report.tools import CompletionDocument


def offered(words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return what bash is offered for the last of ``words``, each as TYPE,VALUE."""
    monkeypatch.setenv("_MEMC_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
    assert main([]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("memc conv", ["plain,convert"]),
        ("memc completion z", ["plain,zsh"]),
        ("memc convert m --target nvidia-sm9", ["plain,nvidia-sm90"]),
        ("memc convert m --recipe str", ["plain,streaming"]),
        ("memc convert m --recipe ./my", ["file,./my"]),
        ("memc convert m --pass lin", ["plain,linearize"]),
        ("memc convert m --backend ea", ["plain,eager"]),
        ("memc convert m --weights int", ["plain,int8", "plain,int4"]),
        ("memc convert mod", ["file,mod"]),
        ("memc report ou", ["dir,ou"]),
        ("memc serve ou", ["dir,ou"]),
        ("memc eval out --te", ["plain,--text"]),
        ("memc eval out --text no", ["file,no"]),
    ],
)
def test_what_is_offered(
    words: str, expected: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert offered(words, monkeypatch, capsys) == expected


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_is_one_of_its_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "_MEMC_COMPLETE" in script
    assert main(["completion", shell, "--json"]) == 0
    assert CompletionDocument.model_validate_json(capsys.readouterr().out).script == script
    if (path := shutil.which(shell)) is not None:
        subprocess.run([path, "-n", "/dev/stdin"], input=script, text=True, check=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
def test_bash_completes_with_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "memc").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m memc "$@"\n')
    (tmp_path / "memc").chmod(0o755)
    asked = "source script; COMP_WORDS=(memc gen); COMP_CWORD=1; _memc_completion memc gen memc; echo ${COMPREPLY[@]}"
    path = f"{tmp_path}:{os.environ['PATH']}"
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PATH": path, "PYTHONPATH": root}
    done = subprocess.run(["bash", "-c", asked], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["generate"], done.stderr


def test_a_shell_that_is_not_known_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == 2
    assert "E200" in capsys.readouterr().err
