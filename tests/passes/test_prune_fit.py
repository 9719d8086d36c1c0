"""Which units of a group go, by every score, and how what is left is fitted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from memc.passes.prune import scores
from memc.passes.prune.choice import Task
from memc.passes.prune.eliminate import eliminate
from memc.passes.prune.groups import Group, Groups, Kind
from memc.passes.prune.moments import Moments
from memc.passes.prune.refit import compensate, refit
from memc.passes.prune.rewrite import Cut, Pruner
from memc.pipeline import Calibration
from memc.program import Program, named_tensors
from memc.raising.feed_forward import linear_input
from tests.core.test_families import raised
from tests.passes.pruning import (
    entries,
    exit_weight,
    feed_forward,
    fit_of,
    heads,
    least_error,
    prune,
    text,
    values,
)
from tests.passes.tiny_program import tiny, tokens_of


@pytest.mark.parametrize("score", ["wanda", "flap", "activation", "magnitude", "taylor", "2ssp"])
def test_the_lowest_scores_go(score: str) -> None:
    program, calibration = tiny(), text()
    group = feed_forward(program, 1)
    x = entries(program, group, calibration)
    w = program.module.get_parameter("model.layers.1.mlp.down.weight").detach().double()
    if score == "taylor":
        expected = naive_taylor(program, group, calibration)
    else:
        names = [f"model.layers.1.mlp.{name}.weight" for name in ("up", "gate")]
        rows = sum(program.module.get_parameter(name).detach().double().square().sum(1) for name in names)
        expected = {
            "wanda": w.abs().sum(0) * x.square().mean((0, 1)).sqrt(),
            "flap": x.flatten(0, 1).var(0, correction=0) * w.square().sum(0),
            "activation": x.abs().mean(1).square().sum(0).sqrt(),
            "2ssp": x.norm(dim=1).mean(0),
            "magnitude": (rows + w.square().sum(0)).sqrt(),
        }[score]
    _, report = prune(program, calibration, score=score, unit="ffn", refit=False)
    removed = report.details["1"]["ffn_channels_removed"]
    assert removed == sorted(expected.argsort()[: len(removed)].tolist()) and removed


def naive_taylor(program: Program, group: Group, calibration: Calibration) -> Tensor:
    """|sum_i W_ij dL/dW_ij|, a sequence at a time: the same as a gate's gradient."""
    weight = program.module.get_parameter("model.layers.1.mlp.down.weight")
    total = torch.zeros(weight.shape[1], dtype=torch.float64)
    for row in calibration.tokens:
        logits = program.run(row[None])[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], row[1:])
        (gradient,) = torch.autograd.grad(loss, weight)
        total += (weight * gradient).sum(0).abs().double()
    return total


def test_taylor_leaves_no_gradients_behind() -> None:
    program = tiny()
    program.module.zero_grad()  # the tiny programs share their parameters, which other tests leave gradients on
    scores.taylor(program, [feed_forward(program)], text(2))
    assert all(parameter.grad is None for parameter in program.module.parameters())


def test_heads_go_by_the_sum_over_their_channels() -> None:
    program, calibration = tiny(), text()
    groups = Groups(program)
    group = groups.of(groups.blocks[0], "kv_groups")
    x = entries(program, group, calibration)
    w = program.module.get_parameter("model.layers.0.attention.o.weight").detach().double()
    channels = w.abs().sum(0) * x.square().mean((0, 1)).sqrt()
    expected = channels.reshape(2, -1).sum(1).argmin()
    result, report = prune(program, calibration, unit="heads", amount=0.28, score="wanda")
    assert report.details["0"]["kv_groups_removed"] == [int(expected)]
    assert result.states[0].shape[1] == 1


@pytest.mark.parametrize(("kv_heads", "kind"), [(2, "ffn_channels"), (4, "kv_groups"), (2, "query_heads")])
def test_what_the_best_fit_misses_least_goes_first(kv_heads: int, kind: Kind) -> None:
    program, calibration = tiny(kv_heads=kv_heads), text()
    groups = Groups(program)
    group = groups.of(next(b for b in groups.blocks if (b.kind == "attention") == (kind != "ffn_channels")), kind)
    x, weight = entries(program, group, calibration).flatten(0, 1), exit_weight(program, group)
    moments = Moments(len(group.columns), gram=True, where="")
    moments.update(x)
    expected = set[int]()
    for index in range(2):
        row = {unit // 2 for unit in expected} if kind == "query_heads" else set()
        left = [unit for unit in range(group.units) if unit not in expected and unit // 2 not in row]
        errors = {
            unit: least_error(moments, weight, ~torch.isin(group.columns, torch.tensor([*expected, unit])))
            for unit in left
        }
        expected.add(min(left, key=errors.__getitem__))
        assert len(expected) == index + 1
    assert eliminate(Task(group, 2), weight, moments) == tuple(sorted(expected))


def test_the_refit_is_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator) @ torch.randn(12, 12, generator=generator) + 2.0
    weight, bias = torch.randn(5, 12, generator=generator), torch.randn(5, generator=generator)
    kept = torch.arange(12) % 3 > 0
    target = x @ weight.T + bias
    moments = Moments(12, gram=True, where="", targets=5)
    moments.update(x[:150], target[:150])
    moments.update(x[150:], target[150:])

    def error(fit: Any) -> float:
        found = x[:, kept].double() @ fit.weight.double().T + fit.bias.double()
        return float((found - target.double()).square().mean())

    found, biased = refit(weight, moments, kept), compensate(weight, bias, moments, kept)
    design = torch.cat([x[:, kept], torch.ones(400, 1)], 1).double()
    best = torch.linalg.lstsq(design, target.double()).solution
    least = float((design @ best - target).square().mean())
    assert least <= error(found) < 1.001 * least
    assert error(found) < 0.9 * error(biased)
    assert torch.equal(biased.weight, weight[:, kept])
    torch.testing.assert_close((x[:, kept] @ biased.weight.T + biased.bias).mean(0), target.mean(0))

    through = refit(weight, moments.about_origin(), kept)
    best = torch.linalg.lstsq(design[:, :-1], target.double()).solution
    assert not through.bias.any()
    assert error(through) < 1.001 * float((design[:, :-1] @ best - target).square().mean())
    assert error(through) > 1.01 * error(found)


@pytest.mark.parametrize(
    ("name", "options"),
    [("tiny", {"allocate": "search"}), ("tiny", {"score": "flap", "refit": False}), ("gpt2", {"score": "wanda"})],
)
def test_without_new_biases_only_those_that_are_there_are_fitted(name: str, options: Any) -> None:
    program, calibration = tiny() if name == "tiny" else raised(name)[0].program, text(64)
    result, _ = prune(program, calibration, unit="ffn", amount=0.2, bias=False, **options)
    before, after = (dict(named_tensors(one.module)) for one in (program, result))
    assert after.keys() == before.keys()
    fitted = [key for key in after if key.endswith("proj.bias") and not torch.equal(after[key], before[key])]
    assert len(fitted) == (2 if name == "gpt2" else 0), "one behind each feed-forward block"
    if options.get("refit", True):
        rough, _ = prune(program, calibration, unit="ffn", amount=0.2, score="wanda", refit=False)
        assert distance(program, result, calibration) < distance(program, rough, calibration)


@torch.no_grad()
def distance(program: Program, other: Program, calibration: Calibration) -> float:
    return float((program.run(calibration.tokens) - other.run(calibration.tokens)).square().mean())


@pytest.mark.parametrize(("unit", "amount"), [("ffn", 0.2), ("heads", 0.28)])
def test_a_block_is_chosen_and_fitted_to_bring_the_pruned_stream_back(unit: str, amount: float) -> None:
    program, calibration = tiny(), text(64)
    result, report = prune(program, calibration, unit=unit, amount=amount, score="wanda")
    groups = [feed_forward(program, n) if unit == "ffn" else heads(program, n) for n in (0, 1)]
    cuts = [Cut(g, tuple(report.details[str(n)][f"{g.kind}_removed"])) for n, g in enumerate(groups)]
    first = replace(cuts[0], biased=True, fit=fit_of(result, groups[0]))
    pruned = Pruner(program).run([first])
    exit_ = next(n for n in pruned.module.graph.nodes if n.name == groups[1].exit.name)
    x = values(pruned, linear_input(exit_), calibration)
    channels = x.square().mean(0).sqrt() * exit_weight(program, groups[1]).abs().sum(0)
    units = torch.zeros(groups[1].units, dtype=torch.float64).index_add_(0, groups[1].columns, channels)
    assert list(cuts[1].removed) == sorted(units.argsort()[: len(cuts[1].removed)].tolist()), "scored on pruned inputs"
    branch = Groups(program).branch(groups[1].block)
    (stream,) = (n for n in branch.add.args[:2] if isinstance(n, Node) and n is not branch.addend)
    after = next(n for n in pruned.module.graph.nodes if n.name == stream.name)
    target = values(program, groups[1].exit, calibration)
    owed = values(program, stream, calibration) - values(pruned, after, calibration)
    assert owed.square().mean() > 1e-4 * target.square().mean(), "what comes before is off"
    design = torch.cat([x[:, cuts[1].columns], torch.ones(len(x), 1, dtype=torch.float64)], 1)

    def error(solution: Tensor, aim: Tensor) -> float:
        return float((design @ solution - aim).square().mean())

    fit = fit_of(result, groups[1])
    found = torch.cat([fit.weight.double().T, fit.bias.double()[None]])
    best, other = (torch.linalg.lstsq(design, aim).solution for aim in (target + owed, target))
    assert error(found, target + owed) < 1.003 * error(best, target + owed)
    assert error(other, target + owed) > 1.003 * error(best, target + owed), "its own output alone is another aim"


def test_refitting_brings_the_outputs_nearer() -> None:
    program, calibration, tokens = tiny(), text(64), tokens_of(8, 16, seed=5)
    dense = program.run(tokens)

    def error(**options: Any) -> float:
        return float((prune(program, calibration, **options)[0].run(tokens) - dense).square().mean())

    wanda = error(score="wanda")
    assert wanda < 0.9 * error(score="wanda", refit=False)
    assert error() < 0.97 * wanda
    assert error() < 0.95 * error(refit=False)
    assert error(amount=0.5) < 0.9 * error(amount=0.5, refit=False)
