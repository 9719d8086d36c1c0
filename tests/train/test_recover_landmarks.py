"""Landmark attention is another function: adapters around it learn what the original predicts."""

from __future__ import annotations

from typing import Any

import pytest

from memc.errors import MemcError
from memc.passes.sparsify import Sparsify
from memc.progress import Silent
from memc.recipe import Train
from memc.train import Rewritten, Trainer
from memc.train.adapters import attention_projections
from memc.train.guard import Guard, GuardText
from tests.passes.tiny_program import TARGET, tiny
from tests.train.tiny_training import LENGTH, changed, packed, tensors_of

LANDMARKS: dict[str, Any] = {"method": "landmark", "budget": 12, "page": 3, "sinks": 1, "window": 1, "dense_below": 0}


def train(**options: Any) -> tuple[Any, Rewritten]:
    before, pass_ = tiny(), Sparsify(**{**LANDMARKS, **options})
    plan = pass_.plan(before, TARGET)
    applied = plan, *pass_.apply(before, plan)
    settings = Train(length=LENGTH, batch=2, adapters=2, accumulate=1, adapter_rate=5e-3)
    guard = Guard((GuardText("a", *packed(2, 8)),))
    trainer = Trainer(settings, 12 * 2 * LENGTH, lambda _: guard.rows, guard, 0, {"data": "d"}, None, Silent())
    return before, trainer.train(pass_, before, applied, lambda _: applied, None)


def test_adapters_on_the_attention_fit_the_model_to_landmarks() -> None:
    before, done = train()
    assert not done.report.untrained and done.facts is not None
    assert done.facts.transfer is None, "there are no parameters to transfer to"
    recovery = done.facts.recovery
    assert recovery is not None and recovery.steps == 12, "with all of the tokens"
    assert dict(recovery.guard_kl)[recovery.best_step] < 0.9 * recovery.guard_kl[0][1]
    projections = {weight for weight, _ in attention_projections(before).values()}
    assert len(projections) == 2 * 4
    assert changed(tensors_of(done.transferred), tensors_of(done.program)) == projections


def test_sequences_that_are_exact_teach_nothing() -> None:
    with pytest.raises(MemcError, match=f"E203 sequences of {LENGTH} tokens teach nothing, the first 30 are exact"):
        train(dense_below=30)
