"""Models are pruned and become verified artifacts: calibration from data or sampled, both backends, int8."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import memc
from memc import api
from memc.conversion.calibration import CalibrationText
from memc.conversion.training import training_data
from memc.errors import MemcError
from memc.progress import Advance, Silent
from memc.recipe import Recipe, Train, load_recipe
from memc.report.files import PassReportFile
from memc.report.html import render
from memc.report.models import ConvertDocument
from memc.report.read import read_report
from memc.report.terminal import convert_view
from memc.verify import sample_text
from tests.cli.test_views import text_of
from tests.core.converting import ANY_TIME, make_llama
from tests.passes.tiny_program import tiny
from tests.train.test_conversion import write_text

SPEC = "prune:amount=0.25,round=8,protect=none,sequences=6,length=32"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_llama(tmp_path_factory.mktemp("llama"))
    write_text(folder / "text.txt")
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with biases and fused projections stored the other way round, and the Llama's tokenizer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=67, n_embd=24, n_inner=40, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
    )
    model = GPT2LMHeadModel(config)
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(value, std=0.1)
    model.save_pretrained(folder)
    shutil.copyfile(make_llama(tmp_path_factory.mktemp("tokens")) / "tokenizer.json", folder / "tokenizer.json")
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def convert(model: Path, out: Path, *passes: str, data: list[str] | None = None, **options: Any) -> ConvertDocument:
    recipe = Recipe(recipe=1, train=Train(length=32, guard=0.2), verify=ANY_TIME)
    options = {"threads": 1, "backend": "eager", **options}
    return api.convert(model, out, passes=passes or (SPEC,), recipe=recipe, data=data or [], **options)


def report_of(out: Path) -> PassReportFile:
    return PassReportFile.model_validate_json((out / "report" / "02-prune.json").read_text())


@pytest.mark.parametrize("weights", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_pruned_model_is_lowered_and_verified(
    name: str, weights: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model: Path = request.getfixturevalue(name)
    document = convert(model, tmp_path / "out", backend="onnx", weights=weights)
    assert document.verified and not document.untrained
    assert document.measured is not None and document.original is not None
    report = report_of(tmp_path / "out")
    removed = report.details["total"]["removed_parameters"]
    biases = report.details["total"]["new_bias_parameters"]
    assert document.measured.parameters == document.original.parameters - removed + biases
    assert document.measured.parameters == document.predicted.parameters, "what the dry run says is what comes out"
    assert (biases == 0) == (name == "gpt2")
    assert report.details["total"]["calibration"].endswith("sampled from the original")
    assert [relation.metric for relation in report.relations] == ["perplexity_ratio"]
    logits = memc.load(tmp_path / "out").logits(np.arange(20).reshape(2, 10))
    assert np.isfinite(logits).all()


def test_heads_states_and_both_backends(llama: Path, tmp_path: Path) -> None:
    spec = "prune:amount=0.5,round=8,protect=none,sequences=6,length=32"
    outs = [tmp_path / "eager", tmp_path / "onnx"]
    for out in outs:
        document = convert(llama, out, spec, "window:window=8,sinks=2", backend=out.name)
        assert document.verified and document.original is not None
        kept = report_of(out).state_bytes[512] / document.original.state_bytes[512]
        assert 0.5 < kept < 0.6, "half of the heads, and the positions"
    assert report_of(outs[0]).details == report_of(outs[1]).details, "the choice is the same whenever it is made"
    assert report_of(outs[0]).details["0"]["kv_groups"] == "2 -> 1"
    tokens = np.arange(24).reshape(2, 12)
    first, second = (memc.load(out).logits(tokens) for out in outs)
    assert np.abs(first - second).max() < 1e-3


def test_data_calibrate_but_for_what_verifies(llama: Path, tmp_path: Path) -> None:
    data = str(llama / "text.txt")
    document = convert(llama, tmp_path / "out", data=[data], tokens=0)
    assert document.verified
    origin = report_of(tmp_path / "out").details["total"]["calibration"]
    assert origin == f"192 tokens: {data}"
    text = json.loads((tmp_path / "out" / "report" / "text.json").read_text())
    assert "held-out" in text["origin"]
    place = tmp_path / "place"
    place.mkdir()
    (place / "tokenizer.json").write_bytes((llama / "tokenizer.json").read_bytes())
    recipe = Recipe(recipe=1, data=[data], train=Train(length=32, guard=0.2))
    source = CalibrationText(recipe, tiny(vocab=67), place, Silent())
    shown = {tuple(row) for row in source(1000, 32).tokens.tolist()}
    held = source.held_out()
    assert held is not None and held.tokens.tolist() == text["tokens"]
    assert not shown & {tuple(row) for row in held.tokens.tolist()}


def recovered(model: Path, out: Path, tokens: int = 1200, **options: Any) -> ConvertDocument:
    settings = {"length": 32, "guard": 0.2, "adapters": 2, "adapter_rate": 5e-3, "sampled": 0.25}
    recipe = Recipe(recipe=1, train=Train.model_validate(settings), verify=ANY_TIME)
    data = [str(model / "text.txt"), str(model / "more.txt")]
    options = {"threads": 1, "backend": "eager", "passes": [SPEC], **options}
    return api.convert(model, out, recipe=recipe, data=data, tokens=tokens, **options)


def test_what_was_pruned_is_recovered_on_data(llama: Path, tmp_path: Path) -> None:
    (llama / "more.txt").write_text(" ".join(f"w{(i * 7 + i // 5) % 61}" for i in range(700)))
    planned = recovered(llama, tmp_path / "out", dry_run=True)
    assert [facts.trains for facts in planned.passes] == [["recovery"]]
    document = recovered(llama, tmp_path / "out")
    report = report_of(tmp_path / "out")
    assert document.verified and not document.untrained and report.training is not None
    recovery = report.training.recovery
    assert report.training.transfer is None and recovery is not None and report.training.branches is None
    assert recovery.steps == 1200 // (32 * 2) and recovery.tokens == recovery.steps * 2 * 32 and recovery.best_step > 0
    assert recovery.guard_kl[-1][1] < recovery.guard_kl[0][1]
    names = [Path(text.name).name for text in recovery.guard_texts]
    assert names[:2] == ["text.txt", "more.txt"] and names[2:] == ["sampled from the original"]
    plain = recovered(llama, tmp_path / "plain", tokens=0)
    assert plain.verified and report_of(tmp_path / "plain").training is None
    # What is said of the pass is said of what came out of it.
    tokens = np.array(json.loads((tmp_path / "out" / "report" / "text.json").read_text())["tokens"])
    (relation,) = report.relations
    (check,) = [check for check in document.checks if check.name == "perplexity_ratio"]
    assert relation.value == pytest.approx(check.value, rel=1e-6) and tokens.shape[1] == 32
    said = text_of(convert_view(document), 400)
    assert f"of {llama / 'more.txt'}" in said and "adapters of rank 2" in said and "transfer" not in said
    assert "would be trained: recovery" in text_of(convert_view(planned), 400)
    page = render(read_report(tmp_path / "out"))
    assert "KL on each held-out text" in page and "Loss of transfer" not in page


def test_calibration_and_guard_have_nothing_in_common(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    rng, texts = np.random.default_rng(0), [tmp_path / "large.npy", tmp_path / "small.npy", tmp_path / "other.npy"]
    for path, size in zip(texts, (2600, 45, 700), strict=True):  # the second is too short to hold anything out
        np.save(path, rng.integers(0, 67, size))
    settings = Train(length=32, guard=0.2, adapters=2)
    recipe = Recipe(recipe=1, data=list(map(str, texts)), train=settings, tokens=600)
    data = training_data(recipe, tiny(vocab=67), tmp_path, Silent(), transfers=False)
    shown = CalibrationText(recipe, tiny(vocab=67), tmp_path, Silent())(1000, 32)
    apart = [*data.guard.rows[0].tolist(), *data.text.tokens.tolist()]
    stretches = {tuple(row[i : i + 8]) for row in shown.tokens.tolist() for i in range(25)}
    assert len(data.guard.texts) == 3 and not [
        row for row in apart if {tuple(row[i : i + 8]) for i in range(25)} & stretches
    ]
    assert not {tuple(row) for row in data.guard.rows[0].tolist()} & {tuple(row) for row in data.text.tokens.tolist()}


def test_a_long_sequence_is_joined_from_sampled_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("memc.conversion.calibration.PIECE", 8)
    (tmp_path / "report").mkdir()
    program, seen = tiny(vocab=67), list[int]()

    class Watched(Silent):
        @contextmanager
        def step(self, title: str, total: int | None = None) -> Iterator[Advance]:
            assert "3 sequences of 20 tokens" in title and total == 6
            yield lambda count, text="": seen.append(count)

    shown = CalibrationText(Recipe(recipe=1, seed=5), program, tmp_path, Watched())(3, 20).tokens
    pieces = sample_text(program, 6, sequences=9, length=7).tokens
    assert shown.tolist() == pieces.reshape(3, 21)[:, :20].tolist()
    assert seen == [1] * 6


def test_a_dry_run_needs_no_text(llama: Path, tmp_path: Path) -> None:
    document = convert(llama, tmp_path / "out", dry_run=True)
    assert document.dry_run and document.original is not None
    assert document.predicted.parameters < document.original.parameters
    assert not (tmp_path / "out").exists()


def test_the_time_of_converting_counts_what_is_looked_at_and_trained_on(llama: Path, tmp_path: Path) -> None:
    text = str(write_text(tmp_path / "text.txt", 4000))

    def seconds(sequences: int, **options: Any) -> float:
        spec = f"prune:amount=0.2,unit=ffn,round=8,protect=none,sequences={sequences},length=32"
        return convert(llama, tmp_path / "out", spec, dry_run=True, data=[text], **options).predicted.seconds or 0.0

    least = seconds(1, tokens=0)
    assert seconds(1001, tokens=0) - least == pytest.approx(4 / 5 * (seconds(1, tokens=32_000) - least))
    assert seconds(1, tokens=32_000) > least


def test_too_little_data_is_refused(llama: Path, tmp_path: Path) -> None:
    short = write_text(tmp_path / "short.txt", 70)
    with pytest.raises(MemcError, match="E207"):
        convert(llama, tmp_path / "out", data=[str(short)])


def test_a_budget_of_the_recipe_is_kept_to(llama: Path, tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"recipe": 1, "verify": {"budgets": {"perplexity_ratio": 1.0001}}})
    spec = "prune:amount=0.5,round=8,protect=none,refit=false,score=magnitude"
    with pytest.raises(MemcError, match=r"E401 Bounded does not hold: perplexity_ratio"):
        api.convert(llama, tmp_path / "out", passes=[spec], recipe=recipe, backend="eager", threads=1)


def test_what_was_freed_is_spent_on_a_memory(tmp_path: Path) -> None:
    model = make_llama(tmp_path, layers=4, hidden=768)
    settings = Train(length=32, guard=0.2, adapters=2, memory_rate=3e-2)
    recipe = load_recipe("prune-then-remember").model_copy(update={"train": settings, "verify": ANY_TIME})
    options: dict[str, Any] = {"recipe": recipe, "data": [str(write_text(tmp_path / "text.txt", 7000))], "tokens": 1200}
    options |= {"threads": 1, "backend": "eager", "passes": []}
    document = api.convert(model, tmp_path / "out", **options)
    assert document.verified and not document.untrained
    assert document.measured is not None and document.original is not None
    parameters = document.original.parameters
    assert 0.98 * parameters < document.measured.parameters <= parameters
    assert document.measured.parameters == document.predicted.parameters, "what the dry run says is what comes out"
    pruned = report_of(tmp_path / "out")
    report = PassReportFile.model_validate_json((tmp_path / "out" / "report" / "03-memory_bank.json").read_text())
    total, before = report.details["total"], pruned.details["total"]
    assert total["freed_parameters"] == before["removed_parameters"] - before["new_bias_parameters"]
    assert total["spent_parameters"] == report.new_parameters <= total["freed_parameters"]
    assert parameters - document.measured.parameters == total["freed_parameters"] - total["spent_parameters"]
    assert pruned.training is not None and report.training is not None and report.training.recovery is not None
    losses = report.training.recovery
    assert losses.steps == 1200 // (32 * 2) and losses.best_step > 0, "the memory learned some of the text"
    said = text_of(convert_view(document), 400)
    assert "the memory alone" in said and "adapters of rank 2" in said
