"""What an analysis keeps stays when a model is pruned, by its scores the lowest go, and other models' are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from memc.analysis.methods import parse_analysis
from memc.errors import MemcError
from memc.passes.prune import Prune
from memc.pipeline import parse_spec
from memc.progress import Silent
from memc.raising import find_blocks
from memc.report import models as m
from memc.report.facts import ModelFacts
from tests.passes.pruning import fake, prune, text
from tests.passes.tiny_program import TARGET, tiny

HIDDEN, HEADS = 28, 4


def document(**changes: Any) -> m.AnalysisDocument:
    """An imagined analysis of the tiny model: channels 0 to 5 and head 2 of layer 0 are kept, nothing of layer 1."""
    units = [
        m.UnitFacts(layer=block.layer, path=block.path, kind=kind, kv_heads=kv, scores=scores, kept=kept)
        for block in find_blocks(tiny())
        for kind, kv, scores, kept in (
            ("attention", 2, [0.4, 0.1, 0.3, 0.1], [] if block.layer else [2]),
            ("feed_forward", 0, [float(-unit) for unit in range(HIDDEN)], [] if block.layer else [*range(6)]),
        )
        if block.kind == kind
    ]
    model = ModelFacts(source="tiny", parameters=1, family="tiny")
    return m.AnalysisDocument(method="bigram", model=model, text="", units=units).model_copy(update=changes)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "analysis.json"
    path.write_text(document().to_json())
    return str(path)


@pytest.mark.parametrize("score", ["obs", "wanda", "magnitude", "flap"])
def test_kept_channels_stay_whatever_the_score(file: str, score: str) -> None:
    program = tiny()
    options = {"unit": "ffn", "amount": 0.3, "score": score}
    _, before = prune(program, text(32), **options)
    _, report = prune(program, text(32), **options, analysis=file)
    assert {*before.details["0"]["ffn_channels_removed"]} & {*range(6)}
    assert not {*report.details["0"]["ffn_channels_removed"]} & {*range(6)}
    assert report.details["0"]["protected_channels"] == [*range(6)] and "protected_channels" not in report.details["1"]
    assert report.details["total"]["removed_parameters"] == before.details["total"]["removed_parameters"]


def test_a_key_value_head_stays_with_any_head_that_reads_it(file: str) -> None:
    _, report = prune(tiny(), text(32), unit="heads", amount=0.29, score="wanda", analysis=file)
    assert report.details["0"]["protected_heads"] == [1] and report.details["0"]["kv_groups_removed"] == [0]


@pytest.mark.parametrize("refit", [True, False])
def test_by_scores_the_lowest_go(file: str, refit: bool) -> None:
    calibration = text(32) if refit else None
    _, report = prune(tiny(), calibration, unit="ffn", amount=0.3, score="analysis", analysis=file, refit=refit)
    for layer in "01":
        removed = report.details[layer]["ffn_channels_removed"]
        assert removed == [*range(HIDDEN - len(removed), HIDDEN)]
    _, report = prune(tiny(), calibration, unit="heads", amount=0.29, score="analysis", analysis=file, refit=refit)
    assert report.details["0"]["kv_groups_removed"] == [1]  # 0.3 + 0.1 is less than 0.4 + 0.1
    assert Prune(score="analysis", analysis=file, refit=False).calibrates() is None


def test_blocks_with_kept_units_do_not_go_whole(file: str) -> None:
    program = tiny()
    for unit, kind in (("attention_blocks", "attention"), ("ffn_blocks", "feed_forward")):
        _, report = prune(program, text(4), unit=unit, amount=0.15, analysis=file, of="model")
        assert [(site.layer, site.kind) for site in report.sites] == [(1, kind)]
        assert [(one.layer, one.code) for one in report.rejections] == [(0, "protected")]


def test_key_channels_of_a_block_with_kept_heads_stay(file: str) -> None:
    options = {"amount": 0.4, "round": 2, "protect": "none", "protect_heads": "none", "analysis": file}
    plan = Prune(unit="key_channels", **options).plan(tiny(), TARGET)
    assert [(site.layer, site.kind) for site in plan.sites] == [(1, "attention")]
    assert [(one.layer, one.code) for one in plan.rejections] == [(0, "protected")]
    with pytest.raises(MemcError, match="E203 score=analysis says nothing of unit=key_channels"):
        Prune(unit="key_channels", score="analysis", analysis=file)


def test_as_many_stay_as_are_kept(file: str, tmp_path: Path) -> None:
    with pytest.raises(MemcError, match=r"E203.*no legal shape"):
        prune(tiny(), text(32), unit="ffn", amount=0.7, analysis=file)
    made = document()
    for one in made.units:
        one.kept = [*range(len(one.scores))]
    whole = tmp_path / "whole.json"
    whole.write_text(made.to_json())
    plan = Prune(round=4, protect="none", protect_heads="none", unit="ffn", amount=0.2, analysis=str(whole)).plan(
        fake(tiny()), TARGET
    )
    assert not plan.sites and {one.code for one in plan.rejections} == {"protected"}


def test_what_was_measured_can_be_pruned_by(tmp_path: Path) -> None:
    program, path = tiny(), tmp_path / "heads.json"
    path.write_text(parse_analysis("heads:prompts=8,share=0.5").run(program, None, Silent()).to_json())
    pruned, report = prune(program, text(32), unit="heads", amount=0.1, score="analysis", analysis=str(path))
    assert torch.isfinite(pruned.run(text(2).tokens)).all()
    assert report.details["total"]["chosen_by"] == "analysis"
    with pytest.raises(MemcError, match=r"E203.*no scores.*unit=heads"):
        prune(program, text(32), unit="ffn", amount=0.2, score="analysis", analysis=str(path))
    spec = f"prune:unit=heads,analysis={path}"
    assert parse_spec(spec).spec == spec


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read"),
        ("{", "no analysis"),
        (document(units=document().units[:1]).to_json().replace("model.layers.0", "layers.0"), "another model"),
        (document().to_json().replace("0.4,", "0.4, 0.5,"), "another model"),
        (document().to_json().replace("memc.analysis/1", "memc.analysis/0"), "no analysis"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, content: str | None, reason: str) -> None:
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(MemcError, match=f"E203.*{reason}"):
        prune(tiny(), text(32), unit="ffn", amount=0.2, analysis=str(path))


def test_scores_of_a_file_need_one_and_tell_no_layers_apart(file: str) -> None:
    with pytest.raises(MemcError, match=r"E203.*analysis=FILE"):
        Prune(score="analysis")
    with pytest.raises(MemcError, match=r"E203.*says nothing of unit=layers"):
        Prune(unit="layers", score="analysis", analysis=file)
