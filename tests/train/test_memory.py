"""Memories are taught the text, all else frozen: less loss, the original untouched, killed anywhere, one result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memc.passes.memory_bank import MemoryBank
from memc.pipeline import Pass
from memc.program import Program
from memc.progress import Silent
from memc.recipe import Train
from memc.relation import Bounded, Exact
from memc.report.training import fact_rows
from memc.train import Rewritten, Trainer, loop
from memc.train.guard import OWN, Guard, GuardText
from tests.passes.tiny_program import TARGET, tiny
from tests.train.tiny_training import LENGTH, changed, tensors_of

STEPS = 24
PASSES: dict[str, Pass] = {
    "pkm": MemoryBank(kind="pkm", slots=64, heads=2, top=4, row=8),
    "engram": MemoryBank(kind="engram", slots=200, heads=2, row=8),
    "head": MemoryBank(kind="head", depth=2),
}


class KilledError(Exception):
    """What a kill is to a test in one process."""


def text(seed: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    """A text that its last two tokens tell the next one of."""
    tokens = torch.randint(3, 15, (batch, LENGTH), generator=torch.Generator().manual_seed(seed))
    for at in range(2, LENGTH):
        tokens[:, at] = 3 + (5 * tokens[:, at - 1] + 3 * tokens[:, at - 2]) % 12
    return tokens, torch.arange(LENGTH).repeat(batch, 1)


GUARD = Guard((GuardText("a", *text(1)),))


def train(
    kind: str, before: Program, folder: Path | None = None, give: Callable[[int], Any] | None = None
) -> Rewritten:
    settings = Train(length=LENGTH, batch=2, accumulate=1, memory_rate=2e-2)
    give = give or (lambda step: text(100 + step))
    trainer = Trainer(settings, STEPS * 2 * LENGTH, give, GUARD, 0, {"data": "d"}, None, Silent())
    pass_ = PASSES[kind]
    plan = pass_.plan(before, TARGET)
    applied = plan, *pass_.apply(before, plan)
    return trainer.train(pass_, before, applied, lambda _: applied, folder)


@pytest.mark.parametrize("kind", PASSES)
def test_what_is_taught_is_the_memory_alone(kind: str) -> None:
    before = tiny()
    first = tensors_of(before)
    done = train(kind, before)
    assert done.facts is not None and done.facts.recovery is not None
    looks = dict(done.facts.recovery.guard_kl)
    assert looks[done.facts.recovery.best_step] < 0.9 * looks[0]
    assert not changed(first, tensors_of(before)) and not changed(first, tensors_of(done.program), first)
    came, learned = tensors_of(done.transferred), tensors_of(done.program)
    assert changed(came, learned) == set(done.report.learns)
    tokens, _ = text(9)
    assert torch.equal(done.transferred.run(tokens), before.run(tokens)), "what came is as it came"
    assert not torch.equal(done.program.run(tokens), before.run(tokens))
    assert not done.report.untrained
    assert done.report.relations == (Exact(), Bounded("perplexity_ratio", None), Bounded("kl_mean", None))
    rows = dict(fact_rows(done.facts))
    assert "the memory alone" in rows["recovery"] and "cross-entropy on held-out text" in rows


def test_what_the_original_wrote_does_not_hold_the_lesson_back() -> None:
    """Of its own text the original knows most, so that learning any other makes that one worse."""
    own = GuardText(OWN, *text(1))
    guard = Guard((GuardText("a", *text(1)), own))
    assert guard.given.names == ("a",) and Guard((own,)).given.names == (OWN,)


def test_a_killed_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    whole = tensors_of(train("engram", tiny(), tmp_path / "whole").program)

    def killed(step: int) -> tuple[Tensor, Tensor]:
        if step == 9:
            raise KilledError
        return text(100 + step)

    with pytest.raises(KilledError):
        train("engram", tiny(), tmp_path / "cut", killed)
    asked: list[int] = []

    def give(step: int) -> tuple[Tensor, Tensor]:
        asked.append(step)
        return text(100 + step)

    again = tensors_of(train("engram", tiny(), tmp_path / "cut", give).program)
    assert min(asked) == 9 and not changed(whole, again)
