"""Every example runs as it stands."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

AS_THEY_STAND = sorted(path for path in EXAMPLES.glob("*.py") if path.name != "recall.py")
"""All but the one that takes minutes, whose short form has a test of its own."""


@pytest.mark.parametrize("path", AS_THEY_STAND, ids=lambda path: path.name)
def test_an_example_runs(path: Path, tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_every_example_is_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"`{path.name}`" in listed for path in EXAMPLES.glob("*.py"))


def test_linear_attention_recalls_what_no_window_can(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    recall = importlib.import_module("recall")
    original, window, untrained, trained, same_bytes = recall.main(["--short"])
    chance = recall.SHORT.task.chance
    assert original.recall >= 0.95
    assert window.recall <= chance and same_bytes.recall <= chance and untrained.recall <= chance
    assert trained.recall >= 0.7
    assert same_bytes.state_bytes <= trained.state_bytes < original.state_bytes / 2
    assert f"{trained.recall:.3f}" in capsys.readouterr().out
