"""What pruning took away is won back: adapters on what is left, every text guarded, killed anywhere, folded exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memc.passes.prune import Prune
from memc.passes.prune.rewrite import Pruner
from memc.pipeline import Calibration, PassReport, Plan
from memc.program import Program, get_tensor
from memc.progress import Silent
from memc.recipe import Train
from memc.train import Rewritten, Trainer, loop
from memc.train import guard as guards
from memc.train.adapters import add_adapters, block_projections, fold_adapters
from memc.train.guard import Guard, GuardText, Look, best_of
from memc.verify.relations import kl_mean
from tests.passes.tiny_program import TARGET, tiny
from tests.train.test_adapters import learn, logits
from tests.train.tiny_training import LENGTH, changed, packed, tensors_of

STEPS = 12
PRUNE = Prune(amount=0.3, round=4, protect="none", sequences=8, length=LENGTH, score="wanda")
GUARD = Guard((GuardText("a", *packed(2, 8)), GuardText("b", *packed(1, 9))))


class KilledError(Exception):
    """What a kill is to a test in one process."""


def pruned(before: Program, pass_: Prune = PRUNE) -> tuple[Plan, Program, PassReport]:
    tokens, positions = packed(8, 77)
    plan = pass_.plan(before, TARGET)
    object.__setattr__(plan, "calibration", Calibration(tokens, positions, "random"))
    return plan, *pass_.apply(before, plan)


def train(
    before: Program,
    folder: Path | None = None,
    give: Callable[[int], tuple[Tensor, Tensor]] | None = None,
    guard: Guard = GUARD,
    tokens: int = STEPS * 2 * LENGTH,
    **changes: Any,
) -> Rewritten:
    settings = Train(length=LENGTH, batch=2, adapters=2, accumulate=1, **{"adapter_rate": 5e-3, **changes})
    give = give or (lambda step: packed(2, 100 + step))
    trainer = Trainer(settings, tokens, give, guard, 0, {"data": "d"}, None, Silent())
    applied = pruned(before)
    return trainer.train(PRUNE, before, applied, lambda _: applied, folder)


def check_recovered(before: Program, done: Rewritten) -> None:
    """Check that the result is nearer to the original than what was pruned, by as much as the guard says."""
    assert done.facts is not None and done.facts.recovery is not None
    first, best = done.facts.recovery.guard_kl[0][1], dict(done.facts.recovery.guard_kl)[done.facts.recovery.best_step]
    assert best < 0.9 * first
    values = [kl_mean(before, done.program, text.tokens) for text in PLAIN.texts]
    assert sum(values) / len(values) == pytest.approx(best, rel=1e-3)


def _plain(seed: int) -> tuple[Tensor, Tensor]:
    """Make text without a second document, which ``kl_mean`` knows nothing of."""
    tokens, _ = packed(2, seed)
    return tokens, torch.arange(LENGTH).repeat(2, 1)


PLAIN = Guard((GuardText("a", *_plain(8)), GuardText("b", *_plain(9))))


def test_the_divergence_falls_with_all_of_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    before = tiny()
    first = tensors_of(before)
    done = train(before, give=lambda _: PLAIN.rows, guard=PLAIN)
    assert done.facts is not None and done.facts.transfer is None and done.facts.recovery is not None
    assert done.facts.recovery.steps == STEPS and done.facts.recovery.best_step > 0
    check_recovered(before, done)
    projections = {weight for weight, _ in block_projections(done.transferred).values()}
    assert len(projections) == 2 * 7, "query, key, value and output; gate, up and down"
    assert changed(tensors_of(done.transferred), tensors_of(done.program)) == projections
    assert not changed(first, tensors_of(before)), "the original stays as it was"
    assert done.program.parameter_count == done.transferred.parameter_count < before.parameter_count
    name = "model.layers.0.mlp.down.weight" if "model.layers.0.mlp.down.weight" in first else sorted(projections)[0]
    assert done.program.provenance[name].transform.endswith("adapted")
    monkeypatch.setattr("memc.train.trainer.fold_adapters", lambda program, *_: program)
    with pytest.raises(AssertionError):
        check_recovered(before, train(before, give=lambda _: PLAIN.rows, guard=PLAIN))


def test_adapters_on_smaller_projections_fold_exactly() -> None:
    _, after, _ = pruned(tiny())
    adapted, adapters = add_adapters(after, block_projections(after), 3, 2.0, 0)
    assert torch.equal(logits(adapted), logits(after))
    learn(adapted, adapters)
    torch.testing.assert_close(logits(fold_adapters(after, adapted, adapters)), logits(adapted), atol=1e-5, rtol=1e-5)


def hurting() -> Rewritten:
    """Train towards one sequence alone at a rate that hurts every other text; the guard has both."""
    one = packed(2, 50)
    texts = Guard((GuardText("seen", *one), GuardText("other", *packed(2, 8))))
    return train(tiny(), give=lambda _: one, guard=texts, tokens=60 * 2 * LENGTH, adapter_rate=3e-2)


def test_no_text_of_the_guard_is_hurt(monkeypatch: pytest.MonkeyPatch) -> None:
    recovery = hurting().facts.recovery  # type: ignore[union-attr]
    assert recovery is not None
    assert [text.name for text in recovery.guard_texts] == ["seen", "other"]

    def hurts(facts: Any) -> bool:
        looks = [dict(text.kl) for text in facts.guard_texts]
        return any(text[facts.best_step] > text[0] + guards.SLACK for text in looks)

    assert not hurts(recovery)
    # A guard that goes by the mean alone lets a gain on one text hide what the other loses.
    monkeypatch.setattr(
        "memc.train.recovery.best_of", lambda looks: min(range(len(looks)), key=lambda i: looks[i].mean)
    )
    assert hurts(hurting().facts.recovery)  # type: ignore[union-attr]
    looks = [Look(0, (0.5, 0.1)), Look(1, (0.2, 0.15)), Look(2, (0.4, 0.1005))]
    assert best_of(looks) == 2 and min(looks, key=lambda look: look.mean).step == 1


def test_killed_anywhere_it_comes_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tiny()
    whole = train(before)
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1.0)
    kills, life = 0, 0

    def give(step: int) -> tuple[Tensor, Tensor]:
        nonlocal life
        life -= 1
        if life < 0:
            raise KilledError
        return packed(2, 100 + step)

    while True:
        try:
            life = 2
            parts = train(before, tmp_path / "training", give)
            break
        except KilledError:
            kills += 1
            assert kills < 20
    assert kills >= 2
    assert not changed(tensors_of(whole.program), tensors_of(parts.program))
    assert whole.facts is not None and parts.facts is not None
    first, second = (facts.recovery.model_dump(exclude={"seconds"}) for facts in (whole.facts, parts.facts))  # type: ignore[union-attr]
    assert first == second


def test_too_few_tokens_for_a_step_train_nothing() -> None:
    done = train(tiny(), tokens=LENGTH)
    assert done.facts is None and done.program is done.transferred


def test_nothing_removed_has_nothing_to_recover() -> None:
    before = tiny()
    pass_ = Prune(amount=0.0)
    _, report = pass_.apply(before, pass_.plan(before, TARGET))
    assert not report.trains and pruned(before)[2].trains
    assert get_tensor(Pruner(before).run([]).module, "lm_head.weight") is get_tensor(before.module, "lm_head.weight")
