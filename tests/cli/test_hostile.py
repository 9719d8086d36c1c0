"""Foreign strings and broken files: names that are HTML, markup or escape codes, reports of other schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from pydantic import ValidationError

from memc.cli import main
from memc.report import facts as f
from memc.report import inspection, listings, terminal
from memc.report.analysis import analysis_page, analysis_view
from memc.report.compare import compare, compare_view
from memc.report.diff import diff, diff_view
from memc.report.evaluation import eval_view
from memc.report.html import render
from memc.report.pictures import bench_page, compare_page
from memc.report.quality import eval_page
from memc.report.read import VERIFY, read_report
from tests.cli import documents as d
from tests.cli.test_views import report, text_of, trained

EVIL = '</td></script><img src=x onerror="alert(1)">[red]\x1b[31m\u202e\'&'

D = TypeVar("D", bound=f.Document)


def strings(value: Any) -> set[str]:
    if isinstance(value, dict):
        return {text for each in [*value.keys(), *value.values()] for text in strings(each)}
    if isinstance(value, list):
        return {text for each in value for text in strings(each)}
    return {value} if isinstance(value, str) else set()


def replaced(value: Any, old: str, new: str, names: frozenset[str]) -> Any:
    if isinstance(value, dict):
        return {
            (new if key == old and key not in names else key): replaced(each, old, new, names)
            for key, each in value.items()
        }
    if isinstance(value, list):
        return [replaced(each, old, new, names) for each in value]
    return new if value == old else value


def field_names(kind: type[f.Document]) -> frozenset[str]:
    return frozenset(re.findall(r'"(\w+)": \{', json.dumps(kind.model_json_schema())))


def poisoned(document: D) -> D:
    """Put hostile text in the place of every string that may be any text."""
    kind, names = type(document), field_names(type(document))
    data = json.loads(document.to_json())
    count = 0
    for number, text in enumerate(sorted(strings(data) - {""})):
        changed = replaced(data, text, f"{EVIL}{number}", names)
        try:
            kind.model_validate(changed)
        except ValidationError:  # one of a few words
            continue
        data, count = changed, count + (changed != data)
    assert count > 3
    return kind.model_validate(data)


PAGES: dict[str, Callable[[], str]] = {
    "report": lambda: render(poisoned(trained())),
    "unfinished": lambda: render(poisoned(report(finished=False))),
    "eval": lambda: eval_page(poisoned(d.recalled())),
    "bench": lambda: bench_page(poisoned(d.benched())),
    "analyse": lambda: analysis_page(poisoned(d.analysed("bigram"))),
    "compare": lambda: compare_page(compare([poisoned(report()), poisoned(report(finished=False))])),
}

VIEWS: dict[str, Callable[[], Any]] = {
    "report": lambda: terminal.report_view(poisoned(trained())),
    "unfinished": lambda: terminal.report_view(poisoned(report(finished=False))),
    "inspect": lambda: inspection.inspect_view(poisoned(d.inspected()), why=True),
    "diff": lambda: diff_view(diff(poisoned(report()), trained())),
    "eval": lambda: eval_view(poisoned(d.evaluated())),
    "bench": lambda: listings.bench_view(poisoned(d.benched())),
    "analyse": lambda: analysis_view(poisoned(d.analysed("bigram"))),
    "compare": lambda: compare_view(compare([poisoned(report()), report(finished=False)])),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_runs_and_draws_nothing_foreign(name: str) -> None:
    page = PAGES[name]()
    assert "<img" not in page and "\x1b" not in page and "\u202e" not in page
    assert "&lt;img" in page
    assert len(re.findall(r"</script>", page)) == len(re.findall(r"<script", page)) <= 2


@pytest.mark.parametrize("name", VIEWS)
def test_a_terminal_is_told_no_codes(name: str) -> None:
    shown = text_of(VIEWS[name](), 200)
    assert "\x1b" not in shown and "\u202e" not in shown
    assert "[red]" in shown and r"\x1b[31m" in shown


def test_an_unfinished_page_says_how_far_it_came_and_why_it_stopped() -> None:
    page = render(report(finished=False))
    assert "stopped: E401 verification failed" in page
    assert "How far it came: capture (4.5 s); raise (1.5 s); linearize:window=256 (3.2 s)." in page
    assert "Next: <code>memc report out</code>" in page
    assert "How far it came" not in render(report())
    nothing = report(finished=False)
    nothing.capture = nothing.raising = nothing.error = None
    nothing.passes = []
    assert "nothing was finished" in render(nothing)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"schema": "memc.report.verify/9", "checks": 5}', "it has schema 'memc.report.verify/9', this memc reads"),
        ('{"schema": "memc.report.verify/1", "checks": 5}', "1 validation error"),
        ('{"schema": "memc.report.ver', "1 validation error"),
        ("[" * 100_000, "1 validation error"),
    ],
)
def test_a_report_file_that_cannot_be_read_is_named(
    content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = d.write_artifact(tmp_path / "out")
    assert read_report(out).verify is not None
    (out / "report" / VERIFY).write_text(content)
    assert main(["report", str(out)]) == 3
    shown = capsys.readouterr().err
    assert shown.startswith("E309 report file does not parse:") and said in shown and VERIFY in shown
