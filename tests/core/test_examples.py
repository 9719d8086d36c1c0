"""Every example runs as it stands."""

from __future__ import annotations

import ast
import html
import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

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
    assert all(f"`{path.name}`" in listed for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb"))


def run_notebook(path: Path) -> list[Any]:
    """Run the cells of a notebook in order, as a kernel would, and return what each one shows: its last expression."""
    shown, names = [], {"__name__": "__main__"}
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells):
        assert not cell["outputs"] and cell["execution_count"] is None, "a notebook is kept without what it showed"
        body = ast.parse("".join(cell["source"]), f"{path.name}, cell {number}").body
        last = body.pop() if isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), path.name, "exec"), names)
        shown.append(eval(compile(ast.Expression(last.value), path.name, "eval"), names) if last else None)
    return shown


def test_the_notebook_shows_pages_inline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    _, block, report, comparison, timings = run_notebook(EXAMPLES / "report.ipynb")
    assert block.kind == "attention"
    for shown, told in ((report, "linearize:window=16"), (comparison, "2 artifacts"), (timings, "Timings")):
        page = re.fullmatch(r'<iframe srcdoc="([^"]*)" [^<>]*></iframe>', shown._repr_html_())
        assert page is not None and html.unescape(page[1]) == shown.to_html()
        assert told in shown.to_html()
    assert [row.finished for row in comparison.rows] == [True] * 2


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
