"""The window pass: identity, the naive masked softmax, state law, options."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memc.blocks import AttentionBlock
from memc.passes.window import Window
from memc.program import Program
from memc.relation import Bounded, Close
from tests.passes.tiny_program import SLOPES, TARGET, masked_softmax, naive_run, run_pieces, tiny, tokens_of

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "alibi": {"slopes": SLOPES},
    "sink_logits": {"sink_logits": (0.5, -1.0, 2.0, 0.0)},
}


def rewrite(program: Program, **options: Any) -> Program:
    window = Window(**options)
    return window.apply(program, window.plan(program, TARGET))[0]


@settings(max_examples=6, deadline=None)
@given(window=st.integers(1, 9), sinks=st.integers(0, 4), extra=st.integers(0, 4), batch=st.integers(1, 3))
def test_short_prompts_give_the_original_logits(window: int, sinks: int, extra: int, batch: int) -> None:
    program = tiny(layers=1)
    tokens = tokens_of(batch, window + min(extra, sinks), seed=window)
    result = rewrite(program, window=window, sinks=sinks)
    torch.testing.assert_close(result.run(tokens), program.run(tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_long_prompts_equal_a_masked_softmax(variant: str) -> None:
    program = tiny(**VARIANTS[variant])
    tokens = tokens_of(2, 23)
    result = rewrite(program, window=5, sinks=2).run(tokens)
    torch.testing.assert_close(result, naive_run(program, masked_softmax(5, 2), tokens), atol=1e-5, rtol=0)
    assert (result - naive_run(program, masked_softmax(5, 1), tokens)).abs().max() > 1e-3
    assert (result - naive_run(program, masked_softmax(6, 2), tokens)).abs().max() > 1e-3


@settings(max_examples=4, deadline=None)
@given(cuts=st.lists(st.integers(1, 19), max_size=4), sinks=st.integers(0, 3))
def test_any_split_equals_one_run(cuts: list[int], sinks: int) -> None:
    result = rewrite(tiny(layers=1), window=4, sinks=sinks)
    tokens = tokens_of(2, 20)
    positions = torch.arange(20).expand_as(tokens)
    torch.testing.assert_close(run_pieces(result, tokens, positions, cuts), result.run(tokens), atol=2e-5, rtol=0)


def test_states_become_constant_and_keep_their_order() -> None:
    program = tiny()
    result = rewrite(program, window=5, sinks=2, keep="[1]")
    assert [spec.name for spec in result.states] == [spec.name for spec in program.states]
    assert [spec.grows for spec in result.states] == [None, None, None, 2, 2, 1]
    assert result.states[0].shape == ("B", 2, 7, 10)
    assert (result.states[2].shape, result.states[2].init) == (("B", 7), -1)
    targets = [str(node.target) for node in result.module.graph.nodes]
    assert (targets.count("memc.window_memory.default"), targets.count("memc.attention.default")) == (1, 1)
    assert program.states[0].grows == 2, "the program given stays as it was"
    for spec, held in zip(result.states, result(*_inputs(), *result.new_state(2))[1:], strict=True):
        assert held.dtype == spec.dtype


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return tokens_of(2, 6), torch.arange(6).expand(2, 6)


def test_a_sliding_layer_that_fits_stays_the_same_function() -> None:
    program = tiny(window=6)
    window = Window(window=16)
    plan = window.plan(program, TARGET)
    result, report = window.apply(program, plan)
    assert plan.relations == (Close(1e-4),)
    assert report.details["0"] == {"window": 6, "sinks": 0, "state_bytes": 6 * (2 * 20 * 4 + 8)}
    tokens = tokens_of(2, 30)
    torch.testing.assert_close(result.run(tokens), program.run(tokens), atol=1e-5, rtol=0)


def test_a_sliding_layer_that_does_not_fit_is_cut() -> None:
    program = tiny(window=12)
    window = Window(window=5, sinks=2)
    plan = window.plan(program, TARGET)
    assert plan.relations == (Close(1e-4, tokens=5), Bounded("perplexity_ratio", None))
    tokens = tokens_of(2, 20)
    result = window.apply(program, plan)[0].run(tokens)
    torch.testing.assert_close(result, naive_run(program, masked_softmax(5, 2), tokens), atol=1e-5, rtol=0)


def test_a_new_sequence_forgets_the_old_one() -> None:
    result = rewrite(tiny(layers=1), window=4, sinks=2)
    first, second = tokens_of(1, 9, 1), tokens_of(1, 11, 2)
    positions = torch.cat([torch.arange(9), torch.arange(11)])[None]
    both = run_pieces(result, torch.cat([first, second], 1), positions, [7, 9, 12])
    torch.testing.assert_close(both[:, 9:], result.run(second), atol=2e-5, rtol=0)


def test_heads_that_a_plan_keeps_stay_as_they_are() -> None:
    program = tiny(sink_logits=(0.5, -1.0, 2.0, 0.0), slopes=SLOPES)
    options = Window(window=5, sinks=2)
    plan = options.plan(program, TARGET)
    kept = {0: (1,), 1: (0,)}
    sites = tuple(replace(site, kept=kept[site.layer]) for site in plan.sites)
    result, _ = options.apply(program, replace(plan, sites=sites))

    def attention(a: dict[str, Any], block: AttentionBlock, hidden: Tensor) -> Tensor:
        out, near = (masked_softmax(window, 2)(a, block, hidden) for window in (10**6, 5))
        heads = slice(0, 2) if block.layer == 0 else slice(2, 4)
        out[:, heads] = near[:, heads]
        return out

    tokens = tokens_of(2, 17)
    expected = naive_run(program, attention, tokens)
    torch.testing.assert_close(result.run(tokens), expected, atol=5e-5, rtol=0)
