"""The prune pass: how much goes, which goes, what the refit does, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from memc.conversion.pipeline import plan_pass
from memc.errors import MemcError
from memc.passes.linearize import Linearize
from memc.passes.prune import Prune, scores
from memc.passes.prune.choice import Task
from memc.passes.prune.eliminate import eliminate
from memc.passes.prune.groups import Group, Groups, Kind
from memc.passes.prune.moments import Moments
from memc.passes.prune.refit import compensate, refit, ridge
from memc.passes.prune.rewrite import Cut, Fit, Pruner
from memc.passes.prune.walk import linear_parts
from memc.passes.window import Window
from memc.pipeline import Calibration, PassReport, parse_spec
from memc.program import Program, get_tensor, retie, set_tensor
from memc.raising import raise_program
from memc.raising.feed_forward import linear_input
from memc.relation import Bounded, Exact
from memc.verify import require_well_formed
from tests.core.test_families import DECODERS, every
from tests.families import VOCAB, raw_program
from tests.passes.tiny_program import TARGET, tiny, tokens_of

SMALL: dict[str, Any] = {"round": 4, "protect": "none"}


def text(count: int = 12, length: int = 16, seed: int = 1, vocabulary: int = 37) -> Calibration:
    tokens = torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))
    return Calibration(tokens, torch.arange(length).expand(count, length).contiguous(), "random tokens")


def prune(program: Program, calibration: Calibration | None = None, **options: Any) -> tuple[Program, PassReport]:
    pass_ = Prune(**{**SMALL, **options})
    plan = replace(plan_pass(pass_, program, TARGET), calibration=calibration)
    return pass_.apply(program, plan)


def fake(program: Program) -> Program:
    """Return the program with parameters that have no values."""
    planned, made = program.copy(), dict[int, Tensor]()
    named = dict(planned.module.named_parameters(remove_duplicate=False))
    retie(planned.module, {n: made.setdefault(id(p), p.detach().to("meta")) for n, p in named.items()})
    return planned


def shapes(program: Program) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in program.module.named_parameters()}


@pytest.mark.parametrize("unit", ["ffn", "heads", "layers", "auto"])
def test_nothing_removed_is_the_same_to_the_bit(unit: str) -> None:
    program, tokens = tiny(), tokens_of(2, 9)
    pass_ = Prune(amount=0, unit=unit, protect="none")
    plan = plan_pass(pass_, program, TARGET)
    assert plan.relations == (Exact(),) and plan.sites and pass_.calibrates() is None
    result, report = pass_.apply(program, plan)
    assert torch.equal(result.run(tokens), program.run(tokens))
    assert report.details["total"]["removed_parameters"] == 0


@pytest.mark.parametrize("amount", [0.1, 0.25, 0.5, 0.6])
def test_the_share_that_goes_is_counted_exactly(amount: float) -> None:
    program = tiny()
    result, report = prune(program, amount=amount, refit=False, score="magnitude")
    total = report.details["total"]
    assert program.parameter_count - result.parameter_count == total["removed_parameters"]
    assert total["removed_share"] == pytest.approx(amount, abs=0.04)
    assert total["removed_share"] == total["removed_parameters"] / total["block_parameters"]
    assert all(int(shape[0]) % 4 == 0 for name, shape in shapes(result).items() if "up.weight" in name)
    assert ("kv_groups" in report.details["0"]) == (amount > 1 / 3), "auto takes heads too from a third on"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"amount": 0.5},
        {"unit": "heads", "amount": 0.1},
        {"score": "flap", "refit": False},
        {"unit": "layers", "amount": 0.5},
    ],
)
def test_a_plan_without_weights_has_the_shapes_of_the_result(options: dict[str, Any]) -> None:
    program = tiny()
    planned, _ = prune(fake(program), **options)
    result, report = prune(program, text(), **options)
    require_well_formed(result)
    if options.get("unit") != "layers":
        assert shapes(planned) == shapes(result)
    assert planned.parameter_count == result.parameter_count
    assert [spec.shape for spec in planned.states] == [spec.shape for spec in result.states]
    again, second = prune(program, text(), **options)
    assert second.details == report.details and "random tokens" in report.details["total"]["calibration"]
    for name, value in result.module.named_parameters():
        assert torch.equal(value, get_tensor(again.module, name))


@pytest.mark.parametrize("name", every(DECODERS))
def test_every_decoder_is_pruned_or_refused_by_name(name: str) -> None:
    program = raise_program(raw_program(name)[0]).program
    calibration = text(48, 16, vocabulary=VOCAB)
    if name in ("mixtral", "qwen3_moe"):
        with pytest.raises(MemcError, match=r"E307.*moe: a mixture of experts"):
            prune(program, calibration, unit="ffn")
        return
    result, report = prune(program, calibration, amount=0.25)
    require_well_formed(result)
    assert report.details["total"]["removed_share"] == pytest.approx(0.25, abs=0.03)
    assert torch.isfinite(result.run(calibration.tokens)).all()


def test_encoders_are_left_alone() -> None:
    program = tiny()
    encoder = replace(program, model=replace(program.model, decoder=False))
    plan = Prune(**SMALL).plan(encoder, TARGET)
    assert {rejection.code for rejection in plan.rejections} == {"encoder"} and not plan.sites


def test_first_and_last_layer_are_protected_and_reported() -> None:
    program = tiny(layers=4)
    pass_ = Prune(amount=0.1, round=4)
    plan = pass_.plan(program, TARGET)
    assert [site.layer for site in plan.sites] == [1, 2]
    assert [(r.layer, r.code) for r in plan.rejections] == [(0, "protected"), (3, "protected")]
    named = replace(pass_, protect="[1]").plan(program, TARGET)
    assert [site.layer for site in named.sites] == [0, 2, 3]
    assert plan.relations == (Bounded("perplexity_ratio", None),)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("prune:amount=0.9,unit=ffn,round=4,protect=none", "leaves no legal shape: at most 0.353"),
        ("prune:amount=0.25,protect=none", "leaves no legal shape: at most 0.000"),
        ("prune:amount=0.9,unit=heads,protect=none", "leaves no legal shape: at most"),
        ("prune:amount=0.01,round=14,protect=none", "less than half of a step"),
        ("prune:amount=0.1,unit=layers,protect=none", "of 2 layers that can go"),
        ("prune:amount=0.25,protect=[7]", "names layer 7"),
    ],
)
def test_an_amount_that_cannot_be_is_refused(spec: str, message: str) -> None:
    with pytest.raises(MemcError) as caught:
        parse_spec(spec).plan(tiny(), TARGET)
    assert caught.value.code == "E203" and message in caught.value.message and caught.value.next


@pytest.mark.parametrize("spec", ["prune:protect=first", "prune:amount=1.5", "prune:unit=neurons", "prune:score=luck"])
def test_bad_options_are_refused(spec: str) -> None:
    with pytest.raises(MemcError, match="E203"):
        parse_spec(spec)


def test_text_that_says_nothing_is_refused() -> None:
    program = tiny()
    same = text()
    with pytest.raises(MemcError, match="E207 calibration text is one token over and over"):
        prune(program, replace(same, tokens=torch.full_like(same.tokens, 5)))
    with pytest.raises(MemcError, match="E207 calibration text has 16 tokens, fewer than the 160 that 40 channels"):
        prune(program, text(1), amount=0.5)
    with pytest.raises(MemcError, match=r"E207 .* fewer than the 160 .* or refit=false"):
        prune(program, text(4), amount=0.5)
    prune(program, text(4), amount=0.5, refit=False)


@pytest.mark.parametrize("options", [{}, {"unit": "layers", "amount": 0.5}])
def test_activations_that_are_not_finite_name_the_layer(options: dict[str, Any]) -> None:
    program = tiny().copy()
    broken = program.module.get_parameter("model.layers.1.mlp.up.weight").detach().clone()
    broken[3] = 1e38
    set_tensor(program.module, "model.layers.1.mlp.up.weight", broken)
    with pytest.raises(MemcError, match=r"E403 activations on calibration text are not finite \[layer 1") as caught:
        prune(program, text(), **options)
    assert caught.value.exit_code == 4


class Recorded(Interpreter):
    """Runs a program and keeps what some nodes were."""

    def __init__(self, program: Program, nodes: set[Node]) -> None:
        super().__init__(program.module)
        self.nodes, self.seen = nodes, dict[Node, Tensor]()

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self.nodes:
            self.seen[n] = value.detach()
        return value


def entries(program: Program, group: Group, calibration: Calibration) -> Tensor:
    """Inputs ``[N, T, C]`` of a group's exit projection, from one run of the whole batch."""
    node = linear_input(group.exit)
    run = Recorded(program, {node})
    run.run(calibration.tokens, calibration.positions, *program.new_state(len(calibration.tokens)))
    return run.seen[node].reshape(len(calibration.tokens), -1, len(group.columns)).double()


def feed_forward(program: Program, layer: int = 0) -> Group:
    groups = Groups(program)
    block = next(block for block in groups.blocks if block.kind == "feed_forward" and block.layer == layer)
    return groups.of(block, "ffn_channels")


def heads(program: Program, layer: int = 0) -> Group:
    groups = Groups(program)
    block = next(block for block in groups.blocks if block.kind == "attention" and block.layer == layer)
    return groups.of(block, "kv_groups")


def values(program: Program, node: Node, calibration: Calibration) -> Tensor:
    """Values ``[tokens, C]`` of a node, from one run of the whole batch."""
    run = Recorded(program, {node})
    run.run(calibration.tokens, calibration.positions, *program.new_state(len(calibration.tokens)))
    return run.seen[node].flatten(0, -2).double()


def exit_weight(program: Program, group: Group) -> Tensor:
    return get_tensor(program.module, str(linear_parts(group.exit)[0].target)).detach().double()


def fit_of(program: Program, group: Group) -> Fit:
    """Weight and bias that a pruned program's projection behind a group has."""
    exit_ = next(n for n in program.module.graph.nodes if n.name == group.exit.name)
    weight, bias, _, _ = linear_parts(exit_)
    assert bias is not None
    return Fit(*(get_tensor(program.module, str(node.target)).detach() for node in (weight, bias)))


@pytest.mark.parametrize("score", ["wanda", "flap", "activation", "magnitude", "taylor"])
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


def least_error(moments: Moments, weight: Tensor, kept: Tensor) -> float:
    """Squared error that the best fit on the kept channels leaves, with the ridge in the covariance."""
    covariance = moments.covariance + ridge(moments) * torch.eye(len(kept), dtype=torch.float64)
    inner, outer = covariance[kept][:, kept], covariance[kept][:, ~kept]
    rest = covariance[~kept][:, ~kept] - outer.T @ torch.linalg.solve(inner, outer)
    return float(torch.einsum("oi,ij,oj->", weight[:, ~kept], rest, weight[:, ~kept]))


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


def test_query_heads_go_where_there_is_one_key_value_head() -> None:
    program = tiny(kv_heads=1)
    result, report = prune(program, text(), unit="heads", amount=0.11)
    assert report.details["0"]["query_heads"] == "4 -> 3"
    assert result.states[0].shape == program.states[0].shape


def test_layers_that_turn_the_stream_least_go() -> None:
    program = tiny(layers=4).copy()
    for name in ("model.layers.2.attention.o.weight", "model.layers.2.mlp.down.weight"):
        set_tensor(program.module, name, program.module.get_parameter(name).detach() * 1e-3)
    result, report = prune(program, text(), unit="layers", amount=0.25)
    assert {site.layer for site in report.sites} == {2} and report.details["2"]["layer"] == "removed"
    influence = {layer: report.details[layer]["block_influence"] for layer in "0123"}
    assert min(influence, key=influence.__getitem__) == "2"
    tokens = tokens_of(2, 9)
    torch.testing.assert_close(result.run(tokens), program.run(tokens), atol=0.05, rtol=0)
    assert len(result.states) == len(program.states) - 3


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


@pytest.mark.parametrize("other", [Window(window=5, sinks=2), Linearize(window=5, feature_size=12, keep="none")])
def test_what_was_pruned_is_rewritten_by_other_passes(other: Any) -> None:
    program = tiny()
    pruned, _ = prune(program, text(), amount=0.5)
    result, report = other.apply(pruned, plan_pass(other, pruned, TARGET))
    require_well_formed(result)
    assert len(report.sites) == 2
    tokens = tokens_of(2, 5)
    torch.testing.assert_close(result.run(tokens), pruned.run(tokens), atol=1e-5, rtol=0)
    again, _ = prune(pruned, text(), amount=0.2)
    require_well_formed(again)
    assert again.parameter_count < pruned.parameter_count
