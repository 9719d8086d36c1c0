"""A tiny Llama is converted and trained: what is reported, killed and gone on with, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memc import api
from memc.artifact import read_manifest
from memc.conversion.training import require_mergeable, training_data, trains
from memc.errors import MemcError
from memc.progress import Silent
from memc.recipe import Recipe, Train
from memc.report.files import PassReportFile, TrainingFacts
from memc.report.models import ConvertDocument, EvalDocument
from memc.train import loop
from tests.core.converting import ANY_TIME, make_llama
from tests.passes.tiny_program import tiny

LENGTH, TOKENS = 32, 800
SPEC = "linearize:window=6,sinks=2,feature_size=16,keep=auto:50%"
SETTINGS: dict[str, Any] = {"length": LENGTH, "guard": 0.2, "sampled": 0.25, "adapters": 2, "rate": 5e-3}


def write_text(path: Path, words: int = 2600) -> Path:
    """Write words that a model can be trained on: a walk that comes back to what it has seen."""
    path.write_text(" ".join(f"w{(i * i + i // 7) % 61}" for i in range(words)))
    return path


def convert(llama: Path, out: Path, *passes: str, **options: Any) -> ConvertDocument:
    settings = {**SETTINGS, **options.pop("train", {})}
    recipe = Recipe(recipe=1, train=Train(**settings), verify=ANY_TIME)
    data = [str(llama / "text.txt")]
    options = {"data": data, "tokens": TOKENS, "threads": 1, **options}
    return api.convert(llama, out, passes=passes or (SPEC,), backend="eager", recipe=recipe, **options)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_llama(tmp_path_factory.mktemp("llama"))
    write_text(folder / "text.txt")
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def training_of(out: Path, pass_: str = "linearize") -> tuple[PassReportFile, TrainingFacts]:
    report = PassReportFile.model_validate_json((out / "report" / f"02-{pass_}.json").read_text())
    assert report.training is not None
    return report, report.training


def test_a_trained_conversion_reports_what_it_did(llama: Path, tmp_path: Path) -> None:
    document = convert(llama, tmp_path / "out")
    report, training = training_of(tmp_path / "out")
    assert document.verified and not document.untrained and not report.untrained
    transfer, choice, recovery = training.transfer, training.choice, training.recovery
    assert transfer is not None and choice is not None and recovery is not None and training.tokens == TOKENS
    assert transfer.steps == round(0.7 * TOKENS) // LENGTH and transfer.tokens == transfer.steps * LENGTH
    assert transfer.curve.steps == list(range(1, transfer.steps + 1))
    assert set(transfer.curve.losses) == {"output", "mass", "window_dropout"}
    assert all(len(values) == transfer.steps for values in transfer.curve.losses.values())
    untrained, initial, trained = (transfer.errors[stage] for stage in ("untrained", "initial", "trained"))
    assert all(trained[layer] < untrained[layer] and initial[layer] < untrained[layer] for layer in (0, 1))
    assert choice.kept == [min(choice.kl_restored_alone, key=choice.kl_restored_alone.__getitem__)]
    assert report.spec == f"linearize:window=6,sinks=2,feature_size=16,keep=[{choice.kept[0]}]"
    assert [site.layer for site in report.sites] == [1 - choice.kept[0]]
    assert recovery.adapter_rank == 2 and recovery.tokens == recovery.steps * 2 * LENGTH
    assert recovery.guard_kl[0][0] == 0 and recovery.best_step in dict(recovery.guard_kl)
    branches = training.branches
    assert branches is not None and branches.ablation is not None and branches.ablation.tokens == 4 * (LENGTH - 6)
    assert list(branches.ablation.without) == branches.branches == ["memory", "window"]
    assert [share.layer for share in branches.shares] == [site.layer for site in report.sites]
    quality = EvalDocument.model_validate_json((tmp_path / "out" / "report" / "quality.json").read_text())
    assert quality.ablations == {report.spec: branches.ablation}
    relations = {relation.metric or relation.relation: relation for relation in report.relations}
    assert set(relations) == {"max_abs_logit_difference", "perplexity_ratio", "kl_ratio_to_window"}
    assert all(relation.passed for relation in relations.values())
    assert (relations["kl_ratio_to_window"].value or 9) <= 1 == relations["kl_ratio_to_window"].budget
    text = (tmp_path / "out" / "report" / "text.json").read_text()
    assert "text.txt" in text and not list((tmp_path / "out").glob("train-*"))


SCRIPT = """
import sys
from pathlib import Path
from tests.train.test_conversion import killable
killable(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], spec=sys.argv[4])
"""

PRUNE = "prune:amount=0.25,round=8,protect=none,sequences=6,length=32"


def killable(
    llama: Path, out: Path, stage: str, batch: int = 1, spec: str = SPEC.replace("auto:50%", "none")
) -> ConvertDocument:
    """Convert, with a checkpoint after every step; a ``stage`` kills the process after its second one."""
    torch.set_num_threads(1)
    loop.SAVE_SECONDS = -1.0
    save, done = loop.Checkpoints.save, []

    def saving(self: loop.Checkpoints, *state: Any) -> None:
        save(self, *state)
        done.append(self.key["stage"])
        if done.count(stage) == 2:
            signal.raise_signal(signal.SIGKILL)

    loop.Checkpoints.save = saving  # type: ignore[method-assign]
    try:
        return convert(llama, out, spec, tokens=900 * batch, train={"batch": batch})
    finally:
        loop.Checkpoints.save = save  # type: ignore[method-assign]
        loop.SAVE_SECONDS = 60.0


def test_a_model_without_a_tokenizer_is_trained_on_token_ids(llama: Path, tmp_path: Path) -> None:
    words = (llama / "text.txt").read_text().split()
    np.save(tmp_path / "ids.npy", [int(word[1:]) for word in words])
    bare, spec = tmp_path / "bare", SPEC.replace("auto:50%", "none")
    shutil.copytree(llama, bare, ignore=shutil.ignore_patterns("tokenizer*", "text.txt"))
    convert(llama, tmp_path / "a", spec, tokens=400)
    document = convert(bare, tmp_path / "b", spec, tokens=400, data=[str(tmp_path / "ids.npy")])
    assert document.verified and not document.untrained
    assert document.next == [f"memc report {tmp_path / 'b'}"]  # no text to generate from without a tokenizer
    first, second = (read_manifest(tmp_path / name).files["program/params.safetensors"] for name in "ab")
    assert first == second
    quality = EvalDocument.model_validate_json((tmp_path / "b" / "report" / "quality.json").read_text())
    # What is made of text is not asked; a window of 6 is too short for the rest.
    assert quality.sides["a"].perplexity and quality.warnings == [
        "recall is not measured: task copy needs 66 tokens, not 24"
    ]


def test_data_that_a_model_without_a_tokenizer_cannot_take(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the dog")
    np.save(tmp_path / "ids.npy", [0, 10_000])
    recipe = Recipe(recipe=1, data=[str(tmp_path / "ids.npy")])
    with pytest.raises(MemcError, match=r"E207 data hold a token that the model does not know .*ids: .* below \d+"):
        training_data(recipe, tiny(), tmp_path, Silent())
    recipe.data.append(str(tmp_path / "a.txt"))
    with pytest.raises(MemcError, match=r"E308 .* give token ids \(as data a \.npy file\)"):
        training_data(recipe, tiny(), tmp_path, Silent())


def test_token_ids_alone_verify(llama: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(800).reshape(20, 40) % 67)
    bare = tmp_path / "bare"
    shutil.copytree(llama, bare, ignore=shutil.ignore_patterns("tokenizer*", "text.txt"))
    document = convert(bare, tmp_path / "out", "window:window=6", tokens=0, data=[str(tmp_path / "ids.npy")])
    assert document.verified
    kept = json.loads((tmp_path / "out" / "report" / "text.json").read_text())
    assert kept["tokens"][0][:40] == list(range(40)) and "ids.npy" in kept["origin"]


@pytest.mark.parametrize(
    ("spec", "stages"),
    [(SPEC.replace("auto:50%", "none"), ("transfer", "recovery")), (PRUNE, ("recovery",))],
    ids=["linearize", "prune"],
)
def test_a_killed_training_goes_on_and_gives_the_same_bytes(tmp_path: Path, spec: str, stages: tuple[str, ...]) -> None:
    llama = make_llama(tmp_path / "model", layers=1)
    write_text(llama / "text.txt")
    root = Path(__file__).parents[2]
    for stage in stages:
        command = [sys.executable, "-c", SCRIPT, str(llama), str(tmp_path / "a"), stage, spec]
        killed = subprocess.run(
            command, capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert list((tmp_path / "a.partial" / "train-02" / stage).glob("step-*")) and not (tmp_path / "a").exists()
    killable(llama, tmp_path / "a", "", spec=spec)
    killable(llama, tmp_path / "b", "", spec=spec)
    first, second = (read_manifest(tmp_path / name).files for name in "ab")
    assert first == second and "program/params.safetensors" in first
    one, other = (training_of(tmp_path / name, spec.partition(":")[0])[1] for name in "ab")
    assert one.recovery is not None and other.recovery is not None and one.recovery.curve == other.recovery.curve
    assert one.recovery.guard_texts == other.recovery.guard_texts and one.recovery.guard_kl
    if "transfer" in stages:
        assert one.transfer is not None and other.transfer is not None
        assert one.transfer.curve == other.transfer.curve


def test_no_tokens_only_verify(llama: Path, tmp_path: Path) -> None:
    document = convert(llama, tmp_path / "out", SPEC.replace(":50%", ""), tokens=0)
    report = PassReportFile.model_validate_json((tmp_path / "out" / "report" / "02-linearize.json").read_text())
    assert document.untrained and report.training is None and [site.layer for site in report.sites] == [0, 1]
    assert "text.txt" in (tmp_path / "out" / "report" / "text.json").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data": ()}, r"keep=auto:50% is settled by training, for which there are no data .*--data FILE"),
        ({"tokens": 0}, r"keep=auto:50% is settled by training, for which tokens are 0 .*--tokens N"),
    ],
)
def test_a_share_of_layers_needs_training(llama: Path, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(MemcError, match=f"E203.*{said}"):
        convert(llama, tmp_path / "out", **options)
    assert not list(tmp_path.glob("out*"))


def test_keep_auto_without_data_linearizes_every_layer() -> None:
    recipe = Recipe(recipe=1, passes=["linearize"])
    assert not trains(recipe, recipe.build())
    with pytest.raises(MemcError, match=r"E203.*keep=auto:101%"):
        Recipe(recipe=1, passes=["linearize:keep=auto:101%"]).build()


def test_too_few_data_or_tokens_are_said_with_both_numbers(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(
        MemcError, match=r"E207 10000 tokens.*, 7500 of them from the data, which give 2080 .*--tokens 2773"
    ):
        convert(llama, tmp_path / "a", tokens=10000)
    with pytest.raises(MemcError, match=r"E207 40 tokens to train on, the first step needs 46"):
        convert(llama, tmp_path / "b", tokens=40)
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_a_source_shorter_than_a_sequence_is_trained_on_with_the_others(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    sources = {"long.npy": np.arange(600) % 30, "short.npy": np.full(9, 35), "shorter.npy": np.full(4, 36)}
    for name, ids in sources.items():
        np.save(tmp_path / name, ids)
    settings = Train(length=16, sampled=0.25, guard=0.1)
    data = [str(tmp_path / name) for name in sources]
    recipe = Recipe(recipe=1, data=data, tokens=320, train=settings)
    made = training_data(recipe, tiny(), tmp_path, Silent())
    own = made.corpus.train[0]
    assert {35, 36} <= set(own.take(0, own.tokens)[0].tolist())
    assert made.sequences.batch(0, 20).tokens.shape == (20, 16)


def test_sequences_past_the_positions_are_refused(tmp_path: Path) -> None:
    program = tiny()
    program.model = replace(program.model, absolute_positions=True, max_positions=16)
    recipe = Recipe(recipe=1, data=["x.txt"], train=Train(length=32))
    with pytest.raises(MemcError, match=r"E206 sequences of 32 tokens are past the model's 16 positions"):
        training_data(recipe, program, tmp_path, Silent())


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1.0)
    share = loop.Schedule.share
    monkeypatch.setattr(loop.Schedule, "share", lambda self, step: share(self, step) if step < 3 else float("inf"))
    with pytest.raises(MemcError, match=r"E403 a parameter is not finite at step 3 \[layer 0 model\.layers\.0"):
        convert(llama, tmp_path / "out")
    kept = tmp_path / "out.partial" / "train-02" / "transfer"
    assert [path.name for path in kept.iterdir()] == ["step-00000003"] and not (tmp_path / "out").exists()
    tensors = loop.read_tensors(kept / "step-00000003" / "state.safetensors")
    assert all(bool(value.isfinite().all()) for value in tensors.values())


def test_a_full_disk_while_checkpointing_is_said(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, tensors: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop, "write_tensors", full)
    with pytest.raises(MemcError, match=r"E502 checkpoint cannot be written: No space left.*goes on"):
        convert(llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_memory_learns_the_text_in_a_conversion(llama: Path, tmp_path: Path) -> None:
    spec = "memory_bank:kind=engram,slots=256,heads=2,row=8"
    planned = convert(llama, tmp_path / "planned", spec, dry_run=True)
    assert [facts.trains for facts in planned.passes] == [["text"]]
    with pytest.raises(MemcError) as caught:
        convert(llama, tmp_path / "merged", spec, train={"onto": "original"})
    assert caught.value.code == "E203" and "adds parameters" in caught.value.message
    document = convert(llama, tmp_path / "out", spec, train={"memory_rate": 2e-2, "accumulate": 1})
    report, training = training_of(tmp_path / "out", "memory_bank")
    assert document.verified and not document.untrained and training.transfer is None
    assert training.recovery is not None and training.recovery.onto == "memory"
    held = dict(training.recovery.guard_kl)
    assert held[training.recovery.best_step] < held[0]
    exact, ratio, kl = report.relations
    assert exact.relation == "exact" and exact.value == 0, "as it came"
    assert (ratio.metric, kl.metric) == ("perplexity_ratio", "kl_mean") and ratio.value != 1 and kl.value > 0
    plain = convert(llama, tmp_path / "plain", spec, data=[], tokens=None)
    assert plain.untrained and plain.verified


def test_what_is_another_function_is_untrained_until_it_is_trained(llama: Path, tmp_path: Path) -> None:
    spec = "sparsify:method=landmark,budget=12,page=3,sinks=1,window=1,dense_below=0"
    planned = convert(llama, tmp_path / "out", spec, dry_run=True)
    assert planned.untrained and [facts.trains for facts in planned.passes] == [["recovery"]]
    onto = Recipe(recipe=1, train=Train(onto="original"))
    with pytest.raises(MemcError, match="is trained as another function, which the original has no place for"):
        require_mergeable(onto, True, planned.passes)
    assert any(caveat.startswith(f"untrained: {spec} is another function") for caveat in planned.caveats)
    # Every parameter learns: few adapters of a random model learn so little that the last bits of a CPU decide.
    settings = {"sampled": 0, "adapters": 0, "adapter_rate": 1e-3, "accumulate": 1}
    document = convert(llama, tmp_path / "out", spec, train=settings)
    report, training = training_of(tmp_path / "out", "sparsify")
    assert document.verified and not document.untrained and not document.caveats and training.transfer is None
    assert training.recovery is not None and training.recovery.best_step > 0
    close, ratio = report.relations
    assert (close.tokens, close.passed) == (6, True) and ratio.value is not None
