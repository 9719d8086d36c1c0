"""Several artifacts beside each other, and pages of pictures."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from memc.cli import main
from memc.report import charts, files
from memc.report import facts as f
from memc.report import models as m
from memc.report.compare import compare, compare_view
from memc.report.pictures import bench_page, compare_page
from memc.report.read import VERIFY
from memc.report.tools import CompareDocument
from tests.cli import documents as d
from tests.cli.test_views import report, text_of, trained


def made(out: str, saving: int, kl: float | None, weights: str = "fp32") -> m.ReportDocument:
    """Return the report of an artifact that holds one part in ``saving`` and is ``kl`` from its original."""
    found = report()
    assert found.convert is not None and found.verify is not None
    found.out, found.convert.weights, found.convert.verified = out, weights, True
    found.convert.predicted = d.predicted(saving)
    checks = {} if kl is None else {"kl_mean": kl, "perplexity_ratio": 1 + kl}
    found.verify.checks = [f.CheckFacts(name=name, value=value, passed=True) for name, value in checks.items()]
    return found


def dense() -> m.ReportDocument:
    found = made("dense", 1, None)
    found.passes = []
    return found


def chosen(name: str = "large") -> CompareDocument:
    """Three on the front of the state, one that is beaten, one that stopped."""
    return compare(
        [dense(), made(name, 2, 0.01), made("beaten", 2, 0.02), made("small", 8, 0.03), report(finished=False)]
    )


def test_the_front_is_what_no_other_beats() -> None:
    document = chosen()
    assert [row.fronts for row in document.rows] == [["state_bytes"], ["state_bytes"], [], ["state_bytes"], []]
    assert document.context == 32768
    assert [row.kl_mean for row in document.rows] == [0.0, 0.01, 0.02, 0.03, None]
    assert document.rows[1].perplexity_ratio == 1.01
    assert document.warnings == ["out did not finish: E401 verification failed"]


def test_equals_do_not_beat_each_other() -> None:
    document = compare([made("a", 2, 0.01), made("b", 2, 0.01), made("c", 2, 0.5)])
    assert [row.fronts for row in document.rows] == [["state_bytes"], ["state_bytes"], []]


def test_what_was_not_measured_is_on_no_front() -> None:
    document = compare([made("a", 2, 0.01), made("b", 8, 0.0, weights="int4")])
    assert [row.fronts for row in document.rows] == [["state_bytes"], []]
    assert "b: the KL with int4 weights is not in its report" in document.warnings[0]


def test_held_out_text_counts_before_the_checks() -> None:
    other = trained()
    row, plain = compare([other, dense()]).rows
    assert other.quality is not None
    assert row.kl_mean == other.quality.by_context[-1].kl_mean
    assert (plain.perplexity_ratio, plain.kl_mean) == (1.0, 0.0)


def test_other_models_and_texts_are_said() -> None:
    other = dense()
    assert other.convert is not None and other.convert.model is not None
    other.convert.model = other.convert.model.model_copy(update={"digest": "other"})
    other.verify = files.VerifyReport(checks=[], text="novels")
    warnings = compare([dense(), other]).warnings
    assert any("different models" in warning for warning in warnings)
    assert any("different texts" in warning for warning in warnings)


def test_the_view_fits_80_columns_and_is_safe() -> None:
    shown = text_of(compare_view(chosen("[red]x\x1b[31m")))
    assert max(map(len, shown.splitlines())) <= 80
    assert "\x1b" not in shown and "[red]x" in shown
    for word in ("1: dense: as it is, fp32", "at 32768 tokens", "0.02", "warning: out did not finish"):
        assert word in shown


def pictures(page: str) -> list[ElementTree.Element]:
    return [
        ElementTree.fromstring("<figure>" + part.partition("</figure>")[0] + "</figure>")
        for part in page.split("<figure>")[1:]
    ]


def test_the_page_of_a_comparison_shows_fronts_and_escapes_names() -> None:
    page = compare_page(chosen("<script>alert(1)</script>"))
    assert "<script" not in page and "&lt;script&gt;" in page
    (state,) = pictures(page)  # of what is read nothing is predicted at that context
    spots = [spot.get("class") for spot in state.iter("circle")]
    assert sorted(map(str, spots)) == ["spot", "spot full", "spot full", "spot full"]
    told = state.find("svg").get("aria-label")  # type: ignore[union-attr]
    assert told is not None and "1: 0 for 1.41 GiB, best" in told and "3: 0.02 for 720 MiB;" in told


def test_a_stair_goes_through_the_front_alone() -> None:
    points = [charts.Point("a", 1e6, 3.0, True), charts.Point("b", 1e7, 2.0), charts.Point("c", 1e8, 1.0, True)]
    (picture,) = pictures(charts.scatter("x", points))
    corners = str(picture.find(".//polyline").get("points")).split()  # type: ignore[union-attr]
    assert len(corners) == 3
    spots = [(spot.get("cx"), spot.get("cy")) for spot in picture.iter("circle") if "full" in str(spot.get("class"))]
    assert [",".join(map(str, spot)) for spot in spots] == [corners[0], corners[2]]


@pytest.mark.parametrize("points", [[], [charts.Point("a", 0, 1)], [charts.Point("a", 5, float("nan"))]])
def test_nothing_is_drawn_of_nothing(points: list[charts.Point]) -> None:
    assert charts.scatter("x", points) == ""


def test_one_point_is_drawn() -> None:
    assert len(pictures(charts.scatter("x", [charts.Point("a", 5, 0.0, True)]))) == 1


def test_timings_have_a_page() -> None:
    document = d.benched().model_copy(update={"sides": {"a": "<b>", "b": "dense"}, "warnings": ["a & b"]})
    page = bench_page(document)
    speed, prompt, state = pictures(page.replace("<b>", ""))
    assert "a: <b>: 9.5 at context 512" in str(speed.find("svg").get("aria-label"))  # type: ignore[union-attr]
    assert all(len(list(picture.iter("circle"))) == 4 for picture in (speed, prompt, state))
    assert "&lt;b&gt;" in page and "<b>" not in page and "a &amp; b" in page


def test_the_command_compares_and_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outs = [str(d.write_artifact(tmp_path / name)) for name in ("one", "two")]
    d.write_report(tmp_path / "two", VERIFY, made("two", 2, 0.01).verify or files.VerifyReport(checks=[]))
    failed = d.write_artifact(tmp_path / "three.partial", finished=False)
    page = tmp_path / "choice.html"
    words = ["report", "compare", *outs, str(failed.with_suffix("")), "--html", str(page)]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "E401 verification failed" in shown.out and f"wrote {page}" in shown.err
    assert "3 artifacts" in page.read_text()
    assert main([*words, "--json"]) == 0
    document = CompareDocument.model_validate_json(capsys.readouterr().out)
    assert [row.out for row in document.rows] == [*outs, str(failed)]


@pytest.mark.parametrize(
    ("words", "code"),
    [(["compare", "a"], 2), (["compare", "a", "b"], 3), (["compare", "a", "b", "--html"], 2)],
)
def test_what_cannot_be_compared_is_refused(
    words: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", *words]) == code
