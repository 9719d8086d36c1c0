"""Fitting to limits: chosen, held against other text, converted, refused."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memc import api
from memc.analysis.sensitivity import Distance, Yardstick
from memc.backends.eager import EagerBackend
from memc.blocks import AttentionBlock
from memc.cost import demands
from memc.errors import MemcError
from memc.fit import driver, menu
from memc.fit.limits import parse_limits
from memc.passes.prune import Prune
from memc.passes.window import Window
from memc.progress import Silent
from memc.raising import find_blocks
from memc.report import fit as view
from tests.core.converting import make_llama
from tests.core.fitting import LENGTH, PRESENT, SETTINGS, TARGET, WEIGHTS, calibrate, on_offer
from tests.passes.tiny_program import tiny, tokens_of


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("memc.fit.menu.offered", lambda: SETTINGS)
    monkeypatch.setattr("memc.conversion.fitting.LENGTHS", (2 * LENGTH, LENGTH))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


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


def test_an_attention_of_fewer_heads_is_still_one_for_the_next() -> None:
    program = tiny()
    cut = Prune(amount=0.2, unit="heads", of="layers", alike=True, protect="none", protect_heads="none", refit=False)
    heads, wide = (menu.Setting(one, one.plan(program, TARGET)) for one in (cut, Window(window=9, sinks=1)))
    assert heads.kind == "attention" and cut.keeps_form() and not Prune(unit="layers").keeps_form()
    first, second = menu.told([(heads, [1]), (wide, [0])], PRESENT)
    assert "protect=[0]" in first.spec and "keep=[1]" in second.spec
    result = menu.rewritten(program, TARGET, [(heads, [1]), (wide, [0])], PRESENT)
    kinds = [(block.layer, block.num_kv_heads) for block in find_blocks(result) if isinstance(block, AttentionBlock)]
    before = [block.num_kv_heads for block in find_blocks(program) if isinstance(block, AttentionBlock)]
    assert kinds == [(1, before[1] - 1)]


def fitting(limits: str, **changes: Any) -> driver.Fitting:
    tokens = tokens_of(3, LENGTH, 5)
    given = {"original": tiny(), "target": TARGET, "weights": WEIGHTS, "threads": 1, "context": 64, **changes}
    given |= {"measured": tokens[:1], "checked": tokens[1:], "calibrate": calibrate}
    return driver.Fitting(limits=parse_limits(limits, 64), **given)


@pytest.fixture(scope="module")
def menu_of_tiny() -> menu.Menu:
    """What is on offer for the tiny decoder, measured once: all of it, as nothing keeps the limits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memc.fit.menu.offered", lambda: SETTINGS)
        found = driver._chooser(fitting("kl<=1,state<=0.01x,decode<=0.01x"), menu.Kept(None), Silent()).menu
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


class Known(dict[str, Distance]):
    """Distances as if everything had been measured."""

    def __contains__(self, key: object) -> bool:
        return True

    def get(self, key: str, default: Any = None) -> Any:
        return self[key]

    def __missing__(self, key: str) -> Distance:
        return Distance(tokens=1, kl=0.1)


def specs(limits: str) -> list[str]:
    kept = menu.Kept(None)
    kept.found = Known()
    chooser = driver._chooser(fitting(limits), kept, Silent())
    return [setting.spec for setting in chooser.menu.settings if setting.pass_.name == "window"]


def test_a_cheaper_setting_is_not_measured_where_a_dearer_one_everywhere_is_cheap_enough() -> None:
    wide, narrow = "window:window=9,sinks=1", "window:window=3,sinks=1"
    assert specs("state<=0.9x") == specs("state<=0.9x,kl<=0.1") == [wide]
    assert specs("state<=0.05x") == [narrow, wide], "nine tokens of 64 are too many"
    assert specs("kl<=0.1") == [narrow, wide], "as quick as can be"


@pytest.mark.parametrize("asked", [None, "fp32"])
def test_weights_are_chosen_unless_they_are_asked_for(
    asked: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EagerBackend, "weights", ("fp32", "int8"))
    monkeypatch.setattr(EagerBackend, "refuses_weights", lambda self, weights, target: None)
    model = make_llama(tmp_path / "model")
    document = api.convert(
        model, tmp_path / "out", fit="kl<=1", weights=asked, backend="eager", dry_run=True, threads=1
    )
    assert document.fit is not None
    assert (document.weights, document.fit.weights) == (("int8", "int8") if asked is None else ("fp32", "fp32"))
    assert set(document.fit.weights_kl) == ({"int8"} if asked is None else set())


def test_no_data_is_fitted_on_what_the_model_says(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model")
    document = api.convert(model, tmp_path / "out", fit="kl<=1", backend="eager", dry_run=True)
    assert document.fit is not None and not (tmp_path / "out").exists()
    assert math.isfinite(document.fit.perplexity_ratio)
