"""Block-wise transfer: what it changes, what it leaves alone, and that blocks learn alone as they do together."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from memc.analysis.gates import half_lives
from memc.errors import MemcError
from memc.program import get_tensor, set_tensor
from memc.progress import Silent
from memc.train.loop import Checkpoints, Schedule
from memc.train.transfer import Transfer
from tests.passes.tiny_program import tiny
from tests.train.tiny_training import SINKS, batches, changed, linearized, packed, tensors_of, transfer, values_of

GUARD = packed(4, 8)


@pytest.mark.parametrize(
    "options",
    [{}, {"gate": "channel", "feature": "hedgehog"}, {"form": "lizard", "sinks": 4}, {"update": "gated_delta"}],
    ids=str,
)
def test_only_what_is_new_changes_and_the_error_falls(options: dict[str, Any]) -> None:
    before = tiny()
    after, report = linearized(before, **options)
    first, original = tensors_of(after), tensors_of(before)
    start = Transfer(before, after, report.objectives).errors(*GUARD)
    after.module.zero_grad()  # the tiny programs share their parameters, which other tests leave gradients on
    made = transfer(before, after, report, steps=25)
    assert all(error < 0.95 * start[layer] for layer, error in made.errors(*GUARD).items())
    new = {name for objective in report.objectives for name in objective.parameters.values()}
    assert changed(first, tensors_of(after)) == new
    assert not changed(original, tensors_of(before))
    assert all(parameter.grad is None for parameter in after.module.parameters())


def test_training_beats_the_first_values() -> None:
    before = tiny()
    after, report = linearized(before)
    initial = transfer(before, after, report, steps=0).errors(*GUARD)
    trained = transfer(before, after, report, steps=25).errors(*GUARD)
    assert all(trained[layer] < initial[layer] for layer in initial)


def test_a_block_learns_the_same_alone() -> None:
    before = tiny(layers=3)
    together, report = linearized(before)
    transfer(before, together, report, steps=3)
    alone, report = linearized(before)
    made = Transfer(before, alone, report.objectives[1:2])
    made.initialise(*packed(4, 7))
    made.train(batches, Schedule(3), 1e-2, 0, Checkpoints(None, {}), Silent())
    names = list(report.objectives[1].parameters.values())
    assert not changed(tensors_of(together), tensors_of(alone), names)
    other, report = linearized(before)
    Transfer(before, other, report.objectives).train(batches, Schedule(3), 1e-2, 1, Checkpoints(None, {}), Silent())
    assert changed(tensors_of(together), tensors_of(other), names)


def test_no_gradient_is_left_on_the_models_own_sink_logits() -> None:
    before = tiny(sink_logits=SINKS).copy()
    set_tensor(before.module, "sink_logits", torch.tensor(SINKS), trainable=True)
    after, report = linearized(before)
    transfer(before, after, report, steps=2)
    sinks = get_tensor(after.module, "sink_logits")
    assert sinks.requires_grad and sinks.grad is None and sinks.tolist() == list(SINKS)


@pytest.mark.parametrize("update", ["gated", "gated_delta"])
@pytest.mark.parametrize("bias", [-40.0, 40.0], ids=["forget at once", "forget nothing"])
def test_gradients_are_finite_with_strong_gates(bias: float, update: str) -> None:
    before = tiny(layers=1)
    after, report = linearized(before, update=update)
    (objective,) = report.objectives
    made = Transfer(before, after, report.objectives)
    with torch.no_grad():
        get_tensor(after.module, objective.parameters["gate_bias"]).fill_(bias)
        get_tensor(after.module, objective.parameters["gate_weight"]).normal_(
            generator=torch.Generator().manual_seed(0)
        )
        get_tensor(after.module, objective.parameters["mass_bias"]).fill_(3.0)
    curve = made.train(batches, Schedule(5), 1e-2, 0, Checkpoints(None, {}), Silent())
    assert curve.steps == [1, 2, 3, 4, 5] and set(curve.losses) == {"output", "mass", "window_dropout"}


@pytest.mark.parametrize(("rate", "said"), [(float("inf"), "a parameter"), (1e-2, "loss")])
def test_a_loss_that_breaks_names_layer_and_step(rate: float, said: str) -> None:
    before = tiny()
    after, report = linearized(before)
    made = Transfer(before, after, report.objectives)
    if said == "loss":
        with torch.no_grad():
            get_tensor(after.module, report.objectives[1].parameters["mass_bias"])[0] = float("nan")
    layer = 1 if said == "loss" else 0
    with pytest.raises(MemcError, match=f"E403.*{said} is not finite at step 0 \\[layer {layer} model.layers.{layer}"):
        made.train(batches, Schedule(5), rate, 0, Checkpoints(None, {}), Silent())


def test_errors_by_position_add_up_to_those_of_all() -> None:
    before = tiny()
    after, report = linearized(before)
    made = Transfer(before, after, report.objectives)
    tokens, positions = packed(2, seed=8, length=40)
    found = made.errors_by_position(tokens, positions)
    target = values_of(before, tokens, positions)[report.objectives[1].target].float().square().sum((0, 1, 3))
    squares = [target[part.start : part.end].sum() for part in found[1]]
    assert [(part.start, part.end) for part in found[1]] == [(0, 2), (2, 4), (4, 8), (8, 16), (16, 32), (32, 40)]
    exact = report.objectives[1].exact
    assert all(part.error < 1e-6 for part in found[1] if part.end <= exact) and found[1][-1].error > 1e-4
    output = made.blocks[1](values_of(before, tokens, positions))[0].float()
    off = (output - values_of(before, tokens, positions)[report.objectives[1].target].float()).square().sum()
    total = sum(float(part.error * square) for part, square in zip(found[1], squares, strict=True))
    assert total == pytest.approx(float(off), rel=1e-3)


def test_gates_are_counted_by_their_half_lives() -> None:
    program, _ = linearized(tiny())
    parameters = dict(program.module.named_parameters())
    for name, life in (("0", 512.0), ("1", 3.0)):
        bias = parameters[f"memc.linearize.layers.{name}.gate_bias"]
        bias.data.fill_(-math.log(math.expm1(math.log(2) / life)))
        parameters[f"memc.linearize.layers.{name}.gate_weight"].data.zero_()
    first, second = half_lives(program, packed(1, seed=3, length=20)[0])
    assert [one.path for one in (first, second)] == [f"model.layers.{n}.attention" for n in (0, 1)]
    assert sum(first.shares.values()) == pytest.approx(1) and set(first.shares) <= {8, 9}
    assert second.shares == {1: 1.0}
    for name in ("0", "1"):
        parameters[f"memc.linearize.layers.{name}.gate_bias"].data.fill_(80.0)
    assert half_lives(program, packed(1, seed=3, length=20)[0])[0].shares == {16: 1.0}
    assert half_lives(tiny(), packed(1, seed=3, length=20)[0]) == []
