"""Recovery of the whole program: KL to the original, a guard that stops it, and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from memc.errors import MemcError
from memc.pipeline import PassReport
from memc.program import Program, get_tensor
from memc.progress import Silent
from memc.train.adapters import add_adapters, attention_projections
from memc.train.guard import Guard
from memc.train.loop import Checkpoints, Schedule
from memc.train.recovery import PATIENCE, Recovery, RecoveryResult, recover
from tests.passes.tiny_program import tiny
from tests.train.tiny_training import batches, changed, linearized, packed, tensors_of, transfer

GUARD = Guard.of(*packed(3, 8))


def rewritten(layers: int = 2) -> tuple[Program, Program, PassReport]:
    before = tiny(layers=layers)
    after, report = linearized(before)
    transfer(before, after, report, steps=2)
    return before, after, report


def with_adapters(rate: float = 1e-2) -> Recovery:
    before, after, _ = rewritten()
    adapted, adapters = add_adapters(after, attention_projections(before), 4, 2.0, 0)
    return Recovery(before, adapted, dict.fromkeys([n for a in adapters for n in (a.down, a.up)], rate), accumulate=2)


def run(recovery: Recovery, steps: int, give: object = batches) -> RecoveryResult:
    schedule = Schedule(steps)
    return recover(recovery, give, GUARD, schedule, Checkpoints(None, {}), Silent())  # type: ignore[arg-type]


def test_the_divergence_falls_and_nothing_else_changes() -> None:
    recovery = with_adapters()
    first, original = tensors_of(recovery.after), tensors_of(recovery.before)
    frozen = next(name for name, _ in recovery.after.module.named_parameters() if name not in recovery.rates)
    recovery.after.module.get_parameter(frozen).requires_grad_(False)
    needed = {name: p.requires_grad for name, p in recovery.after.module.named_parameters()}
    result = run(recovery, 16, lambda _: GUARD.rows)
    assert [step for step, _ in result.guard] == [0, 2, 4, 6, 8, 10, 12, 14, 16] == [0, *result.curve.steps[1::2]]
    assert result.guard[-1][1] < 0.8 * result.guard[0][1] and result.steps == 16
    assert changed(first, tensors_of(recovery.after)) == set(recovery.rates)
    assert not changed(original, tensors_of(recovery.before))
    parameters = dict(recovery.after.module.named_parameters())
    assert {name: p.requires_grad for name, p in parameters.items()} == needed and not needed[frozen]
    assert all(p.grad is None for p in parameters.values())
    recovery.after.module.get_parameter(frozen).requires_grad_(True)


def test_flags_come_back_when_it_fails() -> None:
    recovery = with_adapters(rate=float("inf"))
    with pytest.raises(MemcError, match=r"E403.*is not finite at step 0 \[recovery"):
        run(recovery, 4)
    assert all(p.requires_grad and p.grad is None for p in recovery.after.module.parameters())


def one_word(step: int) -> tuple[Tensor, Tensor]:
    tokens, positions = batches(step)
    return torch.full_like(tokens, 5), positions


def test_it_stops_when_the_guard_gets_worse_and_keeps_the_best() -> None:
    recovery = replace(with_adapters(rate=3e-2), text=20.0)
    first = tensors_of(recovery.after)
    result = run(recovery, 80, one_word)
    values = [value for _, value in result.guard]
    best = min(range(len(values)), key=values.__getitem__)
    assert result.steps == 10 * (best + PATIENCE) < 80 and result.best == 10 * best
    assert all(value > values[best] for value in values[best + 1 :])
    assert best == 0 and not changed(first, tensors_of(recovery.after))
    assert result.curve.losses["text"][-1] < 0.5 * result.curve.losses["text"][0]


def test_the_text_counts_only_when_asked_and_only_within_a_document() -> None:
    plain, result = run(with_adapters(), 4, one_word), run(replace(with_adapters(), text=1.0), 4, one_word)
    assert plain.guard[0] == result.guard[0] and plain.guard[-1] != result.guard[-1]

    def single(step: int) -> tuple[Tensor, Tensor]:
        tokens, positions = batches(step)
        return tokens, torch.zeros_like(positions)

    # Documents of one token have no next one; padding counts for nothing.
    assert set(run(replace(with_adapters(), text=1.0), 4, single).curve.losses["text"]) == {0.0}


def test_padding_does_not_count() -> None:
    def padded(step: int) -> tuple[Tensor, Tensor]:
        tokens, positions = batches(step)
        extra = torch.full((len(tokens), 3), -1)
        return torch.cat([extra.abs() * step, tokens], 1), torch.cat([extra, positions], 1)

    found = [run(with_adapters(), 2, give).curve.losses for give in (batches, padded)]
    for name in ("kl", "text"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-3)


def test_the_best_parameters_stay() -> None:
    recovery = with_adapters()
    result = run(recovery, 8)
    name = next(iter(recovery.rates))
    again = with_adapters()
    with torch.no_grad():
        for other in again.rates:
            get_tensor(again.after.module, other).copy_(get_tensor(recovery.after.module, other))
    look = run(again, 1).guard[0][1]
    assert look == pytest.approx(min(value for _, value in result.guard), abs=1e-7) and name
