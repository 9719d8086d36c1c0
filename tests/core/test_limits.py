"""Limits: read, refused, told; and the search under them against brute force."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memc.conversion.fitting import _within
from memc.errors import MemcError
from memc.fit.limits import parse_limits, read_limits
from memc.progress import Silent
from memc.recipe import Recipe
from memc.report import fit as view
from memc.report.files import FitFacts, FitLayer, FitLimit
from memc.search import Choice, frontier
from tests.passes.tiny_program import tiny


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
        ("state@100000000000000000000k<=0.2x", "at most 2147483647"),
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


def test_a_perplexity_spends_what_it_is_over_the_originals() -> None:
    (limit,) = parse_limits("ppl<=1.21x").limits
    assert (limit.spent(1.21), limit.spent(1.1), limit.spent(1.0), limit.spent(0.9)) == pytest.approx((1, 0.5, 0, 0))
    assert limit.used(1.0) == pytest.approx(1 / 1.21)
    (state,) = parse_limits("state<=2x").limits
    assert state.spent(3.0, 2.0) == state.used(3.0, 2.0) == 0.75
