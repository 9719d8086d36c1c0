"""Golden tests of the terminal text at 80 columns. ``python -m tests.cli.test_views`` writes the files anew."""

from __future__ import annotations

import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from memc.cli.passes import describe
from memc.conversion.facts import pass_facts
from memc.conversion.pipeline import PassRun
from memc.report import evaluation, files, inspection, listings, terminal
from memc.report import facts as f
from memc.report import models as m
from memc.report.analysis import analysis_view
from memc.report.bank import bank_train_view, bank_view
from memc.report.diff import diff, diff_view
from tests.cli import documents as d

GOLDEN = Path(__file__).parent / "golden"


def report(*, finished: bool = True) -> m.ReportDocument:
    return m.ReportDocument(
        out="out",
        finished=finished,
        convert=d.converted() if finished else None,
        capture=files.CaptureReport(model=d.MODEL, timing=f.Timing(seconds=4.5)),
        raising=files.RaiseReport(blocks=d.blocks(), timing=f.Timing(seconds=1.5)),
        passes=[d.pass_file_of()],
        verify=d.verified() if finished else None,
        error=None
        if finished
        else m.ErrorDocument(code="E401", message="verification failed", next="memc report out", exit_code=4),
    )


def changed() -> m.ReportDocument:
    other = report()
    assert other.convert is not None
    other.out, other.convert.weights = "other", "int4"
    other.convert.predicted.state_bytes[4096] //= 2
    other.passes[0].sites = other.passes[0].sites[:7]
    return other


def trained() -> m.ReportDocument:
    other = report()
    assert other.convert is not None
    other.convert.untrained = False
    other.passes = [d.trained_pass()]
    other.quality = d.evaluated()
    return other


def trained_longer() -> m.ReportDocument:
    other = trained()
    other.out = "longer"
    other.passes[0].training = d.training(kept=(3, 6), trained=0.125)
    assert other.quality is not None
    other.quality.by_context[1].ratio = 1.03125
    return other


VIEWS: dict[str, Callable[[], RenderableType]] = {
    "inspect": lambda: inspection.inspect_view(d.inspected()),
    "inspect-why": lambda: inspection.inspect_view(d.inspected(), layer=7, why=True),
    "convert": lambda: terminal.convert_view(d.converted()),
    "convert-fit": lambda: terminal.convert_view(d.converted().model_copy(update={"fit": d.fitted()})),
    "convert-dry-run": lambda: terminal.convert_view(d.converted(dry_run=True)),
    "report": lambda: terminal.report_view(report()),
    "report-unfinished": lambda: terminal.report_view(report(finished=False)),
    "report-pass": lambda: terminal.pass_view(d.pass_file_of(), layer=7, why=True),
    "report-pass-skipped": lambda: terminal.pass_view(d.pass_file_of(), layer=29, why=True),
    "report-trained": lambda: terminal.report_view(trained()),
    "report-pass-trained": lambda: terminal.pass_view(d.trained_pass()),
    "report-pass-kept": lambda: terminal.pass_view(d.trained_pass(), layer=3, why=True),
    "report-pass-not-kept": lambda: terminal.pass_view(d.trained_pass(), layer=5, why=True),
    "diff-trained": lambda: diff_view(diff(trained(), trained_longer())),
    "diff-untrained": lambda: diff_view(diff(report(), trained())),
    "report-pass-heads": lambda: terminal.pass_view(d.heads_file_of()),
    "report-pass-heads-layer": lambda: terminal.pass_view(d.heads_file_of(), layer=18),
    "diff": lambda: diff_view(diff(report(), changed())),
    "diff-same": lambda: diff_view(diff(report(), report())),
    "eval": lambda: evaluation.eval_view(d.evaluated()),
    "eval-tasks": lambda: evaluation.eval_view(d.recalled()),
    "bench": lambda: listings.bench_view(d.benched()),
    "bank": lambda: bank_view(d.bank()),
    "bank-trained": lambda: bank_train_view(d.bank_trained()),
    "bank-cluster": lambda: bank_view(d.bank(trained=True, cluster=True)),
    "analyse-heads": lambda: analysis_view(d.analysed("heads")),
    "analyse-bigram": lambda: analysis_view(d.analysed("bigram")),
    "doctor": lambda: listings.doctor_view(d.examined()),
}


def text_of(view: RenderableType, width: int = 80) -> str:
    stream = StringIO()
    Console(file=stream, width=width, no_color=True, highlight=False, markup=False, emoji=False).print(view)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


@pytest.mark.parametrize("name", VIEWS)
def test_text_is_as_kept(name: str) -> None:
    assert text_of(VIEWS[name]()) == (GOLDEN / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", VIEWS)
def test_text_fits_80_columns(name: str) -> None:
    assert max(len(line) for line in text_of(VIEWS[name]()).splitlines()) <= 80


@pytest.mark.parametrize("width", [40, 60])
def test_no_figure_is_cut_where_the_terminal_is_narrow(width: int) -> None:
    figure = re.compile(r"(?<!\S)-?\d+(?:\.\d+)?(?:e-?\d+)?x?(?![^\s:])")  # a column's title has a colon
    for name, view in VIEWS.items():
        shown = text_of(view(), width)
        assert max(len(line) for line in shown.splitlines()) <= width, name
        assert set(figure.findall(text_of(view(), 240))) <= set(figure.findall(shown)), name


def test_wider_terminals_are_used() -> None:
    assert max(len(line) for line in text_of(VIEWS["convert"](), 140).splitlines()) > 80


def test_foreign_strings_style_nothing() -> None:
    shown = text_of(VIEWS["inspect"](), 140)
    assert "\x1b" not in shown
    assert "[red]two[/red]" in shown
    assert r"\x1b[31m" in shown


def test_a_pass_that_matched_nothing_is_shown() -> None:
    shown = text_of(terminal.pass_view(files.PassReportFile(spec="window", sites=[])))
    assert "nothing here" in shown


def test_a_conversion_shows_its_training_as_its_report_does() -> None:
    document = d.converted()
    document.passes = [pass_facts(PassRun(d.trained_pass()))]
    shown = text_of(terminal.convert_view(document))
    training = shown[shown.index("training of") : shown.index("cost ")]
    assert training in text_of(terminal.report_view(trained()))
    assert "3, 7 (2 of 8" in training


def test_no_number_of_a_difference_is_cut_in_two() -> None:
    ms = m.Difference(topic="predicted ms of a prompt", name="at 32768", a=711.17234, b=670.17123, ratio=0.942)
    check = m.Difference(topic="check", name="weights_perplexity_ratio", a=2.6123e-6, b=0.087954, ratio=33500.0)
    shown = text_of(diff_view(m.DiffDocument(a="one", b="two", differences=[ms, check])))
    assert "711.17     670.17" in shown and "2.6e-06   0.087954" in shown


def test_no_number_of_an_evaluation_is_cut_off() -> None:
    document = d.evaluated()
    for row in document.by_context:
        row.ratio, row.kl_mean, row.kl_p99, row.top1_agreement = 1.0123456, 0.0012345, 0.0034528, 0.0976561
    for side in document.sides.values():
        side.by_context[0].perplexity = 0.0012345
    shown = text_of(evaluation.eval_view(document))
    assert "same top\n" in shown
    assert "0.0012345   0.0034528   0.097656\n" in shown


def test_training_without_recovery_and_choice_is_shown() -> None:
    item = d.trained_pass()
    assert item.training is not None
    item.training.choice = item.training.recovery = None
    shown = text_of(terminal.pass_view(item, layer=5, why=True))
    assert "training was not asked" in " ".join(shown.split())
    assert "recovery" not in text_of(terminal.pass_view(item))


def test_passes_describe_themselves() -> None:
    row = describe("window")
    assert row.available
    assert {option.name for option in row.options} >= {"window", "sinks"}
    assert row.does_not_handle
    assert "window" in text_of(listings.passes_view(m.PassesDocument(passes=[row])))


if __name__ == "__main__":
    for kept, view in VIEWS.items():
        (GOLDEN / f"{kept}.txt").write_text(text_of(view()))
