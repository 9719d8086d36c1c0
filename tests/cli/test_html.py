"""The page: training and its pictures, whatever the report files hold."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from memc.report import charts, files, heads
from memc.report.files import HeadFacts
from memc.report.html import render
from memc.report.quality import eval_page
from tests.cli.documents import evaluated, fitted, heads_file_of, recalled
from tests.cli.test_views import report, trained


def figures(page: str, *, of: str = "") -> list[ElementTree.Element]:
    """Return the pictures of a page: those of the cost by context, of quality, or all others but those of a layer."""
    page = re.sub(r"<details>.*?</details>", "", page, flags=re.DOTALL)
    found = re.search(r'<section class="context">.*?</section>', page, re.DOTALL)
    cost = found[0] if found else ""
    page = cost if of == "context" else page.replace(cost, "")
    drawn = [ElementTree.fromstring(found) for found in re.findall(r"<figure>.*?</figure>", page, re.DOTALL)]
    quality = ("Perplexity by position", "right by tokens")
    return [one for one in drawn if (of == "quality") == any(title in alternative(one) for title in quality)]


def alternative(figure: ElementTree.Element) -> str:
    return figure.find("svg").get("aria-label")  # type: ignore[union-attr, return-value]


def test_training_has_six_pictures_that_are_told_in_words_too() -> None:
    transfer, recovery, bars, shares, carried, due = pictures = figures(render(trained()))
    assert "output: 1 at step 1, 0.125 at step 8, lowest 0.125" in alternative(transfer)
    assert "KL on held-out text: 0.0625 at step 0, 0.05 at step 48, lowest 0.03125" in alternative(recovery)
    assert "layer 3: 0.4375" in alternative(bars)
    assert "layer 5: -0.0625" in alternative(bars)
    assert "layer 5: 19.858; original: 39.717; layer 121" in alternative(shares)
    assert "what the memory carries. layer 0: most 0.5, head 7" in alternative(carried)
    assert "what the original gives. layer 0: most 1, head 7" in alternative(due)
    assert all(figure.find("svg").get("role") == "img" for figure in pictures)  # type: ignore[union-attr]


def test_recovery_shows_the_guard_and_no_other_loss() -> None:
    recovery = figures(render(trained()))[1]
    assert "text: 3" not in alternative(recovery)
    assert len(recovery.findall(".//circle")) == 4


def test_a_kept_layer_has_a_full_bar_and_a_negative_score_is_left_of_zero() -> None:
    bars = figures(render(trained()))[2]
    rectangles = bars.findall(".//rect")
    assert [index for index, bar in enumerate(rectangles) if "full" in bar.get("class", "")] == [3, 7]
    zero = float(bars.find(".//line").get("x1"))  # type: ignore[union-attr, arg-type]
    ends = [float(bar.get("x", 0)) + float(bar.get("width", 0)) for bar in rectangles]
    assert ends[5] == pytest.approx(zero, abs=0.1)
    assert all(end > zero for index, end in enumerate(ends) if index != 5)


def test_branches_are_shown_beside_the_errors_of_the_layers() -> None:
    page = render(trained())
    rows = re.findall(r"<tr><td>(as it is|\w+ off)</td><td class=\"n\">(.*?)</td><td class=\"n\">(.*?)</td>", page)
    assert rows == [
        ("as it is", "1.0151", "0.03125"),
        ("memory off", "1.0625", "0.0771"),
        ("window off", "212.5", "5.25"),
    ]
    assert page.index("Share of the mass by query head") < page.index("<caption>Layers</caption>")
    bars = figures(page)[3].findall(".//rect")
    assert ["full" in bar.get("class", "") for bar in bars] == [True, False] * 3
    widths = [float(bar.get("width", 0)) for bar in bars]
    assert all(
        carried == pytest.approx(due / 2, abs=0.1) for carried, due in zip(widths[::2], widths[1::2], strict=True)
    )


def test_heads_are_as_full_as_their_scores_and_framed_where_they_stay() -> None:
    made = report()
    made.passes = [heads_file_of()]
    induction, echo = figures(render(made))
    scores = HeadFacts.model_validate(made.passes[0].details["heads"])
    cells = induction.findall(".//rect")
    assert [float(cell.get("fill-opacity", -1)) for cell in cells] == [
        pytest.approx(value, abs=0.005) for layer in scores.layers for value in layer.induction
    ]
    kept = sum(len(layer.kept) * len(layer.induction) // layer.kv_heads for layer in scores.layers)
    assert sum("kept" in cell.get("class", "") for cell in cells) == kept > 0
    assert len(echo.findall(".//rect")) == len(cells)
    ends = [float(cell.get("x", 0)) + float(cell.get("width", 0)) for cell in cells]
    assert max(ends) <= charts.WIDTH
    assert cells[3].find("title").text == "layer 17, head 3: 0.7593"  # type: ignore[union-attr]


def test_heads_are_shown_by_how_their_attention_decays_where_that_chose() -> None:
    made, item = report(), heads_file_of()
    layers = [files.LayerHeads(layer=3, path="a", kv_heads=2, decay=[0.5, 0.25, 0.003, 0.75], kept=[0])]
    facts = files.HeadFacts(chance=0.5, layers=layers)
    made.passes = [item.model_copy(update={"details": {"heads": facts.model_dump(mode="json")}})]
    page = render(made)
    (areas,) = figures(page)
    cells = areas.findall(".//rect")
    assert [float(cell.get("fill-opacity", -1)) for cell in cells] == pytest.approx([0.5, 0.25, 0.003, 0.75], abs=0.005)
    assert ["kept" in cell.get("class", "") for cell in cells] == [True, True, False, False]
    assert "the area under it" in page and "1 of 2 key-value heads" in page
    assert heads.columns(facts) == (">layer", "decay")
    assert list(heads.rows(facts)) == [("3", "50*25*| . 75 |")]
    assert "spread evenly it is 50" in heads.legend(facts)[2]


def test_names_of_losses_are_escaped() -> None:
    page = render(trained())
    assert "<b>mass" not in page
    assert page.count("&lt;b&gt;mass&lt;/b&gt;") == 2


def test_the_page_needs_no_network_and_runs_one_script_that_it_names() -> None:
    page = render(report())
    assert "http" not in page.replace("http-equiv", "")
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page


def test_costs_at_a_context_stand_there_without_a_script() -> None:
    page = render(report())
    cells = dict(re.findall(r'id="([a-z]+(?:-[a-z]+)?)"(?: for="context")?>([^<]*)<', page))
    assert cells["tokens"] == "32,768"
    assert (cells["state-a"], cells["state-b"], cells["state-ratio"]) == ("1.41 GiB", "360 MiB", "0.25x")
    told = json.loads(re.findall(r'id="told">(.*?)</script>', page)[0])
    assert told.keys() == cells.keys() - {"told"} and {len(texts) for texts in told.values()} == {11}
    assert all(cells[name] == texts[8] for name, texts in told.items())


def test_costs_are_drawn_over_the_context() -> None:
    state, read, time, prompt = figures(render(report()), of="context")
    assert "original: 5.625 at context 128, 5760 at context 131072" in alternative(state)
    assert "converted" in alternative(read) and "converted" in alternative(time)
    assert "original: 0.5161 at context 128" in alternative(prompt)
    line = state.find(".//polyline")
    assert line is not None
    points = [float(point.split(",")[0]) for point in line.get("points", "").split()]
    assert {round(b - a, 0) for a, b in pairwise(points)} == {26.0}, "equal steps for every doubling"


def test_every_layer_says_what_became_of_its_blocks() -> None:
    page = render(report())
    rows = re.findall(r"<summary><b>layer (\d+)</b>(.*?)</summary>(.*?)</details>", page, re.DOTALL)
    assert [int(number) for number, _, _ in rows] == list(range(30))
    assert '<p class="legend"><span class="form s0">linearize</span> <span class="form">as it was</span>' in page
    assert re.findall(r'<span class="(.*?)">(.*?)</span>', rows[0][1]) == [
        ("form s0", "attention: linearize"),
        ("form", "feed-forward: as it was"),
    ]
    assert "attention: as it was" in rows[29][1] and "linearize: softcap is capped" in rows[29][2]
    assert "half life: 512" in rows[3][2] and "model.layers.3.self_attn" in rows[3][2]
    assert "not raised: down projection reads [red]two[/red] values\\x1b[31m" in rows[7][2]


def test_a_measured_time_stands_beside_the_predicted_one() -> None:
    page = render(report())
    told = json.loads(re.findall(r'id="told">(.*?)</script>', page)[0])
    assert told["measured-b"][:5] == ["-", "-", "15.3", "-", "16.1"]
    assert told["measured-a"][:5] == ["-", "-", "17", "-", "23"]
    assert (told["measured-ratio"][2], told["share-b"][2], told["share-a"][3]) == ("0.9x", "1.07x", "-")
    time = figures(page, of="context")[2]
    assert "converted, measured: 15.3 at context 512, 16.1 at context 2048" in alternative(time)
    assert "original, measured: 17 at context 512, 23 at context 2048" in alternative(time)
    bare = report()
    assert bare.convert is not None and bare.convert.measured is not None
    bare.convert.measured.decode_ms = {}
    assert "measured-b" not in render(bare)


def test_a_layer_shows_what_its_gates_forget_and_where_it_is_off() -> None:
    page = render(report())
    layers = dict(re.findall(r"<summary><b>layer (\d+)</b>(.*?)</details>", page, re.DOTALL))
    assert "32: 25; 64: 0; 128: 75" in layers["3"] and "65,536: 100" in layers["4"]
    assert [number for number, told in layers.items() if "<svg" in told] == ["3", "4"]
    layers = dict(re.findall(r"<summary><b>layer (\d+)</b>(.*?)</details>", render(trained()), re.DOTALL))
    assert "trained: 0.0078125 at position 64, 9.8e-04 at position 512" in layers["5"]


def test_a_layer_shows_its_training_and_its_memory() -> None:
    page = render(trained())
    told = re.findall(r"<summary><b>layer 5</b>.*?</details>", page, re.DOTALL)[0]
    assert "the memory carries 20 % of the mass, the original gives 40 %" in told
    said = "now rewritten; untrained 0.75; first values 0.5; trained 0.25; KL if restored 0.625"
    assert re.findall(r"<dd>training: (.*?)</dd>", told) == [said]


def test_the_first_lines_say_what_changed_and_how_far_it_moved() -> None:
    page = render(report())
    assert "<dt>Changed</dt><dd>linearize:window=256, 29 blocks</dd>" in page
    assert "<dt>Moved</dt>" in page


def test_quality_on_held_out_text_is_shown() -> None:
    page = render(trained())
    assert "Measured on held-out text" in page
    row = re.search(r"<tr><td class=\"n\">512</td>(.*?)</tr>", page)
    assert row is not None
    assert re.findall(r">([^<>]+)</td>", row.group(1)) == ["30", "31", "1.0667", "0.0123", "0.3", "0.93"]
    assert "no window of 4096 is full" in page
    assert "Measured on held-out text" not in render(report())


def test_what_has_not_been_run_is_said_first() -> None:
    made = report()
    assert made.convert is not None and "has not been run" not in render(made)
    made.convert.checks = [check for check in made.convert.checks if not check.name.startswith("lowered")]
    assert "what was lowered has not been run" in render(made).partition("<h2>")[0]


def test_limits_and_what_every_layer_loses_are_shown() -> None:
    fit = report()
    assert fit.convert is not None and "Fit to limits" not in render(fit)
    fit.convert.fit = fitted()
    page = render(fit)
    assert "sparsify:budget=256,<wbr>dense_<wbr>below=512" in page  # breaks behind a part before anywhere else
    page = page.replace("<wbr>", "")
    assert "ppl&lt;=1.05x (binds)" in page
    row = re.search(r"<tr><td class=\"n\">5</td>(.*?)</tr>", page)
    assert row is not None
    cells = re.findall(r">([^<>]+)</td>", row.group(1))
    assert cells == ["sparsify:budget=256,dense_below=512", "0.003", "0.0015", "0.001"]
    assert "KL of each feed-forward block alone" in page and "weights int8" in page
    assert "ppl&lt;=1.05x binds; given up most, nats a token: feed-forward 4 0.01, feed-forward 3 0.008" in page


def test_without_training_there_is_no_picture_of_it() -> None:
    assert not figures(render(report()))
    bare = report()
    assert bare.convert is not None
    bare.convert.curves = {}
    assert not figures(render(bare), of="context") and "<script" not in render(bare)


def test_training_of_no_step_and_one_stage_is_shown() -> None:
    other = trained()
    facts = other.passes[0].training
    assert facts is not None
    facts.choice = facts.recovery = facts.branches = None
    facts.transfer.curve.steps, facts.transfer.curve.losses = [], {}
    page = render(other)
    assert not figures(page)
    assert "Training of" in page


@pytest.mark.parametrize("points", [[], [(1, 0.0)], [(1, -1.0), (2, float("inf")), (3, float("nan"))]])
def test_what_cannot_be_drawn_is_left_out(points: list[tuple[float, float]]) -> None:
    assert charts.line_chart("losses", [charts.Line("x", points)]) == ""
    assert charts.bar_chart("scores", [charts.Bar("x", float("nan"))]) == ""


def test_lines_stay_inside_the_picture() -> None:
    points = [(step, 10.0 ** (3 - step)) for step in range(8)]
    (figure,) = figures(charts.line_chart("losses", [charts.Line("x", points), charts.Line("one", [(3, 5.0)])]))
    drawn = [point.split(",") for line in figure.findall(".//polyline") for point in line.get("points", "").split()]
    assert len(drawn) == 9
    assert all(charts.LEFT <= float(x) <= charts.RIGHT for x, _ in drawn)
    assert all(charts.TOP <= float(y) <= charts.BOTTOM for _, y in drawn)


@pytest.mark.parametrize(("low", "high"), [(0.001, 1000.0), (0.1, 0.9), (0.192, 0.195), (1.0, 2.0), (1e-9, 1e9)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    found = charts.ticks(low, high)
    assert 2 <= len(found) <= 6
    assert all(low <= tick <= high for tick in found)


def test_perplexity_is_drawn_by_position_and_recall_by_length_and_depth() -> None:
    made = trained()
    assert made.quality is not None
    positions = [one for one in figures(render(made), of="quality") if "by position" in alternative(one)]
    assert "a: a: 33 at position 256, 28.5 at position 512, lowest 28.5" in alternative(positions[0])
    maps = [one for one in figures(eval_page(recalled()), of="quality") if "passkey" in alternative(one)]
    assert len(maps) == 2
    cells = [cell for side in recalled().sides.values() for cell in side.cells if cell.task == "passkey"]
    assert sum(len(one.findall(".//rect")) for one in maps) == len(cells)
    assert "depth" in maps[0].findall(".//title")[0].text  # type: ignore[operator]
    names = [label.text for label in maps[0].findall(".//text")]
    assert {"0", "50", "100"} & set(names)


def test_an_evaluation_of_one_side_has_a_page() -> None:
    document = evaluated()
    document.sides.pop("b")
    document.by_context = []
    page = eval_page(document)
    assert "Measured on book.txt" in page and "KL mean" not in page


def test_a_report_says_where_it_comes_from() -> None:
    page = render(report())
    for told in ("b179c952", "memc 0.1.0, torch 2.13.0", "2026-11-28T13:40:00+00:00", "--recipe out/recipe.yaml"):
        assert told in page.partition("Where it comes from")[2]
    old = report()
    assert old.convert is not None
    old.convert.machine = ""
    assert "Where it comes from" not in render(old)
