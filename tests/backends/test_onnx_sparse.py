"""``memc::sparse_attention`` and ``memc::quantised_attention`` in ONNX: long calls, ties, and what is checked."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import op_programs as ops
import pytest
import torch
from onnx_support import build, compare, span

from memc.backends.onnx import blocks
from memc.conversion import lowering
from memc.conversion.lowering import CHOICE_KL, chooses_from, verify_lowered
from memc.dialect.quantised_attention import BITS
from memc.dialect.sparse_attention import METHODS
from memc.kernels.compact_attention import choose
from memc.program import Program
from memc.verify import VerificationText

OPTIONS: dict[str, Any] = {"page": 4, "budget": 24, "sinks": 2, "window": 9}
FORMS = [
    (method, form, rerank)
    for method in METHODS
    if method != "bounds2"  # whose super-pages are to be more than are entered: test_levels_lowered
    for form in ("blocks", "tokens")
    for rerank in (1, 2)
    if rerank == 1 or method != "landmark"
]


@pytest.mark.parametrize(("method", "form", "rerank"), FORMS)
def test_long_calls_equal_the_reference(
    method: str, rerank: int, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "tokens":
        monkeypatch.setitem(blocks.REACH, method, 0)
    program = ops.sparse_attention(method=method, rerank=rerank, dense_below=30, channels=2, **OPTIONS)
    runner = build(program, tmp_path, context=160)
    calls = [([span(0, 100), span(0, 20, right=80)], [99]), ([span(100, 7), span(20, 7)], None)]
    calls += [([[107 + i], [27 + i]], None) for i in range(12)]
    assert compare(program, runner, calls) < 1e-4


@pytest.mark.parametrize(
    ("method", "refresh", "form"),
    [("bounds", 0, "tokens"), ("bounds", 0, "blocks"), ("lowbit", 0, "blocks"), ("moments", 3, "tokens")],
)
def test_long_calls_by_mass_equal_the_reference(
    method: str, refresh: int, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "tokens":
        monkeypatch.setitem(blocks.REACH, method, 0)
    options: dict[str, Any] = {**OPTIONS, "method": method, "refresh": refresh, "dense_below": 30, "channels": 2}
    program = ops.sparse_attention(mass=0.6, **options)
    runner = build(program, tmp_path, context=160)
    calls = [([span(0, 100), span(0, 20, right=80)], [99]), ([span(100, 7), span(20, 7)], None)]
    calls += [([[107 + i], [27 + i]], None) for i in range(12)]
    assert compare(program, runner, calls) < 1e-4
    assert compare(ops.sparse_attention(mass=0.9, **options), runner, calls) > 1e-3, "another share is another function"


@pytest.mark.parametrize(
    ("method", "rerank", "refresh"),
    [("bounds", 1, 1), ("bounds", 2, 9), ("lowbit", 2, 4), ("hip", 1, 4), ("landmark", 1, 4)],
)
def test_long_calls_that_share_choices_equal_the_reference(
    method: str, rerank: int, refresh: int, tmp_path: Path
) -> None:
    program = ops.sparse_attention(method=method, rerank=rerank, refresh=refresh, dense_below=30, channels=2, **OPTIONS)
    runner = build(program, tmp_path, context=160)
    calls = [([span(0, 100), span(0, 20, right=80)], [99]), ([span(100, 7), span(20, 7)], None)]
    calls += [([[107 + i], [27 + i]], None) for i in range(12)]
    calls += [([span(0, 40), [-1] * 40], None), ([[40], [39]], None)]
    assert compare(program, runner, calls) < 1e-4
    other = ops.sparse_attention(method=method, rerank=rerank, refresh=5, dense_below=30, channels=2, **OPTIONS)
    assert compare(other, runner, calls) > 1e-3, "another turn is another function"


@pytest.mark.parametrize("form", ["blocks", "tokens"])
@pytest.mark.parametrize("rerank", [1, 2])
@pytest.mark.parametrize("bits", BITS)
def test_long_calls_over_few_bits_equal_the_reference(
    bits: int, rerank: int, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "tokens":
        monkeypatch.setitem(blocks.REACH, "bounds", 0)
    program = ops.sparse_attention(bits=bits, rerank=rerank, dense_below=30, **OPTIONS)
    runner = build(program, tmp_path, context=160)
    calls = [([span(0, 100), span(0, 20, right=80)], [99]), ([span(100, 7), span(20, 7)], None)]
    calls += [([[107 + i], [27 + i]], None) for i in range(12)]
    assert compare(program, runner, calls) < 1e-4
    fewer = build(ops.sparse_attention(bits=bits, rerank=rerank, **OPTIONS), tmp_path / "fewer", context=160)
    assert compare(program, fewer, calls) > 1e-3, "below the guard everything is read"


@pytest.mark.parametrize("method", ["longheads", "infllm"])
def test_long_calls_of_compact_places_equal_the_reference(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**OPTIONS, "method": method}
    program = ops.compact_attention(dense_below=30, **options)
    runner = build(program, tmp_path, context=160)
    calls = [([span(0, 100), span(0, 20, right=80)], [99]), ([span(100, 7), span(20, 7)], None)]
    calls += [([[107 + i], [27 + i]], None) for i in range(6)]
    assert compare(program, runner, calls) < 1e-4
    right = choose.read

    def at_true_places(*a: Any) -> choose.Reads:
        reads = right(*a)
        return replace(reads, key_at=reads.tokens, query_at=a[2][:, None].expand_as(reads.query_at))

    monkeypatch.setattr("memc.kernels.compact_attention.reference.read", at_true_places)
    assert compare(program, runner, calls) > 1e-3, "rotated at true positions is another function"


@pytest.mark.parametrize("length", [22, 23, 24])
def test_what_fills_the_buffers_to_the_last_slot_is_held(length: int, tmp_path: Path) -> None:
    """Pages of 4 in buffers of so many tokens and one for padding, which may stand on the page of the last token."""
    program = ops.sparse_attention(bits=4, **{**OPTIONS, "budget": 20})
    runner = build(program, tmp_path, context=length)
    calls = [([span(0, 17), span(0, 3, left=14)], None), ([span(17, length - 18), span(3, length - 18)], None)]
    assert compare(program, runner, [*calls, ([[length - 1], [-1]], None)]) < 1e-4
    state = runner.new_state(2)
    assert state.current["past_key0"].nbytes == 2 * 2 * -(-(length + 1) // 4) * 4 * 4
    assert state.current["past_key0"].dtype == np.uint8


def test_landmarks_of_strong_logits_fill_the_buffers_to_the_last_slot(tmp_path: Path) -> None:
    """Blocks pad the last page, of which the buffers have a part; keys are forty times as large as elsewhere."""
    program = ops.sparse_attention(method="landmark", **{**OPTIONS, "budget": 16, "window": 2})
    with torch.no_grad():
        program.module.key_weight.mul_(40)  # type: ignore[union-attr, operator]
    runner = build(program, tmp_path, context=34)
    calls = [([span(0, 31), span(0, 9, left=22)], None), ([[31, 32, 33], [9, -1, -1]], None)]
    assert compare(program, runner, calls) < 1e-3


def of_equal_keys(**options: Any) -> Program:
    """Make every key the same, so that all scores are equal, and every value another."""
    program = ops.sparse_attention(**OPTIONS, **options)
    with torch.no_grad():
        program.module.key_weight.zero_()  # type: ignore[union-attr, operator]
    return program


@pytest.mark.parametrize(
    ("method", "form", "rerank"),
    [
        *(form for form in FORMS if form[0] != "landmark"),
        *(("few bits", form, rerank) for form in ("blocks", "tokens") for rerank in (1, 2)),
    ],
)
def test_equal_scores_choose_equally(
    rerank: int, method: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memc.kernels.sparse_attention import choose

    if form == "tokens":
        monkeypatch.setattr(blocks, "REACH", dict.fromkeys(blocks.REACH, 0))
    chosen_by = {"bits": 4} if method == "few bits" else {"method": method, "channels": 2}
    program = of_equal_keys(rerank=rerank, **chosen_by)
    runner = build(program, tmp_path, context=120)
    calls = [([span(0, 100)], None), ([[100]], None), ([[101]], None)]
    assert compare(program, runner, calls) < 1e-5
    right, reached = choose.first, choose.reached
    if method == "hip":
        monkeypatch.setattr(choose, "reached", lambda x, *rest: reached(x + 1e-5 * torch.arange(x.shape[-1]), *rest))
    else:
        monkeypatch.setattr(choose, "first", lambda rank, count: right(rank.flip(-1), count).flip(-1))
    assert compare(program, runner, calls) > 1e-3, "the higher index of equals is another function"


def of_few_exact_tokens(**options: Any) -> Program:
    """Make tokens of four kinds, whose scores are whole numbers of 1/64: those of a kind score alike to the last bit.

    Other keys are a bit apart where a prompt and a step compute them, and so are all choices of pages that end alike.
    """
    program, random = ops.sparse_attention(method="landmark", **options), torch.Generator().manual_seed(3)
    with torch.no_grad():
        kinds = torch.randint(-2, 3, (4, 24), generator=random).float()
        program.module.embedding.copy_(kinds[torch.arange(ops.VOCAB) % 4])  # type: ignore[union-attr, operator]
        for name in ("query_weight", "key_weight"):
            weight = program.module.get_parameter(name)
            weight.copy_(torch.randint(-1, 2, weight.shape, generator=random))
    for node in program.module.graph.nodes:
        if "scale" in node.kwargs:
            node.update_kwarg("scale", 2.0**-6)
    program.module.recompile()
    return program


@pytest.mark.parametrize(
    ("form", "options"),
    [("blocks", {}), ("blocks", {"mass": 0.6}), ("tokens", {}), ("turns", {"refresh": 4, "groups": 3, "lse": True})],
    ids=["blocks", "blocks by mass", "tokens", "turns"],
)
def test_short_pages_of_few_tokens_are_chosen_by_index(
    form: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memc.kernels.refreshed_attention import choose as listing
    from memc.kernels.sparse_attention import choose

    if form == "tokens":
        monkeypatch.setattr(blocks, "REACH", dict.fromkeys(blocks.REACH, 0))
    program = of_few_exact_tokens(**OPTIONS, **options)
    runner = build(program, tmp_path, context=160)
    calls = [([span(0, 100), span(0, 20, right=80)], [99]), ([span(100, 7), span(20, 7)], None)]
    calls += [([[107 + i], [27 + i]], None) for i in range(12)]
    assert compare(program, runner, calls) < 1e-5
    right = choose.ranks

    def by_higher_index(*a: Any) -> torch.Tensor:
        rank = right(*a)
        return rank + 1e-5 * torch.arange(rank.shape[-1])

    for module in (choose, listing):
        monkeypatch.setattr(module, "ranks", by_higher_index)
    assert compare(program, runner, calls) > 1e-3, "the higher index of equals is another function"


@pytest.mark.parametrize("method", ["bounds", "lowbit", "hip"])
def test_equal_scores_are_listed_equally(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memc.kernels.refreshed_attention import choose

    program = of_equal_keys(method=method, channels=2, refresh=5)
    runner = build(program, tmp_path, context=120)
    calls = [([span(0, 100)], None), ([[100]], None), ([[101]], None)]
    assert compare(program, runner, calls) < 1e-5
    right = choose.ranks

    def by_higher_index(*a: Any) -> torch.Tensor:
        rank = right(*a)
        return rank + 1e-5 * torch.arange(rank.shape[-1])

    monkeypatch.setattr(choose, "ranks", by_higher_index)
    assert compare(program, runner, calls) > 1e-3, "the higher index of equals is another function"


def test_blocks_take_what_tokens_take_where_their_number_is_odd(tmp_path: Path) -> None:
    program = ops.sparse_attention(
        method="lowbit", channels=2, rerank=2, softcap=1.5, sink_logits=True, lse=True, **OPTIONS
    )
    runner = build(program, tmp_path, context=160)
    assert compare(program, runner, [([span(0, 33)], None), ([span(33, 9)], None), ([span(42, 95)], None)]) < 1e-4


def largest_tensor(
    program: Program, length: int, folder: Path, monkeypatch: pytest.MonkeyPatch, *, portable: bool = False
) -> int:
    """Return the bytes of the largest tensor that a call of ``length`` tokens makes, as the runtime's profile says."""
    made = onnxruntime.SessionOptions

    def profiled() -> onnxruntime.SessionOptions:
        options = made()
        options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
        return options

    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "SessionOptions", profiled)
        runner = build(program, folder / "lowered", context=length, portable=portable)
    at = np.arange(length)[None]
    assert np.isfinite(runner.run(at % 37, at, runner.new_state(1), np.array([length - 1]))).all()
    events = json.loads(Path(runner.session.end_profiling()).read_text())
    return max(int(event["args"].get("output_size", 0)) for event in events if "args" in event)


@pytest.mark.parametrize("bits", [0, 4])
def test_no_tensor_has_an_entry_for_each_pair_of_tokens(
    bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = ops.sparse_attention(heads=6, groups=2, bits=bits, **OPTIONS)
    assert largest_tensor(program, 6000, tmp_path, monkeypatch) < 6000 * 6000, "not even a mask of all pairs"


@pytest.mark.parametrize("method", ["longheads", "infllm"])
def test_compact_places_need_no_entry_for_each_pair_of_tokens(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = ops.compact_attention(method=method, **OPTIONS)
    assert largest_tensor(program, 1200, tmp_path, monkeypatch) < 1200 * 1200, "not even a mask of all pairs"


def test_a_tensor_with_an_entry_for_each_pair_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert largest_tensor(ops.attention(), 1000, tmp_path, monkeypatch, portable=True) >= 1000 * 1000


def test_a_lowered_choice_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = ops.sparse_attention(rerank=2, dense_below=40, **OPTIONS)
    runner = build(program, tmp_path, context=80)
    tokens = torch.randint(37, (4, 40), generator=torch.Generator().manual_seed(1))
    text = VerificationText(tokens, "drawn")
    assert chooses_from(program) == 40 and chooses_from(ops.attention()) is None
    checks = {check.name: check for check in verify_lowered(runner, program, text, "fp32", None)}
    assert all(check.passed for check in checks.values())
    assert checks["lowered_choice"].value <= CHOICE_KL
    # Tokens of few kinds have equal keys.
    assert re.search(r"; [1-9]\d* of 80 choices within 1e-05 of the cut$", checks["lowered_choice"].detail)
    other = ops.sparse_attention(rerank=2, dense_below=40, **{**OPTIONS, "budget": 32})
    checks = {check.name: check for check in verify_lowered(runner, other, text, "fp32", None)}
    assert checks["lowered_logits"].passed and not checks["lowered_choice"].passed
    short = build(program, tmp_path / "short", context=50)
    assert [check.name for check in verify_lowered(short, program, text, "fp32", None)] == ["lowered_logits"]


def test_what_is_rounded_may_move_as_much_as_in_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "CHOICE_KL", 0.0)
    program = ops.sparse_attention(bits=4, rerank=2, dense_below=40, **OPTIONS)
    runner = build(program, tmp_path, context=80)
    text = VerificationText(torch.randint(37, (4, 40), generator=torch.Generator().manual_seed(1)), "drawn")
    check = verify_lowered(runner, program, text, "fp32", None)[-1]
    assert check.noise_floor and check.budget == 10 * check.noise_floor
    other = ops.sparse_attention(bits=4, rerank=2, dense_below=40, **{**OPTIONS, "budget": 32})
    check = verify_lowered(runner, other, text, "fp32", None)[-1]
    assert check.name == "lowered_choice" and check.budget and not check.passed
