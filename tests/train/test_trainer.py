"""From untrained to trained: layers chosen, killed anywhere and gone on with, every parameter trained, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from memc.errors import MemcError
from memc.passes.linearize import Linearize
from memc.pipeline import Pass
from memc.program import Program, get_tensor
from memc.progress import Silent
from memc.recipe import Train
from memc.train import Rewritten, Trainer, loop
from memc.train.device import CPU
from memc.train.guard import Guard
from memc.train.parallel import ALONE
from tests.passes.tiny_program import TARGET, tiny
from tests.train.tiny_training import LENGTH, SMALL, changed, linearized, packed, tensors_of

STEPS = 6
SETTINGS: dict[str, Any] = {"length": LENGTH, "batch": 2, "transfer": 0.6, "adapters": 2, "accumulate": 2}


def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute first values from a few sequences, and rank layers on them."""
    monkeypatch.setattr("memc.train.trainer.INITIAL", 4 * LENGTH)
    monkeypatch.setattr("memc.train.trainer.RANKED", 2 * LENGTH)


_few_tokens = pytest.fixture(autouse=True)(few_tokens)


class KilledError(Exception):
    """What a kill is to a test in one process."""


class Batches:
    """Packed batches; asking for more than ``life`` of them kills."""

    def __init__(self, life: int = 1000) -> None:
        self.life = life

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        self.life -= 1
        if self.life < 0:
            raise KilledError
        return packed(2, 100 + step)


def train(
    before: Program, keep: str, folder: Path | None = None, give: loop.Batches | None = None, **changes: Any
) -> Rewritten:
    tokens = round(STEPS * 2 * LENGTH / 0.6)
    seed, device, processes = changes.pop("seed", 0), changes.pop("device", CPU), changes.pop("processes", ALONE)
    trainer = Trainer(
        Train(**{**SETTINGS, **changes}),
        tokens,
        give or Batches(),
        Guard.of(*packed(2, 8)),
        seed,
        {"data": "d"},
        None,
        Silent(),
        processes,
        device,
    )

    def apply(pass_: Pass) -> Any:
        assert isinstance(pass_, Linearize)
        return pass_.plan(before, TARGET), *linearized(before, keep=pass_.keep)

    pass_ = Linearize(**SMALL, keep=keep)
    return trainer.train(pass_, before, apply(pass_), apply, folder)


def facts_of(trained: Rewritten) -> Any:
    """Everything in the facts but how long it took."""

    def clean(value: Any) -> Any:
        return {k: clean(v) for k, v in value.items() if k != "seconds"} if isinstance(value, dict) else value

    return clean(trained.facts.model_dump())


@pytest.mark.parametrize("adapters", [2, 0])
def test_killed_anywhere_it_comes_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapters: int) -> None:
    before = tiny()
    whole = train(before, "auto:50%", adapters=adapters)
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1.0)
    kills = 0
    while True:
        try:
            parts = train(before, "auto:50%", tmp_path / "training", Batches(life=3), adapters=adapters)
            break
        except KilledError:
            kills += 1
            assert kills < 20
    assert kills >= 3 and parts.pass_ == whole.pass_
    assert not changed(tensors_of(whole.program), tensors_of(parts.program))
    assert not changed(tensors_of(whole.transferred), tensors_of(parts.transferred))
    assert facts_of(parts) == facts_of(whole)
    guard = whole.facts.recovery.guard_kl  # type: ignore[union-attr]
    assert len(guard) > 1 and whole.facts.recovery.steps == 2  # type: ignore[union-attr]
    again = train(before, "auto:50%", tmp_path / "training", Batches(life=1), adapters=adapters)
    assert not changed(tensors_of(whole.program), tensors_of(again.program))


def test_a_kill_between_first_values_and_their_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tiny(layers=1)
    whole = train(before, "none")
    with monkeypatch.context() as patch:
        patch.setattr("memc.train.trainer.write_whole", lambda *_: (_ for _ in ()).throw(KilledError))
        with pytest.raises(KilledError):
            train(before, "none", tmp_path)
    assert not changed(tensors_of(whole.program), tensors_of(train(before, "none", tmp_path).program))


def test_training_that_stopped_early_stays_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1.0)
    before = tiny(layers=1)
    changes = {"adapter_rate": 5.0, "memory_rate": 5.0, "transfer": 0.2, "accumulate": 1}
    first, second = (train(before, "none", tmp_path, **changes).facts.recovery for _ in range(2))
    assert first is not None and second is not None
    assert first.steps < 8 and first.best_step == 0
    assert (second.steps, second.guard_kl) == (first.steps, first.guard_kl)


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    before = tiny(layers=1)
    train(before, "none", tmp_path)
    with pytest.raises(MemcError, match=r"E204.*seed 0, wanted 1"):
        train(before, "none", tmp_path, seed=1)
    with pytest.raises(MemcError, match=r"E204.*rate 0\.01, wanted 0\.02.*--fresh"):
        train(before, "none", tmp_path, rate=0.02)


@pytest.mark.parametrize(("keep", "count"), [("auto:25%", 1), ("auto", 1), ("auto:50%", 2), ("auto:0%", 0)])
def test_a_share_of_the_layers_stays(keep: str, count: int) -> None:
    before = tiny(layers=4)
    trained = train(before, keep, transfer=1.0)
    choice = trained.facts.choice
    assert choice is not None and len(choice.kept) == count and trained.facts.recovery is None
    scores = choice.kl_restored_alone
    assert choice.kept == sorted(sorted(scores, key=scores.__getitem__)[:count]) and len(scores) == 4
    assert isinstance(trained.pass_, Linearize) and trained.pass_.keep == f"[{','.join(map(str, choice.kept))}]"
    assert [site.layer for site in trained.report.sites] == [n for n in range(4) if n not in choice.kept]
    assert [skip.layer for skip in trained.report.rejections] == choice.kept
    assert not trained.report.untrained and trained.report.spec == trained.pass_.spec == trained.plan.spec
    learned = {name: value for name, value in tensors_of(trained.program).items() if name.startswith("memc.")}
    assert {int(name.split(".")[3]) for name in learned} == {site.layer for site in trained.report.sites}
    # What was transferred is what is there.
    all_of_them = tensors_of(train(before, "none", transfer=1.0).program)
    assert not changed(all_of_them, learned, learned)


def test_recovery_of_every_parameter_keeps_ties_and_says_so() -> None:
    before = tiny(layers=1)
    first = tensors_of(before)
    trained = train(before, "none", adapters=0, transfer=0.3)
    module = trained.program.module
    assert get_tensor(module, "lm_head.weight") is get_tensor(module, "model.embed.weight")
    assert not changed(first, tensors_of(before)) and not changed(first, tensors_of(trained.transferred), first)
    now = tensors_of(trained.program)
    weights = {name for name, value in first.items() if value.is_floating_point() and name != "model.inv_freq"}
    assert changed(first, now) == weights
    sources = trained.program.provenance
    assert {s.transform for n, s in sources.items() if not n.startswith("memc.")} == {"trained"}
    assert {s.transform for n, s in sources.items() if n.startswith("memc.")} == {"linearize"}
    assert not any(source.invertible for source in sources.values() if source.source)
    assert trained.program.parameter_count == trained.transferred.parameter_count


def test_only_adapted_and_new_weights_change() -> None:
    before = tiny(layers=2)
    first = tensors_of(before)
    trained = train(before, "[0]", give=lambda _: packed(2, 8), transfer=0.4, adapter_rate=1e-3, memory_rate=1e-3)
    assert trained.facts.recovery is not None and trained.facts.recovery.best_step > 0
    projections = {f"model.layers.{layer}.attention.{name}.weight" for layer in range(2) for name in "qkvo"}
    assert changed(first, tensors_of(trained.program), first) == projections
    assert not changed(first, tensors_of(trained.transferred), first) and not changed(first, tensors_of(before))
    assert all(not name.startswith("memc.adapters") for name in tensors_of(trained.program))


def test_sequences_that_teach_nothing_are_refused() -> None:
    with pytest.raises(MemcError, match=r"E203.*sequences of 24 tokens.*first 24.*length: 96"):
        before = tiny(layers=1)
        pass_ = Linearize(window=24, keep="none")
        plan = pass_.plan(before, TARGET)
        trainer = Trainer(Train(**SETTINGS), 999, Batches(), Guard.of(*packed(2, 8)), 0, {}, None, Silent())
        trainer.train(pass_, before, (plan, *pass_.apply(before, plan)), lambda _: None, None)  # type: ignore[arg-type,return-value]
