"""``memc::events``, and what ``memc::sparse_attention`` takes by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import memc.kernels  # noqa: F401
from memc.kernels.events import reference
from memc.kernels.sparse_attention import events as by_event
from memc.kernels.sparse_attention.choose import Rule, best_of_group, candidates, chosen, strongest
from tests.kernels import events_oracle as oracle
from tests.kernels.cases import F64, Shape, cut, shapes, walk
from tests.kernels.oracles import sparse_choice
from tests.kernels.test_sparse_attention import sized

EVENTS = torch.ops.memc.events
VOCAB, HISTORY = 9, 5
rules = st.fixed_dictionaries(
    {
        "gamma": st.sampled_from([0.0, 0.7]),
        "longest": st.sampled_from([1, 2, 5]),
        "refine": st.sampled_from(["modularity", "conductance", "none"]),
    }
)


def make(shape: Shape, **walking: float) -> tuple[dict[str, Tensor], torch.Generator]:
    generator = shape.generator()
    logits = 2 * torch.randn(shape.batch, shape.tokens, VOCAB, dtype=F64, generator=generator)
    tokens = torch.randint(VOCAB, (shape.batch, shape.tokens), generator=generator)
    positions = walk(shape, generator, **walking)
    return {"logits": logits, "tokens": tokens, "positions": positions, "key": shape.qkv(generator)[1]}, generator


def fresh(call: dict[str, Tensor], longest: int, slots: int = 0) -> list[Tensor]:
    (batch, groups, _, size), logits = call["key"].shape, call["logits"]
    fixed = [logits.new_zeros(batch, VOCAB), logits.new_zeros(batch, HISTORY)]
    grown = [torch.full((batch, slots), -1) for _ in range(2)]
    return [*fixed, logits.new_zeros(batch, groups, longest + 1, size), *grown]


def run(call: dict[str, Tensor], parts: list[slice], **rule: Any) -> list[Tensor]:
    """Run the op in several calls: surprises joined, then the state."""
    state, surprises = fresh(call, rule["longest"]), []
    for part in parts:
        given = (call["logits"][:, part], call["tokens"][:, part], call["positions"][:, part], call["key"][:, :, part])
        surprise, *state = EVENTS(*given, *state, **rule)
        surprises.append(surprise)
    return [torch.cat(surprises, 1), *state]


@given(shapes(40), rules)
def test_events_equal_the_oracle_however_the_call_is_cut(shape: Shape, rule: dict[str, Any]) -> None:
    call, generator = make(shape)
    whole = run(call, [slice(None)], **rule)
    for b in range(shape.batch):
        columns, last = list[list[int]](), call["positions"][b].tolist()
        for column, p in enumerate(last):
            columns += [[]] if p == 0 else []
            if p >= 0:
                columns[-1].append(column)
        for number, one in enumerate(columns):
            logits, keys, tokens = call["logits"][b, one], call["key"][b][:, one], call["tokens"][b, one].tolist()
            surprise, numbers = oracle.numbered(logits, tokens, keys, **rule, history=HISTORY)
            torch.testing.assert_close(whole[0][b, one], torch.tensor(surprise, dtype=F64))
            now = number == len(columns) - 1
            assert whole[4][b, one].tolist() == (numbers if now else [-1] * len(one))
            assert whole[5][b, one].tolist() == (list(range(len(one))) if now else [-1] * len(one))
    for one, other in zip(whole, run(call, cut(shape.tokens, generator), **rule), strict=True):
        torch.testing.assert_close(one, other)


@settings(max_examples=15, deadline=None)
@given(shapes(30), rules)
def test_a_number_is_known_as_late_as_an_event_is_long(shape: Shape, rule: dict[str, Any]) -> None:
    call, _ = make(shape, padding=0.0, restart=0.0)
    state, seen = fresh(call, rule["longest"]), torch.full((shape.batch, shape.tokens), -1)
    for t in range(shape.tokens):
        part = {name: x[:, :, t : t + 1] if name == "key" else x[:, t : t + 1] for name, x in call.items()}
        _, *state = EVENTS(*part.values(), *state, **rule)
        held = state[3]
        assert bool((held[:, : max(0, t - rule["longest"] + 1)] >= 0).all())
        steps = held.diff(dim=1)[(held >= 0)[:, 1:]]
        assert bool(((steps == 0) | (steps == 1)).all()), "numbers rise by one"
        before = seen[:, : t + 1]
        assert torch.equal(held.where(before >= 0, -1), before), "and never change"
        seen[:, : t + 1] = held


@settings(max_examples=20, deadline=None)
@given(shapes(30), rules)
def test_buffers_hold_what_is_appended(shape: Shape, rule: dict[str, Any]) -> None:
    call, generator = make(shape, restart=0.0)
    whole, state = run(call, [slice(None)], **rule), fresh(call, rule["longest"], slots=shape.tokens + 1)
    old, _ = make(Shape(shape.batch, shape.groups, 1, shape.tokens, shape.key_size, 2, 1), restart=0.0, padding=0.0)
    torch.ops.memc.events_(*old.values(), *state, **rule)  # another sequence, which is over
    surprises = []
    for part in cut(shape.tokens, generator):
        given = (call["logits"][:, part], call["tokens"][:, part], call["positions"][:, part], call["key"][:, :, part])
        surprises.append(torch.ops.memc.events_(*given, *state, **rule))
    for b in range(shape.batch):
        held = call["positions"][b] >= 0
        torch.testing.assert_close(torch.cat(surprises, 1)[b], whole[0][b])
        if held.any():
            assert torch.equal(state[3][b, call["positions"][b, held]], whole[4][b, held])


FAULTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "a boundary one late": ("_refined", lambda right: lambda *a: (right(*a) + 1).minimum(a[2])),
    "by all surprises": ("_surprising", lambda right: lambda s, ring, p, g: right(s, ring, p, g) | (s > 3)),
    "keys in others' slots": ("_put", lambda right: lambda ring, axis, p, *a: right(ring, axis, (p - 1) % 9, *a)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_oracle_sees_a_fault(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, rule = Shape(1, 2, 1, 40, 4, 2, seed=5), {"gamma": 0.7, "longest": 5, "refine": "modularity"}
    call, _ = make(shape, padding=0.0, restart=0.0)
    given = (call["logits"][0], call["tokens"][0].tolist(), call["key"][0])
    expected = oracle.numbered(*given, gamma=0.7, longest=5, refine="modularity", history=HISTORY)[1]
    assert run(call, [slice(None)], **rule)[4][0].tolist() == expected
    name, planted = FAULTS[fault]
    monkeypatch.setattr(reference, name, planted(getattr(reference, name)))
    assert run(call, [slice(None)], **rule)[4][0].tolist() != expected


@pytest.mark.parametrize(
    ("wrong", "reason"), [({"longest": 0}, "1 token"), ({"refine": "x"}, "one of modularity"), ({"longest": 3}, "held")]
)
def test_arguments_that_do_not_fit_are_refused(wrong: dict[str, Any], reason: str) -> None:
    call, _ = make(Shape(1, 1, 1, 4, 2, 2, 1))
    rule = {"gamma": 1.0, "longest": 2, **wrong}
    state = fresh(call, 2)
    with pytest.raises(RuntimeError, match=reason), torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        EVENTS(*call.values(), *state, **rule)


def numbers_of(shape: Shape, longest: int, known: int) -> Tensor:
    """Draw events ``[B,N]`` of up to ``longest`` tokens, of the first ``known``."""
    drawn = torch.rand(shape.batch, shape.tokens, generator=shape.generator()) < 2 / (longest + 1)
    drawn[:, 0] = False
    numbers = drawn.long().cumsum(1)
    return numbers.masked_fill(torch.arange(shape.tokens) >= known, -1)


@given(shapes(50), st.sampled_from([0.0, 0.3, 0.6]), st.sampled_from([0, 3]), st.integers(1, 3), st.integers(0, 40))
def test_what_is_taken_equals_the_oracle(
    shape: Shape, contiguity: float, delay: int, channels: int, known: int
) -> None:
    fixed = {**sized((2, 8, 1, 2)), "channels": min(channels, shape.key_size)}
    rule = Rule(0.7, "em", **fixed, dense_below=8, contiguity=contiguity, delay=delay)
    q, k, _ = shape.qkv(shape.generator())
    pages = -(-shape.tokens // 2)
    keys = torch.nn.functional.pad(k, (0, 0, 0, 2 * pages - shape.tokens))
    events = torch.nn.functional.pad(numbers_of(shape, 4, known), (0, 2 * pages - shape.tokens), value=-1)
    at = torch.arange(shape.tokens).expand(shape.batch, -1)
    described = keys.unflatten(2, (pages, 2)).mT
    mask = chosen(q, keys, described, at, rule, events)
    scores = best_of_group(strongest(q * 0.7, shape.groups, rule.channels), keys)
    for b, g in ((b, g) for b in range(shape.batch) for g in range(shape.groups)):
        for p in range(shape.tokens):
            must = {j for j in range(p + 1) if j < 1 or p - j < 2 or j // 2 == p // 2}
            options = {"budget": 8, "contiguity": contiguity, "delay": delay}
            wanted = oracle.taken(scores[b, g, p].tolist(), must, events[b].tolist(), p, **options)
            found = set(mask[b, g, p].nonzero()[:, 0].tolist())
            assert found == (wanted if p >= 8 else set(range(p + 1))), (b, g, p)
            assert len(found) <= 8


def test_without_events_it_is_the_choice_by_channels() -> None:
    shape, fixed = Shape(2, 2, 2, 40, 4, 3, 7), sized((2, 8, 1, 2))
    q, k, _ = shape.qkv(shape.generator())
    call = (q, k, k.unflatten(2, (20, 2)).mT, torch.arange(40).expand(2, -1))
    lowbit = chosen(*call, Rule(0.7, "lowbit", **fixed, channels=2, dense_below=8))
    rule = Rule(0.7, "em", **fixed, channels=2, dense_below=8)
    assert torch.equal(chosen(*call, rule), lowbit)
    assert not torch.equal(chosen(*call, rule, numbers_of(shape, 4, 40)), lowbit)


def sparse(call: dict[str, Any], parts: list[slice], events: Tensor | None, **fixed: Any) -> Tensor:
    """Run sparse attention in several calls, whose tokens have the numbers that those before each have."""
    key, value, positions = (call[name] for name in ("key", "value", "positions"))
    batch, groups, _, size = key.shape
    state = [key[:, :, :0], value[:, :, :0], positions[:, :0], key.new_zeros(batch, groups, 0, size, fixed["page"])]
    outputs = []
    for part in parts:
        new = (call["query"][:, :, part], key[:, :, part], value[:, :, part], positions[:, part])
        numbers = None if events is None else events[:, : part.start or 0]
        out, _, *state = torch.ops.memc.sparse_attention(*new, *state, None, numbers, **fixed)
        outputs.append(out)
    return torch.cat(outputs, 2)


FIXED: dict[str, Any] = {"scale": 0.7, "method": "em", "channels": 2, "contiguity": 0.3, "dense_below": 8}


def attended(shape: Shape) -> dict[str, Any]:
    q, k, v = shape.qkv(shape.generator())
    return {"query": q, "key": k, "value": v, "positions": torch.arange(shape.tokens).expand(shape.batch, -1)}


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=12, max_size=20), st.integers(0, 99))
def test_short_calls_are_alike_however_long(lengths: list[int], seed: int) -> None:
    """Numbers that are known 4 tokens late, and calls of at most 6, of a choice that sees those 10 back."""
    shape = Shape(2, 2, 2, sum(lengths), 4, 3, seed)
    call, fixed = attended(shape), {**FIXED, **sized((2, 8, 1, 2)), "delay": 10}
    events = numbers_of(shape, 4, shape.tokens)

    def known(parts: list[slice]) -> Tensor:
        return torch.cat([sparse_late(call, parts, events, late=4, **fixed)], 2)

    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    pieces = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    single = known([slice(t, t + 1) for t in range(shape.tokens)])
    torch.testing.assert_close(known(pieces), single)
    assert (known([slice(0, shape.tokens)]) - single).abs().max() > 1e-6 or shape.tokens < 20


def sparse_late(call: dict[str, Any], parts: list[slice], events: Tensor, late: int, **fixed: Any) -> Tensor:
    """As :func:`sparse`; the last ``late`` tokens before each call have no number yet."""
    key, value, positions = (call[name] for name in ("key", "value", "positions"))
    buffers = [key.new_zeros(*key.shape[:2], key.shape[2] + 1, x.shape[3]) for x in (key, value)]
    pages = key.new_zeros(*key.shape[:2], -(-buffers[0].shape[2] // fixed["page"]), key.shape[3], fixed["page"])
    state = [*buffers, torch.full((len(key), key.shape[2] + 1), -1), pages]
    outputs = []
    for part in parts:
        new = (call["query"][:, :, part], key[:, :, part], value[:, :, part], positions[:, part])
        numbers = events.masked_fill(torch.arange(events.shape[1]) >= part.start - late, -1)
        numbers = torch.nn.functional.pad(numbers, (0, 1), value=3)  # what lies in the slot of padding is nobody's
        outputs.append(torch.ops.memc.sparse_attention_(*new, *state, None, numbers, **fixed)[0])
    return torch.cat(outputs, 2)


def test_buffers_equal_what_is_appended() -> None:
    shape, fixed = Shape(2, 2, 2, 40, 4, 3, 3), {**FIXED, **sized((2, 8, 1, 2)), "delay": 5}
    call, events = attended(shape), numbers_of(shape, 4, 40)
    parts = [slice(0, 17), slice(17, 30), slice(30, 40)]
    torch.testing.assert_close(sparse(call, parts, events, **fixed), sparse_late(call, parts, events, 0, **fixed))


def test_a_budget_that_holds_everything_is_dense() -> None:
    shape = Shape(2, 2, 2, 60, 6, 3, 1)
    call, events = attended(shape), numbers_of(shape, 5, 60)
    none = (call["key"][:, :, :0], call["value"][:, :, :0], call["positions"][:, :0])
    dense = torch.ops.memc.attention(*(call[x] for x in ("query", "key", "value", "positions")), *none, scale=0.7)[0]
    parts = [slice(t, t + 1) for t in range(60)]
    all_read = {**FIXED, **sized((4, 60, 1, 5)), "dense_below": 60}
    torch.testing.assert_close(sparse(call, parts, events, **all_read), dense, atol=1e-5, rtol=0)
    less = {**FIXED, **sized((4, 20, 1, 5)), "dense_below": 20}
    assert (sparse(call, parts, events, **less) - dense).abs().max() > 1e-3


@pytest.mark.parametrize("fault", ["neighbours are not taken", "tokens stand for themselves"])
def test_the_oracle_of_the_choice_sees_a_fault(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "neighbours are not taken":
        monkeypatch.setattr(by_event.Numbered, "beside", lambda self, rank, taken: rank)
    else:
        monkeypatch.setattr(by_event.Numbered, "whole", lambda self, rank: rank)
    shape = Shape(2, 2, 2, 50, 4, 3, seed=2)
    with pytest.raises(AssertionError):
        test_what_is_taken_equals_the_oracle.hypothesis.inner_test(shape, 0.3, 0, 3, 40)  # type: ignore[attr-defined]


def test_an_event_is_found_by_the_one_token_that_a_query_looks_for() -> None:
    """Of a passage whose other tokens say nothing to the query, which single tokens would not bring back."""
    generator, size, tokens = torch.Generator().manual_seed(3), 32, 400
    rule = Rule(size**-0.5, "em", page=8, budget=64, sinks=2, window=8, channels=4, dense_below=64, contiguity=0.3)
    at, found, alone = torch.tensor([[tokens - 1]]), 0, 0
    events = torch.arange(tokens)[None] // 12
    for where in range(60, 340, 40):
        keys = torch.randn(1, 1, tokens, size, generator=generator)
        query = torch.randn(1, 1, 1, size, generator=generator)
        keys[:, :, where] = 2 * query[:, :, 0]
        number, described = where // 12, keys.unflatten(2, (-1, 8)).mT
        inside = slice(12 * number, 12 * number + 12)
        mask = candidates(query * rule.scale, described, at, rule, events)[0, 0, 0]
        found += bool(mask[inside].all())
        assert bool(mask[12 * number - 12 : 12 * number].any() or mask[12 * number + 12 : 12 * number + 24].any())
        alone += bool(candidates(query * rule.scale, described, at, rule)[0, 0, 0][inside].all())
    assert found == 7 and alone == 0


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"rerank": 2}, "not ranked again"),
        ({"mass": 0.5}, "fill the budget"),
        ({"dense_below": 4}, "every token is read"),
        ({"contiguity": 1.0}, "share of the budget"),
        ({"delay": -1}, "at least 0"),
        ({"method": "lowbit"}, "lowbit takes no events"),
        ({"channels": 0}, "em reads at least 1 channel"),
    ],
)
def test_options_that_do_not_fit_are_refused(wrong: dict[str, Any], reason: str) -> None:
    call = attended(Shape(1, 1, 1, 5, 2, 2, 1))
    fixed = {**FIXED, **sized((2, 8, 1, 2)), **wrong}
    with pytest.raises(RuntimeError, match=reason), torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        sparse(call, [slice(0, 5)], numbers_of(Shape(1, 1, 1, 5, 2, 2, 1), 2, 5), **fixed)


def test_choices_that_are_shared_take_no_events() -> None:
    call = attended(Shape(1, 1, 1, 5, 2, 2, 1))
    state = [
        call["key"][:, :, :0],
        call["value"][:, :, :0],
        call["positions"][:, :0],
        call["key"].new_zeros(1, 1, 0, 2, 2),
    ]
    listed, fixed = torch.full((1, 1, 8), -1), {**sized((2, 8, 1, 2)), "scale": 0.7, "channels": 2, "refresh": 2}
    given = (call["query"], call["key"], call["value"], call["positions"], *state, listed)
    with (
        pytest.raises(RuntimeError, match="one of bounds"),
        torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True),
    ):
        torch.ops.memc.refreshed_attention(*given, method="em", **fixed)


def test_the_oracle_knows_the_other_methods() -> None:
    """The forced tokens of the choice by events are those of ``lowbit``, as its own oracle has them."""
    shape = Shape(1, 1, 1, 30, 4, 3, 9)
    q, k, v = shape.qkv(shape.generator())
    from tests.kernels.oracles import Token

    own = [Token(t, k[0, :, t], v[0, :, t]) for t in range(30)]
    o = {"scale": 0.7, "method": "lowbit", "channels": 2, **sized((2, 8, 1, 2)), "dense_below": 8}
    scores = best_of_group(strongest(q * 0.7, 1, 2), k)[0, 0]
    for p in range(8, 30):
        must = {j for j in range(p + 1) if j < 1 or p - j < 2 or j // 2 == p // 2}
        found = oracle.taken(scores[p].tolist(), must, [-1] * 30, p, budget=8, contiguity=0.0, delay=0)
        assert sorted(found) == sparse_choice(q[0, :, p], own, p, 0, o)
