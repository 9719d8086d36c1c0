"""Fitting to limits: read, searched against brute force, measured against whole runs, converted, refused."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memc import api
from memc.analysis.sensitivity import Distance, Yardstick, unchanged
from memc.conversion.fitting import _within
from memc.cost import demands
from memc.errors import MemcError
from memc.fit import driver, menu
from memc.fit.limits import parse_limits, read_limits
from memc.fit.weights import quantised
from memc.passes.linearize import Linearize
from memc.passes.prune import Prune
from memc.passes.sparsify import Sparsify
from memc.passes.window import Window
from memc.pipeline import Calibration, Pass
from memc.program import get_tensor, set_tensor
from memc.progress import Silent
from memc.quantise import quantise
from memc.recipe import Recipe
from memc.report import fit as view
from memc.report.files import FitFacts, FitLayer, FitLimit
from memc.search import Choice, frontier
from memc.target import Target
from memc.verify.execute import whole
from memc.verify.inputs import positions_of
from tests.core.test_convert import make_llama
from tests.passes.tiny_program import tiny, tokens_of

WEIGHTS = ("fp32", "int8", "int4")
LENGTH = 40
TARGET = Target(
    name="cpu",
    description="test",
    kind="cpu",
    backend="eager",
    instruction_set="any",
    memory_bandwidth=1e9,
    flops={"fp32": 1e9},
)
SETTINGS: tuple[Pass, ...] = (
    Prune(amount=0.2, unit="ffn", of="layers", alike=True, protect="none", round=1, sequences=8, length=LENGTH),
    Linearize(window=3, sinks=1, feature_size=8, start="fitted"),
    Window(window=3, sinks=1),
    Window(window=9, sinks=1),
    Sparsify(budget=12, page=4, sinks=1, window=2, dense_below=0, method="bounds"),
)
PRESENT = {"attention": (0, 1), "feed_forward": (0, 1)}
CALIBRATION = tokens_of(8, LENGTH, 7)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("memc.fit.menu.offered", lambda: SETTINGS)
    monkeypatch.setattr("memc.conversion.fitting.LENGTHS", (2 * LENGTH, LENGTH))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("text", "what", "context", "most", "relative"),
    [
        ("state<=64MiB", "state", 32768, 64 * 2**20, False),
        ("state@4k <= 0.25x", "state", 4096, 0.25, True),
        ("decode@32k>=2x", "decode", 32768, 0.5, True),
        ("decode@500<=1.5ms", "decode", 500, 1.5, False),
        ("ppl<=1.05x", "ppl", 0, 1.05, True),
        ("kl<=0.02", "kl", 0, 0.02, False),
    ],
)
def test_a_limit_is_read(text: str, what: str, context: int, most: float, relative: bool) -> None:
    (limit,) = parse_limits(text).limits
    assert (limit.what, limit.context, limit.most, limit.relative) == (what, context, most, relative)


def test_limits_without_a_context_are_at_that_of_the_conversion() -> None:
    assert parse_limits("state<=1MB,decode>=2x", 777).contexts == (777,)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no limit"),
        ("state", "not a limit"),
        ("stat<=1MB", "'state'"),
        ("state>=1MB", "limited by <="),
        ("state<=1x2", "not a limit"),
        ("state<=1ms", "takes a value in"),
        ("ppl<=1.05", "takes a value in 'x'"),
        ("ppl@32k<=1.05x", "measured on text"),
        ("state<=1MB,state<=2MB", "two limits"),
        ("decode>=0x", "over 0"),
    ],
)
def test_what_is_no_limit_is_refused(text: str, said: str) -> None:
    with pytest.raises(MemcError, match="E200") as caught:
        parse_limits(text)
    assert said in str(caught.value)


def test_a_limit_past_the_positions_of_a_table_is_refused_and_one_past_the_training_is_said() -> None:
    said: list[str] = []

    class Listener(Silent):
        def note(self, text: str) -> None:
            said.append(text)

    def within(fit: str, **model: Any) -> Any:
        recipe = Recipe(recipe=1, fit=fit)
        info = dataclasses.replace(tiny().model, **model)
        return _within(parse_limits(fit), recipe, info, Listener())

    table = {"max_positions": 64, "absolute_positions": True}
    with pytest.raises(MemcError, match="E206 the limit is at 4096 tokens, past the model's 64 positions"):
        within("kl<=1,state@4k<=0.5x", **table)
    limits, context = within("state<=0.5x,decode@32>=2x", **table)
    assert limits.contexts == (32, 64) and context == 64, "where none is named the model's last position is meant"
    assert not said
    assert within("state@4k<=0.5x,kl<=1", max_positions=64)[0].contexts == (4096,)
    assert said == ["beyond_trained: state@4k<=0.5x is past the 64 positions of the training"]
    assert within("state<=0.5x")[0].contexts == (32768,)


def test_what_binds_is_said_with_what_was_given_up_and_what_a_looser_one_leaves() -> None:
    kl = {"window": 0.02, "prune": 0.01}
    layers = [FitLayer(layer=3, kind="feed_forward", spec="prune", kl=kl), FitLayer(layer=4, spec="window", kl=kl)]
    limit = FitLimit(limit="state<=0.5x", reached=1.0, original=2.0, used=1.0)
    facts = FitFacts(
        limits=[limit],
        layers=[*layers, FitLayer(layer=5, spec="", kl=kl)],
        weights="int8",
        weights_kl={"int8": 0.003},
        kl_expected=0.033,
        kl_mean=0.03,
        perplexity_ratio=1.02,
        tokens=64,
        binds="state<=0.5x",
        looser=1.25,
        kl_looser=0.013,
    )
    lost = "attention 4 0.02, feed-forward 3 0.01, weights in int8 0.003"
    loose = "were it 1.25 times looser, 0.013 would be lost in place of 0.033"
    assert view.given_up(facts) == f"state<=0.5x binds; given up most, nats a token: {lost}; {loose}"
    assert ("attention as it is", "5", "") in view.chosen_rows(facts)


@pytest.mark.parametrize("changes", [{"passes": ["window"]}, {"data": ["a.txt"], "tokens": 5}])
def test_limits_choose_alone(changes: dict[str, Any]) -> None:
    with pytest.raises(MemcError, match="E200"):
        read_limits(Recipe(recipe=1, fit="state<=1MB", **changes))


# Losses are eighths: a library that another test has loaded may have the processor flush subnormal numbers to zero.
costs = st.tuples(st.integers(0, 80).map(lambda eighths: eighths / 8), st.integers(0, 40), st.integers(0, 40))


@given(st.lists(st.lists(costs, min_size=1, max_size=3), min_size=1, max_size=5), st.integers(0, 120))
def test_the_frontier_has_the_best_choice_under_any_budget(blocks: list[Any], budget: int) -> None:
    choices = [[Choice(loss, (float(a), float(b))) for loss, a, b in block] for block in blocks]
    found = frontier(choices)
    for one in found:
        picked = [block[pick] for block, pick in zip(choices, one.picks, strict=True)]
        assert one.loss == pytest.approx(sum(choice.loss for choice in picked))
        assert one.costs == pytest.approx([sum(choice.costs[i] for choice in picked) for i in range(2)])
    every = [tuple(block) for block in itertools.product(*choices)]
    for axis in range(2):
        best = min(
            (sum(c.loss for c in way) for way in every if sum(c.costs[axis] for c in way) <= budget), default=None
        )
        mine = min((one.loss for one in found if one.costs[axis] <= budget), default=None)
        assert mine == (None if best is None else pytest.approx(best))


def test_many_labels_are_told_apart_less_finely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memc.search.MOST", 20)
    block = [Choice(float(9 - cost), (float(cost * cost),)) for cost in range(10)]
    found = frontier([block] * 6)
    assert len(found) <= 20
    assert any(one.loss == 0 for one in found)


def oracle(original: Any, result: Any, tokens: torch.Tensor, first: int) -> Distance:
    """Run both whole."""
    found = Distance()
    for row in tokens:
        before, after = (
            whole(side, row[None])[0, first:].double().log_softmax(-1).detach() for side in (original, result)
        )
        kl = float((before.exp() * (before - after)).sum())
        excess = float((before - after)[:-1].gather(1, row[first + 1 :, None]).sum())
        found += Distance(len(before), kl, len(before) - 1, excess)
    return found


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"window": 20}], ids=str)
@pytest.mark.parametrize("layer", [0, 1])
def test_distances_are_those_of_whole_runs(options: dict[str, Any], layer: int) -> None:
    original, tokens = tiny(**options), tokens_of(2, LENGTH, 3)
    results = [dict(one.alone(original, [0, 1], calibrate))[layer] for one in on_offer(original)]
    assert len(results) >= 4
    for found, result in zip(Yardstick(original, tokens, 20).distances(results), results, strict=True):
        expected = oracle(original, result, tokens, 20)
        assert found.tokens == expected.tokens == 2 * (LENGTH - 20) and found.segments == 2
        assert found.kl == pytest.approx(expected.kl, rel=1e-3, abs=1e-5)
        assert found.excess == pytest.approx(expected.excess, rel=1e-3, abs=1e-4)
        assert found.kl > 0


def calibrate(count: int, length: int) -> Calibration:
    tokens = CALIBRATION[:count, :length]
    return Calibration(tokens, positions_of(tokens), "random tokens")


def on_offer(original: Any) -> list[menu.Setting]:
    plans = [(one, one.plan(original, TARGET)) for one in SETTINGS]
    return [menu.Setting(one, plan) for one, plan in plans if plan.sites]


def test_the_original_runs_once_for_blocks_in_order_and_anew_for_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    original, tokens = tiny(), tokens_of(2, LENGTH, 3)
    setting = next(one for one in on_offer(original) if one.pass_.name == "window")
    programs = dict(setting.alone(original, [0, 1], calibrate))
    yard, made = Yardstick(original, tokens, 20), list[None]()
    fresh = Yardstick._fresh
    monkeypatch.setattr(Yardstick, "_fresh", lambda self: (made.append(None), fresh(self))[1])
    first, second = (yard.distances([programs[layer]]) for layer in (0, 1))
    assert not made
    assert yard.distances([programs[0]]) == first and len(made) == 1
    assert yard.distances([programs[1]]) == second and len(made) == 1


def test_what_is_known_well_enough_is_looked_at_no_further() -> None:
    original, tokens = tiny(), tokens_of(3, 200, 3)
    (program,) = (p for layer, p in on_offer(original)[2].alone(original, [1], calibrate))
    (whole,) = Yardstick(original, tokens, 8).distances([program])
    one, never = (Yardstick(original, tokens, 8).distances([program], precise=p)[0] for p in (10.0, 1e-9))
    assert (one.segments, never.segments) == (6, 18) and never == whole
    assert 0 < whole.error < one.error < math.inf
    parts = [Distance(1, kl, 0, 0.0, 1, kl * kl) for kl in (1.0, 2.0, 3.0, 6.0)]
    total = sum(parts, Distance())
    spread = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert total.error == pytest.approx(float(spread.std()) * 2 / 12)


def test_each_layer_alone_is_as_if_it_were_rewritten_alone() -> None:
    """One run of the text serves all layers: what comes of it is what the pass makes, told that one layer."""
    original = tiny()
    for setting in on_offer(original)[:3]:
        found = dict(setting.alone(original, [0, 1], calibrate))
        assert list(found) == [0, 1]
        for layer, program in found.items():
            expected = menu.rewritten(original, TARGET, [(setting, [layer])], PRESENT, calibrate)
            tokens = tokens_of(1, LENGTH, 1)
            assert torch.allclose(whole(program, tokens), whole(expected, tokens), atol=1e-4), setting.spec


def test_an_attention_that_is_gone_is_not_named_and_a_smaller_block_is() -> None:
    prune, linear, narrow, wide = (on_offer(tiny())[index] for index in (0, 1, 2, 3))
    passes = menu.told([(prune, [1]), (prune, [0]), (linear, [1]), (narrow, [0])], PRESENT)
    assert [one.spec.partition("protect=")[2].partition("]")[0] for one in passes[:2]] == ["[0", "[1"]
    assert "keep=[0]" in passes[2].spec and "keep" not in passes[3].spec
    program = tiny()
    for one in passes:
        program, report = one.apply(program, one.plan(program, TARGET))
        assert len(report.sites) == 1
    assert wide.kind == "attention"


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_products_take_what_the_codes_stand_for(kind: str) -> None:
    original, tokens = tiny(), tokens_of(1, LENGTH, 2)
    result = quantised(original, kind)
    assert quantised(original, "fp32") is original
    linears = [node for node in result.module.graph.nodes if node.target == torch.ops.aten.linear.default]
    for index, node in enumerate(linears):
        value = get_tensor(result.module, str(node.args[1].target)).detach()
        old = original.module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[index]
        bits = 8 if kind == "int8" or node is linears[-1] else 4
        codes = quantise(get_tensor(original.module, str(old.args[1].target)).detach().numpy(), bits)
        assert np.array_equal(value.numpy(), codes.values(value.shape[1]))
    (found,) = Yardstick(original, tokens, 10).distances([result])
    assert found.kl == pytest.approx(oracle(original, result, tokens, 10).kl, rel=1e-3, abs=1e-5)
    assert found.kl > 0


def test_only_what_follows_the_layer_counts_as_changed() -> None:
    original = tiny()
    window = next(one for one in on_offer(original) if one.pass_.name == "window")
    late = menu.rewritten(original, TARGET, [(window, [1])], PRESENT)
    same = unchanged(original, late)
    attentions = [node for node in late.module.graph.nodes if node.target is torch.ops.memc.attention.default]
    assert len(attentions) == 1 and attentions[0] in same
    assert late.module.graph.output_node() not in same


def test_a_node_whose_constant_or_parameter_changed_is_not_the_same() -> None:
    original = tiny()
    for change in ("parameter", "constant"):
        result = original.copy()
        attention = result.module.graph.find_nodes(op="call_function", target=torch.ops.memc.attention.default)[0]
        if change == "constant":
            attention.kwargs = {**attention.kwargs, "window": 5}
        else:
            product = result.module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[0]
            name = str(product.args[1].target)
            set_tensor(result.module, name, get_tensor(original.module, name) + 1, trainable=True)
        assert attention.name in {node.name for node in unchanged(original, original.copy())}
        assert attention.name not in {node.name for node in unchanged(original, result)}


def fitting(limits: str, **changes: Any) -> driver.Fitting:
    tokens = tokens_of(3, LENGTH, 5)
    given = {"original": tiny(), "target": TARGET, "weights": WEIGHTS, "threads": 1, "context": 64, **changes}
    given |= {"measured": tokens[:1], "checked": tokens[1:], "calibrate": calibrate}
    return driver.Fitting(limits=parse_limits(limits, 64), **given)


@pytest.fixture(scope="module")
def menu_of_tiny() -> menu.Menu:
    """What is on offer for the tiny decoder, measured once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memc.fit.menu.offered", lambda: SETTINGS)
        found = driver._chooser(fitting("kl<=1,state<=2x,decode<=2x"), menu.Kept(None), Silent()).menu
        assert len(found.settings) == 5 and set(found.weights) == set(WEIGHTS)
        return found


@pytest.fixture
def _measured(monkeypatch: pytest.MonkeyPatch, menu_of_tiny: menu.Menu) -> None:
    monkeypatch.setattr("memc.fit.driver.make_menu", lambda *_: menu_of_tiny)


def run(limits: str, **changes: Any) -> driver.Fitted:
    return driver.fit(fitting(limits, **changes), menu.Kept(None), Silent())


@pytest.mark.usefixtures("_measured")
def test_costs_are_kept_at_the_least_loss(menu_of_tiny: menu.Menu) -> None:
    fitted = run("state<=0.6x")
    passes, facts = fitted.passes, fitted.facts
    state = {one.limit: one for one in facts.limits}["state<=0.6x"]
    assert state.used <= 1 and state.reached <= 0.6 * state.original
    slots = [[None, *range(len(entries))] for entries in menu_of_tiny.slots.values()]
    every = [
        loss
        for way in itertools.product(*slots)
        for loss, cost in [told(menu_of_tiny, way)]
        if cost <= 0.6 * state.original
    ]
    assert facts.kl_expected == pytest.approx(min(every)) and fitted.weights == "fp32"
    assert len(passes) == len({layer.spec for layer in facts.layers if layer.spec})
    assert facts.binds == "state<=0.6x" and facts.kl_looser is not None and facts.kl_looser <= facts.kl_expected


def told(menu_of_tiny: menu.Menu, way: tuple[int | None, ...]) -> tuple[float, float]:
    """Return loss and bytes of state of one way to choose."""
    pairs = zip(menu_of_tiny.slots.values(), way, strict=True)
    chosen = [entries[pick] for entries, pick in pairs if pick is not None]
    more = sum(entry.more["fp32"][64].state_bytes for entry in chosen)
    return sum(entry.distance.kl_mean for entry in chosen), menu_of_tiny.original["fp32"][64].state_bytes + more


@pytest.mark.usefixtures("_measured")
def test_what_layers_ask_adds_up() -> None:
    chooser = driver._chooser(fitting("decode>=1.01x"), menu.Kept(None), Silent())
    some = chooser.fits[1 :: len(chooser.fits) // 8]
    assert {found.weights for found in some} == set(WEIGHTS)
    for found in some:
        settings = driver._settings(chooser, found)
        program = menu.rewritten(fitting("decode>=1.01x").original, TARGET, settings, chooser.menu.present)
        asked = demands(program, [64], found.weights)[64]
        assert found.asks[64].flops == pytest.approx(asked.flops)
        assert found.asks[64].bytes_read == pytest.approx(asked.bytes_read)
        assert found.asks[64].state_bytes == asked.state_bytes


@pytest.mark.usefixtures("_measured")
def test_quality_alone_gives_the_quickest_choice_that_keeps_it() -> None:
    loose = run("kl<=10")
    assert {one.name for one in loose.passes} == {"prune", "window"} and "window=3" in loose.passes[-1].spec
    assert loose.weights == "int8", "computing takes longer than reading them: int4 would gain nothing"
    facts = run("kl<=0.001").facts
    assert facts.kl_mean <= 0.001
    assert facts.limits[0].used <= 1


@pytest.mark.usefixtures("_measured")
def test_what_adds_up_wrong_is_chosen_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that lose more together than alone: the first choice does not hold, a later one does."""
    strict = run("kl<=0.004").facts
    real = Yardstick.distances

    def worse(self: Yardstick, results: Any) -> list[Distance]:
        found = real(self, results)
        checked = len(self._tokens) == 2
        return [Distance(d.tokens, 3 * d.kl, d.predicted, d.excess) if checked else d for d in found]

    monkeypatch.setattr(Yardstick, "distances", worse)
    facts = run("kl<=0.004").facts
    assert facts.kl_mean <= 0.004
    assert facts.kl_expected <= strict.kl_expected


@pytest.mark.usefixtures("_measured")
def test_what_nothing_fits_is_refused_with_how_close_it_came() -> None:
    with pytest.raises(MemcError, match="E209") as caught:
        run("state<=0.3x,kl<=0.0001")
    assert "the nearest has state@64" in str(caught.value) and "loosen" in str(caught.value)


@pytest.mark.usefixtures("_measured")
def test_a_target_without_rates_limits_no_time() -> None:
    with pytest.raises(MemcError, match="E208"):
        run("decode>=2x", target=TARGET.model_copy(update={"memory_bandwidth": None}))


def test_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    first = driver.fit(fitting("state<=0.6x"), menu.Kept(path), Silent()).facts
    monkeypatch.setattr("memc.fit.driver.make_menu", lambda *a: menu.make_menu(*a[:4], pytest.fail, *a[5:]))
    again = driver.fit(fitting("state<=0.6x"), menu.Kept(path), Silent()).facts
    assert again.model_copy(update={"seconds": 0.0}) == first.model_copy(update={"seconds": 0.0})
    path.write_text("{")
    assert menu.Kept(path).found == {}


def test_convert_fits_and_says_how(tmp_path: Path) -> None:
    data = tmp_path / "ids.npy"
    np.save(data, np.random.default_rng(0).integers(2, 67, 4000))
    model, out = make_llama(tmp_path / "model"), tmp_path / "out"
    document = api.convert(model, out, fit="state@100<=0.5x", data=[str(data)], target="cpu", backend="eager")
    assert document.verified and document.fit is not None
    assert document.measured is not None
    assert document.fit.limits[0].used <= 1
    assert {one.layer for one in document.fit.layers if one.spec} == {
        site for item in document.passes for site in range(2) if site not in {s.layer for s in item.skipped}
    }
    text = (out / "recipe.yaml").read_text()
    assert "passes:" in text and "fit:" not in text
    planned = api.convert(model, out, fit="state@100<=0.5x", data=[str(data)], backend="eager", dry_run=True)
    assert planned.fit is not None and [one.spec for one in planned.passes] == [one.spec for one in document.passes]
    rows = view.limit_rows(document.fit)
    assert rows[0][0] == "state@100<=0.5x"
    assert "nats a token" in view.summary(document.fit)
    assert sum(len(row[1]) > 0 for row in view.chosen_rows(document.fit)) >= 1


def test_what_saves_nothing_that_is_limited_is_not_measured() -> None:
    chooser = driver._chooser(fitting("state<=0.9x"), menu.Kept(None), Silent())
    assert {setting.pass_.name for setting in chooser.menu.settings} == {"linearize", "window"}
    assert list(chooser.menu.weights) == ["fp32"]


def test_no_data_is_fitted_on_what_the_model_says(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model")
    document = api.convert(model, tmp_path / "out", fit="kl<=1", backend="eager", dry_run=True)
    assert document.fit is not None and not (tmp_path / "out").exists()
    assert math.isfinite(document.fit.perplexity_ratio)
