"""How much each block gives, searched: what sizes are expected to lose, what they save, and the best choice of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from memc.conversion.pipeline import plan_pass
from memc.errors import MemcError
from memc.passes.prune import Prune
from memc.passes.prune.allocate import Cost, search, unit_costs
from memc.passes.prune.choice import Task, legal, lowest
from memc.passes.prune.curves import ROWS, STRIDE, Curve, curves, limits
from memc.passes.prune.eliminate import Elimination
from memc.passes.prune.groups import Group
from memc.passes.prune.measure import exit_weight, unit_scores
from memc.passes.prune.moments import Moments
from memc.passes.prune.refit import refit
from memc.passes.prune.rewrite import Cut, Pruner
from memc.pipeline import parse_spec
from memc.program import Program, set_tensor
from tests.passes.pruning import entries, feed_forward, heads, least_error, prune, text
from tests.passes.tiny_program import TARGET, tiny, tokens_of


def unequal(factor: float = 0.1) -> Program:
    """Return the tiny program with a feed-forward network in layer 0 that does little."""
    program = tiny(layers=3).copy()
    name = "model.layers.0.mlp.down.weight"
    set_tensor(program.module, name, program.module.get_parameter(name).detach() * factor)
    return program


def divergence(program: Program, other: Program, tokens: Tensor) -> float:
    """KL(program || other) in float64, the mean over all tokens."""
    first, second = (one.run(tokens).double().log_softmax(-1) for one in (program, other))
    return float((first.exp() * (first - second)).sum(-1).mean())


@pytest.mark.parametrize("find", [feed_forward, heads])
def test_errors_and_fits_are_those_of_least_squares(find: Any) -> None:
    program, calibration = tiny(kv_heads=4), text(32)
    group: Group = find(program)
    x = entries(program, group, calibration).flatten(0, 1).float()
    weight, bias = exit_weight(program, group.exit)
    assert bias is None
    own = torch.linspace(-1, 1, len(weight))
    moments = Moments(len(group.columns), gram=True, where="", targets=len(weight))
    moments.update(x, x @ weight.T + own)
    elimination = Elimination(group, weight, moments)
    before = 0.0
    for count in (1, 2, 3):
        elimination.least(count)
        kept = ~torch.isin(group.columns, torch.tensor(elimination.removed))
        assert elimination.error == pytest.approx(least_error(moments, weight.double(), kept), rel=1e-6)
        assert elimination.error > before
        before, found, expected = elimination.error, elimination.fit(own), refit(weight, moments, kept)
        torch.testing.assert_close(found.weight, expected.weight, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.bias, expected.bias, atol=1e-3, rtol=1e-4)
    wrong = ~torch.isin(group.columns, torch.tensor(elimination.removed[:-1]))
    assert elimination.error != pytest.approx(least_error(moments, weight.double(), wrong), rel=1e-2)


@pytest.mark.parametrize("score", ["obs", "wanda"])
def test_a_price_is_what_one_block_alone_does_to_the_predictions(score: str) -> None:
    program, calibration = tiny(), text(24)
    tasks = [Task(feed_forward(program, 1), 8), Task(heads(program, 0), 1)]
    (found,) = curves(program, [tasks], calibration, score, 4, most=100.0)
    assert found[0].counts == tuple(legal(tasks[0].group, 4)) and found[1].counts == (0, 1)
    for curve, trial in zip(found, (8, 1), strict=True):
        group, (weight, bias) = curve.group, exit_weight(program, curve.group.exit)
        assert curve.errors[0] == 0 and list(curve.errors) == sorted(curve.errors)
        moments = Moments(len(group.columns), gram=True, where="")
        moments.update(entries(program, group, calibration).flatten(0, 1).float())
        elimination, task = Elimination(group, weight, moments), Task(group, trial)
        if score == "obs":
            elimination.least(trial)
        else:
            elimination.remove(lowest(task, unit_scores(group, weight, score, moments, None)))
        assert curve.errors[curve.counts.index(trial)] == pytest.approx(elimination.error, rel=1e-3)
        cut = Cut(group, tuple(sorted(elimination.removed)), biased=True, fit=elimination.fit(bias))
        pruned, tokens = Pruner(program).run([cut]), calibration.tokens[:ROWS]
        first, second = (one.run(tokens)[:, ::STRIDE].double().log_softmax(-1) for one in (program, pruned))
        kl = float((first.exp() * (first - second)).sum(-1).mean().detach())
        assert curve.nats(trial) == pytest.approx(kl, rel=1e-2) and kl > 1e-4
    smaller = [Task(tasks[0].group, 4), Task(tasks[1].group, 0)]
    both, (alone,) = (
        curves(program, spreads, calibration, score, 4, most=100.0) for spreads in ([tasks, smaller], [smaller])
    )
    assert both[0] == found and both[1][0] == alone[0] and alone[0].price != found[0].price, "as alone"
    assert both[1][1].counts == alone[1].counts == (0,), "a kind that a uniform spread leaves alone is not searched"


@pytest.mark.parametrize(
    ("most", "counts"), [(1.0, (0, 4)), (1.5, (0, 4, 8)), (2.5, (0, 4, 8, 12)), (0.0, (0, 4, 8, 12, 16, 20, 24))]
)
def test_a_group_loses_no_more_than_so_many_times_its_share(most: float, counts: tuple[int, ...]) -> None:
    program = tiny(layers=3)
    tasks = [Task(feed_forward(program, layer), count) for layer, count in enumerate((4, 8, 4))]
    assert limits(tasks, 1.0) == pytest.approx([16 / 3, 8, 16 / 3]), "the share of a kind, and what rounding gave"
    (found,) = curves(program, [tasks], text(24), "wanda", 4, most=most)
    assert found[0].counts == counts and len(found[0].errors) == len(counts)
    wide, narrow = curves(program, [tasks, [replace(task, count=4) for task in tasks]], text(24), "wanda", 4, most=most)
    assert tuple(curve.counts for curve in wide) == tuple(curve.counts for curve in found)
    assert not most or max(narrow[1].counts) <= most * 4, "each spread has limits of its own"


def test_what_a_unit_saves_is_what_the_smaller_program_asks_less() -> None:
    program = tiny()
    group, head = feed_forward(program), heads(program)
    assert unit_costs(program, group, 4, 100) == (3 * 24, 2 * 3 * 24, 4 * 3 * 24)
    parameters, flops, read = unit_costs(program, head, 4, 100)
    assert parameters == 2 * 10 * 24 * 3 and flops > 2 * parameters
    assert read == 4 * parameters + 2 * 10 * 4 * 100, "the keys and values of a head are read too"


def brute(known: Sequence[Curve], costs: Sequence[Cost], uniform: Sequence[Task]) -> float:
    """Least sum of losses of all choices that save as much of everything as the uniform one."""

    def saved(counts: Sequence[int]) -> list[float]:
        return [sum(n * cost[i] for n, cost in zip(counts, costs, strict=True)) for i in range(3)]

    least = saved([task.count for task in uniform])
    return min(
        sum(curve.nats(n) for curve, n in zip(known, counts, strict=True))
        for counts in product(*(curve.counts for curve in known))
        if all(a >= b - 1e-9 for a, b in zip(saved(counts), least, strict=True))
    )


@pytest.mark.parametrize("seed", range(4))
def test_the_search_finds_the_best_of_all_choices(seed: int) -> None:
    program, generator = tiny(), torch.Generator().manual_seed(seed)
    groups = [feed_forward(program, 0), heads(program, 0), feed_forward(program, 1), heads(program, 1)]
    known = []
    for group in groups:
        counts = legal(group, 4)
        rises = torch.rand(len(counts) - 1, generator=generator).tolist()
        errors = [0.0, *torch.tensor(rises).cumsum(0).tolist()]
        known.append(Curve(group, tuple(counts), tuple(errors), 1.0))
    costs: list[Cost] = [(72.0, 144.0, 288.0), (1440.0, 3000.0, 6400.0)] * 2
    uniform = [Task(groups[0], 12), Task(groups[1], 0), Task(groups[2], 8), Task(groups[3], 1)]
    found = search(known, costs, uniform)
    assert found.expected(found.tasks) == pytest.approx(brute(known, costs, uniform))
    assert found.expected(found.tasks) <= found.expected(found.uniform)


def test_a_uniform_spread_stays_where_nothing_is_better() -> None:
    program = tiny()
    groups = [feed_forward(program, n) for n in (0, 1)]
    known = [Curve(group, (0, 4, 8), (0.0, 1.0, 4.0), 1.0) for group in groups]
    uniform = [Task(group, 4) for group in groups]
    found = search(known, [(72.0, 144.0, 288.0)] * 2, uniform)
    assert found.tasks == tuple(uniform)
    dear = [known[0], replace(known[1], price=9.0)]
    assert [task.count for task in search(dear, [(72.0, 144.0, 288.0)] * 2, uniform).tasks] == [8, 0]


def test_the_block_that_matters_least_gives_most() -> None:
    program, calibration, tokens = unequal(), text(64), tokens_of(8, 16, seed=5)
    options = {"amount": 0.2, "unit": "ffn"}
    uniform, spread = prune(program, calibration, **options)
    result, report = prune(program, calibration, allocate="search", most=100.0, **options)
    left = [int(report.details[layer]["ffn_channels"].split()[-1]) for layer in "012"]
    assert left[0] == min(left) and len(set(left)) > 1
    assert result.parameter_count <= uniform.parameter_count
    assert divergence(program, result, tokens) < 0.8 * divergence(program, uniform, tokens)
    total = report.details["total"]
    assert 0 < total["expected_kl"] < total["expected_kl_uniform"]
    blocks = [report.details[layer]["ffn_channels_expected_kl"] for layer in "012"]
    assert sum(blocks) == pytest.approx(total["expected_kl"])
    assert "expected_kl" not in spread.details["total"]


def test_a_search_takes_heads_from_blocks_that_give_nothing() -> None:
    program = tiny(layers=3, kv_heads=4).copy()
    for layer in (0, 2):
        name = f"model.layers.{layer}.attention.o.weight"
        set_tensor(program.module, name, program.module.get_parameter(name).detach() * 1e-3)

    def left(amount: float, most: float) -> list[int]:
        result, report = prune(program, text(64), allocate="search", amount=amount, most=most)
        assert report.details["total"]["removed_share"] >= amount - 0.01
        counts = [spec.shape[1] for spec in result.states[::3]]
        groups = [report.details[layer].get("kv_groups") for layer in "012"]
        assert groups in ([f"4 -> {count}" for count in counts], [None] * 3)
        return counts

    assert left(0.35, most=100.0) == [1, 4, 1], "all that can go where nothing is lost, for channels that stay"
    assert left(0.35, most=1.0) == [3, 3, 3], "the uniform share"
    assert left(0.29, most=1.5) == [4, 4, 4], "which is none under a third"
    assert left(0.29, most=0.0) == [1, 4, 1]


def test_a_plan_of_a_search_is_a_uniform_spread() -> None:
    program, pass_ = tiny(), Prune(amount=0.2, round=4, protect="none", allocate="search")
    plan = plan_pass(pass_, program, TARGET)
    planned, report = pass_.apply(program, plan)
    assert {site.kind for site in plan.sites} == {"feed_forward"}
    assert report.details["total"]["chosen_by"].startswith("even spacing")
    assert planned.parameter_count == prune(program, amount=0.2)[0].parameter_count


@pytest.mark.parametrize("clash", ["unit=layers", "unit=ffn_blocks", "score=2ssp", "refit=false", "alike=true"])
def test_a_search_refuses_what_it_cannot_weigh(clash: str) -> None:
    with pytest.raises(MemcError, match=f"E203 allocate=search weighs .* and {clash}") as caught:
        parse_spec(f"prune:allocate=search,{clash}")
    assert clash in caught.value.next


def test_a_limit_under_the_uniform_share_is_refused() -> None:
    with pytest.raises(MemcError, match=r"E203 under its uniform share .*most=0.5") as caught:
        parse_spec("prune:allocate=search,most=0.5")
    assert caught.value.next == "most=1 or more, or most=0"
