"""Prompts of ``memc::refreshed_attention`` in ONNX, which go turn by turn, against the reference kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import op_programs as ops
import pytest
import torch
from onnx_support import SCENARIOS, Calls, build, compare, span
from test_onnx_conformance import TOLERANCE
from test_onnx_sparse import OPTIONS, largest_tensor

from memc.backends.onnx import blocks, turn_reads, turns
from memc.kernels.sparse_attention.choose import Rule

CASES = [case for case in ops.CASES if "refreshed" in case]

# Rows at different places in their turns, padded on either side; calls that begin and end within one; steps between
# calls of many tokens; a row that ends, and one that starts anew.
CALLS: Calls = [
    ([span(0, 61), span(0, 37, left=24), span(0, 50, right=11)], [60, 49]),
    ([span(61, 29), span(37, 12, left=3, right=14), span(50, 29)], None),
    ([[90], [49], [-1]], None),
    ([[91], [50], [79]], None),
    ([span(92, 33), span(51, 33), span(80, 9, left=24)], None),
    ([span(125, 10), [-1] * 10, span(0, 10)], None),
    ([span(135, 23), [-1] * 23, span(10, 23)], None),
]

FORMS: dict[str, dict[str, Any]] = {
    "a turn of one token": {"refresh": 1},
    "of as many as the window": {"refresh": 9, "window": 9},
    "ranked again": {"refresh": 4, "rerank": 2},
    "three times": {"refresh": 5, "rerank": 3, "dense_below": 7},
    "no sinks": {"refresh": 4, "sinks": 0, "rerank": 2},
    "many sinks": {"refresh": 6, "sinks": 5, "dense_below": 3},
    "no room beside sinks and window": {"refresh": 9, "budget": 16},
    "no room, ranked again": {"refresh": 8, "budget": 16, "rerank": 2, "page": 8, "window": 8, "sinks": 0},
    "pages of one token": {"refresh": 3, "page": 1, "window": 5, "budget": 8},
    "by mass": {"refresh": 4, "mass": 0.6},
    "by mass, ranked again": {"refresh": 5, "mass": 0.8, "rerank": 2, "method": "moments"},
    "moments": {"refresh": 7, "method": "moments", "groups": 1},
    "by means": {"refresh": 3, "method": "hcam", "groups": 6},
    "by channels": {"refresh": 5, "method": "lowbit", "channels": 2},
    "by channels, ranked again": {"refresh": 9, "method": "lowbit", "channels": 3, "rerank": 2},
    "by channels, by mass": {"refresh": 4, "method": "lowbit", "channels": 2, "rerank": 2, "mass": 0.7},
    "by a tree": {"refresh": 4, "method": "hip"},
    "by a tree, ranked again": {"refresh": 9, "method": "hip", "rerank": 2, "groups": 3},
    "two levels": {"refresh": 4, "method": "bounds2", "page": 1, "window": 5, "budget": 8, "beam": 1},
    "two levels, ranked again": {"refresh": 3, "method": "bounds2", "page": 2, "window": 3, "budget": 8, "rerank": 2},
    # Pages of 8 and more: of shorter ones so many end with the same of few tokens that rounding decides among them, but
    # where nothing is rounded (test_short_pages_of_few_tokens_are_chosen_by_index).
    "by landmarks": {"refresh": 9, "method": "landmark", "page": 8, "budget": 32},
    "every option": {"refresh": 4, "rerank": 2, "softcap": 1.5, "sink_logits": True, "lse": True, "layers": 2},
    "landmarks, every option": {
        "refresh": 3,
        "method": "landmark",
        "page": 8,
        "budget": 32,
        "mass": 0.8,
        "softcap": 1.5,
        "sink_logits": True,
        "lse": True,
        "groups": 3,
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_turns_equal_the_reference(form: str, tmp_path: Path) -> None:
    program = ops.sparse_attention(**{**OPTIONS, **FORMS[form]})
    runner = build(program, tmp_path, context=160)
    assert compare(program, runner, CALLS) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_turns_of_few_tokens_equal_the_reference(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that every op is run in are short: here none is short enough to go token by token."""
    monkeypatch.setattr(blocks, "FEW", 0)
    program = ops.CASES[case]()
    runner = build(program, tmp_path)
    worst = {name: compare(program, runner, calls) for name, calls in SCENARIOS.items()}
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("fetched", [0, 300])
def test_steps_of_one_turn_and_of_several_are_the_same(
    fetched: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turn_reads, "FETCHED", fetched)
    options: dict[str, Any] = {**OPTIONS, "refresh": 4, "rerank": 2}
    assert turn_reads.Turns.of(rule(options)).count == max(1, fetched // 52)
    program = ops.sparse_attention(**options)
    assert compare(program, build(program, tmp_path, context=160), CALLS) < TOLERANCE


def rule(options: dict[str, Any]) -> Rule:
    return Rule(scale=1.0, method="bounds", **options)


@pytest.mark.parametrize(
    ("part", "right", "wrong"),
    [
        ("_lists", "Gather<axis = 4>(q_scaled, zero)", "Gather<axis = 4>(q_scaled, one)"),
        ("_lists", "last_turn = Max(last_column, zero)", "last_turn = Mul(last_column, zero)"),
        ("scan", "turn_first = Sub(since_first, past_turn)", "turn_first = Identity(since_first)"),
    ],
    ids=["another token chooses", "another list is kept", "turns begin with calls"],
)
def test_faults_are_found(part: str, right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = getattr(turns, part)

    def faulty(*a: Any) -> str:
        text = write(*a)
        assert right in text
        return text.replace(right, wrong)

    monkeypatch.setattr(turns, part, faulty)
    program = ops.sparse_attention(**OPTIONS, refresh=4)
    assert compare(program, build(program, tmp_path, context=160), CALLS) > 1e-3


@pytest.mark.parametrize("method", ["bounds", "lowbit", "hip"])
def test_equal_scores_are_ranked_again_equally(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memc.kernels.sparse_attention import choose

    program = ops.sparse_attention(method=method, channels=2, refresh=5, rerank=2, **OPTIONS)
    with torch.no_grad():
        program.module.key_weight.zero_()  # type: ignore[union-attr, operator]
    runner = build(program, tmp_path, context=120)
    calls: Calls = [([span(0, 100)], None), ([[100]], None), ([span(101, 9)], None)]
    assert compare(program, runner, calls) < 1e-5
    right = choose.first
    monkeypatch.setattr(choose, "first", lambda rank, count: right(rank.flip(-1), count).flip(-1))
    assert compare(program, runner, calls) > 1e-3, "the higher index of equals is another function"


@pytest.mark.parametrize(("method", "refresh"), [("bounds", 8), ("lowbit", 8), ("bounds", 1)])
def test_no_tensor_has_an_entry_for_each_pair_of_tokens(
    method: str, refresh: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**OPTIONS, "heads": 6, "groups": 2, "method": method, "channels": 2, "refresh": refresh, "rerank": 2}
    program = ops.sparse_attention(**options)
    assert largest_tensor(program, 6000, tmp_path, monkeypatch) < 6000 * 6000, "not even a mask of all pairs"
