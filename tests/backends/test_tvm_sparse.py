"""Sparse attention as compiled: the very tokens that the reference chooses, in long calls, in pieces, of batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import op_programs as ops
import pytest
import torch
import tvm
from torch import Tensor
from tvm_support import build

from memc.backends.tvm.kernels.codes import Codes
from memc.backends.tvm.kernels.common import SLOTS, Scores
from memc.backends.tvm.kernels.compact import Angles, compact_attention
from memc.backends.tvm.kernels.quantised import memory_of, quantised_attention
from memc.backends.tvm.kernels.rank import Rule
from memc.backends.tvm.kernels.sparse import memory, sparse_attention
from memc.dialect.quantised_attention import code_bytes
from memc.dialect.sparse_attention import METHODS, SPAN
from memc.kernels.compact_attention import choose as compact
from memc.kernels.quantised_attention.codes import decode, encode
from memc.kernels.refreshed_attention.choose import Choices
from memc.kernels.sparse_attention.choose import chosen, describe, narrowed
from memc.kernels.sparse_attention.levels import joined
from memc.kernels.sparse_attention.reference import Sequence
from tests.backends.runs import Calls, compare, span

OPTIONS: dict[str, Any] = {"page": 4, "budget": 24, "sinks": 2, "window": 9}
LONG: Calls = [
    ([span(0, 100), span(0, 20, right=80)], [99]),
    ([span(100, 7), span(20, 7)], None),
    *(([[107 + i], [27 + i]], None) for i in range(12)),
]
"""A prompt of many blocks beside a short one, pieces, and tokens one at a time."""

slow = pytest.mark.conformance


@pytest.mark.parametrize(
    ("method", "rerank", "mass"),
    [
        ("hip", 2, 1.0),
        pytest.param("hip", 1, 1.0, marks=slow),
        pytest.param("landmark", 1, 1.0, marks=slow),
        ("landmark", 1, 0.6),
        pytest.param("bounds", 1, 0.6, marks=slow),
        pytest.param("moments", 1, 0.6, marks=slow),
        pytest.param("lowbit", 2, 0.6, marks=slow),
    ],
)
def test_long_calls_equal_the_reference(method: str, rerank: int, mass: float, tmp_path: Path) -> None:
    options = {**OPTIONS, "method": method, "rerank": rerank, "dense_below": 30, "channels": 2}
    program = ops.sparse_attention(mass=mass, **options)
    runner = build(program, tmp_path, context=160)
    assert compare(program, runner, LONG) < 1e-4
    other = ops.sparse_attention(mass=mass, **{**options, "budget": 32})
    if mass < 1:
        other = ops.sparse_attention(mass=0.9, **options)
    assert compare(other, runner, LONG) > 1e-3, "another budget, or share, is another function"


@pytest.mark.parametrize(
    ("method", "rerank", "refresh", "mass"),
    [
        ("bounds", 2, 9, 1.0),
        pytest.param("lowbit", 2, 4, 1.0, marks=slow),
        pytest.param("hip", 1, 4, 1.0, marks=slow),
        pytest.param("landmark", 1, 4, 1.0, marks=slow),
        pytest.param("moments", 1, 3, 0.6, marks=slow),
    ],
)
def test_long_calls_that_share_choices_equal_the_reference(
    method: str, rerank: int, refresh: int, mass: float, tmp_path: Path
) -> None:
    options = {**OPTIONS, "method": method, "rerank": rerank, "mass": mass, "dense_below": 30, "channels": 2}
    program = ops.sparse_attention(refresh=refresh, **options)
    runner = build(program, tmp_path, context=160)
    # At last a new sequence in a row that held another one, whose list is no longer taken from.
    calls = [*LONG, ([span(0, 40), [-1] * 40], None), ([[40], [39]], None)]
    assert compare(program, runner, calls) < 1e-4
    other = ops.sparse_attention(refresh=5, **options)
    assert compare(other, runner, calls) > 1e-3, "another turn is another function"


@pytest.mark.parametrize(
    ("bits", "rerank", "page"),
    [
        (4, 2, 4),
        pytest.param(8, 1, 4, marks=slow),
        pytest.param(8, 2, 16, marks=slow),
        pytest.param(4, 1, 16, marks=slow),
    ],
)
def test_long_calls_over_few_bits_equal_the_reference(bits: int, rerank: int, page: int, tmp_path: Path) -> None:
    options = {**OPTIONS, "page": page, "budget": 4 * page if page > 4 else 24, "rerank": rerank}
    program = ops.sparse_attention(bits=bits, dense_below=30, **options)
    runner = build(program, tmp_path, context=160)
    # At last a new sequence in a row that held another one, whose codes and tails are no longer read.
    calls = [*LONG, ([span(0, 37), [-1] * 37], None), ([[37, 38, 39], [39, -1, 40]], None)]
    assert compare(program, runner, calls) < 1e-4
    more = ops.sparse_attention(bits=bits, dense_below=30, **{**options, "budget": options["budget"] + page})
    assert compare(more, runner, calls) > 1e-3, "another budget is another function"
    exact = ops.sparse_attention(method="bounds", dense_below=30, **options)
    assert compare(exact, runner, calls) > 1e-3, "codes are not what they stand for"


@pytest.mark.parametrize("method", ["longheads", pytest.param("infllm", marks=slow)])
def test_long_calls_of_compact_places_equal_the_reference(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = ops.compact_attention(method=method, dense_below=30, **OPTIONS)
    runner = build(program, tmp_path, context=160)
    # At last a new sequence in a row that held another one, whose sums and descriptions are no longer read.
    calls = [*LONG, ([span(0, 41), [-1] * 41], None), ([[41], [39]], None)]
    assert compare(program, runner, calls) < 1e-4
    right = compact.read

    def at_true_places(*a: Any) -> compact.Reads:
        reads = right(*a)
        return replace(reads, key_at=reads.tokens, query_at=a[2][:, None].expand_as(reads.query_at))

    monkeypatch.setattr("memc.kernels.compact_attention.reference.read", at_true_places)
    assert compare(program, runner, calls) > 1e-3, "turned at true positions is another function"


@pytest.mark.parametrize(
    ("form", "state"),
    [({"refresh": 7}, "past_choice0"), pytest.param({"bits": 4}, "past_key_tail0", marks=slow)],
)
def test_a_state_goes_on_after_it_was_saved(form: dict[str, int], state: str, tmp_path: Path) -> None:
    program = ops.sparse_attention(dense_below=10, **form, **OPTIONS)
    runner = build(program, tmp_path, context=100)
    tokens = np.random.default_rng(0).integers(0, ops.VOCAB, (2, 58))
    positions = np.tile(np.arange(58), (2, 1))
    begun = runner.new_state(2)
    runner.run(tokens, positions, begun)
    restored, lost = runner.restore(begun.arrays()), runner.restore(begun.arrays())
    lost.current[state].fill(-1)
    after = [runner.run(tokens[:, :1], positions[:, -1:] + 1, one) for one in (begun, restored, lost)]
    assert np.array_equal(after[0], after[1])
    assert np.abs(after[0] - after[2]).max() > 1e-3, "without its list, or its tail, the token reads other things"


# ---- which tokens are read


class Tokens:
    """Keys, values and queries of a row, and the function compiled over its state, one key-value head of two."""

    def __init__(self, rule: Rule, rows: int = 2, capacity: int = 128) -> None:
        self.rule, self.s = rule, Scores(4, 2, 8, 8, rule.scale)
        random = np.random.default_rng(0)
        sizes = ((rows, 4, capacity, 8), (rows, 2, capacity, 8), (rows, 2, capacity, 8))
        self.query, self.key, self.value = (random.standard_normal(size).astype(np.float32) for size in sizes)
        self.state, self.ranks = self.buffers(rows, capacity)
        self.function = tvm.compile(tvm.IRModule({"main": self.made()}), target="llvm")["main"]

    def made(self) -> Any:
        return sparse_attention(self.s, self.rule).with_attr("global_symbol", "main")

    def needed(self, rows: int, count: int) -> dict[str, Any]:
        return memory(self.s, self.rule, rows * 2, self.ranks)

    def buffers(self, rows: int, capacity: int) -> tuple[list[Any], int]:
        """Return the state of rows, and of how many pages or tokens there are ranks."""
        rule, tiles, pages = self.rule, capacity // SLOTS, -(-capacity // self.rule.page)
        described = rule.described(8)
        keys = (rows, 2, capacity, 8) if rule.by_token else (rows, 2, tiles, 8, SLOTS)
        by_tile = (rows, 2, tiles if rule.by_token else -(-pages // SLOTS), described, SLOTS)
        by_row = (rows, 2, capacity // rule.piece, (1 + SPAN) * 16) if rule.by_level else (rows, 2, pages, described)
        held = (keys, (rows, 2, capacity, 8), by_row if rule.rows else by_tile)
        listed = np.full((rows, 2, 2, rule.places) if rule.refresh > 1 else 1, -1, np.int32)
        arrays = [*(np.zeros(size, np.float32) for size in held), listed]
        return [tvm.runtime.tensor(x) for x in arrays], capacity if rule.by_token else -(-pages // SLOTS) * SLOTS

    def read(self, columns: list[list[int]]) -> list[list[set[int]]]:
        """Run tokens of all rows at some positions, of which a unit of work does at most 16; what the last one read."""
        at = np.array(columns, np.int64)
        rows, count = at.shape
        new = [
            np.ascontiguousarray(np.take_along_axis(x, at.clip(0)[:, None, :, None], 2))
            for x in (self.query, self.key, self.value)
        ]
        scratch = {name: np.full(size, -1, kind) for name, (size, kind) in self.needed(rows, count).items()}
        # Of what came before nothing is left: slots that are not written stay -1.
        given = {name: tvm.runtime.tensor(array) for name, array in scratch.items()}
        out = np.zeros((rows, 4, count, 8), np.float32), np.zeros(1, np.float32)
        before = [tvm.runtime.tensor(array) for array in (*new, at)]
        rest = [tvm.runtime.tensor(array) for array in (np.zeros(1, np.float32), *out)]
        self.function(*before, *self.state, *rest, *given.values())
        slots = given["slots"].numpy().reshape(rows, 2, -1)
        # Of lists that are shared ranks may be left behind the slots; no score but 0 is as small a number as a place.
        there = (slots >= 0) & (slots < self.query.shape[2])
        return [[set(slots[row, group][there[row, group]].tolist()) for group in range(2)] for row in range(rows)]

    def keys(self, row: int) -> Tensor:
        """Return the keys ``[1,G,L,D]`` of a row as they are read, in float64."""
        return torch.from_numpy(self.key[row : row + 1]).double()

    def expected(self, row: int, position: int, rule: Rule) -> list[set[int]]:
        """What the reference reads for the token at a position, in float64."""
        query, key = torch.from_numpy(self.query[row : row + 1]).double(), self.keys(row)
        at, one = torch.tensor([[position]]), slice(position, position + 1)
        if rule.refresh > 1:
            # Of what comes later nothing has been seen.
            every = torch.arange(position + 1)[None]
            sequence = Sequence(every >= 0, every, torch.zeros(1), torch.zeros(1))
            none = torch.full((1, 2, rule.most), -1)
            asking = query[:, :, : position + 1] * rule.scale
            choices = Choices.of(asking, pages(key, rule), every, sequence, none, key.shape[2], rule)
            taken = choices.candidates(one, at, key.shape[2] // rule.unit, rule)
            mask = narrowed(asking[:, :, one], key, taken, at, rule)
        else:
            mask = chosen(query[:, :, one], key, pages(key, rule), at, rule)
        return [set(mask[0, group, 0].nonzero()[:, 0].tolist()) for group in range(2)]


class Coded(Tokens):
    """The same over codes, which are what the reference chooses by too."""

    bits = 4

    def made(self) -> Any:
        return quantised_attention(self.s, self.rule, Codes(self.bits, self.rule.page)).with_attr(
            "global_symbol", "main"
        )

    def needed(self, rows: int, count: int) -> dict[str, Any]:
        return memory_of(self.s, self.rule, rows, count, rows * 2, self.ranks)

    def buffers(self, rows: int, capacity: int) -> tuple[list[Any], int]:
        tiles, size, page = -(-capacity // self.rule.page // SLOTS), code_bytes(8, self.bits), self.rule.page
        codes = [(rows, 2, capacity // SLOTS, size, SLOTS), (rows, 2, capacity, size)]
        others = [(rows, 2, tiles, 16, SLOTS), (rows, 2, capacity, 2), (rows, 2, page, 8), (rows, 2, page, 8)]
        arrays = [*(np.zeros(x, np.uint8) for x in codes), *(np.zeros(x, np.float32) for x in others)]
        return [tvm.runtime.tensor(x) for x in arrays], tiles * SLOTS

    def keys(self, row: int) -> Tensor:
        by_page = super().keys(row).unflatten(2, (-1, self.rule.page))
        ends = by_page.amax(3, keepdim=True), by_page.amin(3, keepdim=True)
        return decode(encode(by_page, *ends, self.bits), *ends, self.bits, 8).flatten(2, 3)


class Compact(Tokens):
    """The same over keys that are turned as they are read, which were not when they were described."""

    frequencies = 100.0 ** -(np.arange(3, dtype=np.float32) / 3)

    def made(self) -> Any:
        return compact_attention(self.s, self.rule, Angles(3, False)).with_attr("global_symbol", "main")

    def needed(self, rows: int, count: int) -> dict[str, Any]:
        needed = super().needed(rows, count)
        return {name: needed[name] for name in ("rank", "list", "slots", "scores")}

    def buffers(self, rows: int, capacity: int) -> tuple[list[Any], int]:
        tiles = -(-capacity // self.rule.page // SLOTS)
        turned = np.arange(64, dtype=np.float32)[:, None] * self.frequencies
        shapes = [(rows, 2, capacity, 8), (rows, 2, capacity, 8), (rows, 2, tiles, 16, SLOTS)]
        arrays = [*(np.zeros(x, np.float32) for x in shapes), np.stack([np.cos(turned), np.sin(turned)], 1)]
        return [tvm.runtime.tensor(x) for x in arrays], tiles * SLOTS

    def described(self, row: int, rule: Rule) -> tuple[Tensor, Tensor]:
        """Return the queries of a row, and the descriptions of its pages."""
        query, key, value = (torch.from_numpy(x[row : row + 1]).double() for x in (self.query, self.key, self.value))
        none, at = key[:, :, :0], torch.arange(key.shape[2])[None]
        names = ("scale", "method", "page", "budget", "sinks", "window", "dense_below")
        given = (query, key, value, at, none, none, at[:, :0], torch.cat([none, none], 3))
        frequencies = torch.from_numpy(self.frequencies)
        options = {name: getattr(rule, name) for name in names}
        return query, torch.ops.memc.compact_attention(*given, frequencies, **options)[5][..., :8]

    def expected(self, row: int, position: int, rule: Rule) -> list[set[int]]:
        query, descriptions = self.described(row, rule)
        reads = compact.read(query[:, :, position : position + 1], descriptions, torch.tensor([[position]]), rule)
        return [set(reads.tokens[0, group, 0][reads.live[0, group, 0]].tolist()) for group in range(2)]


def pages(key: Tensor, rule: Rule) -> Tensor:
    """Describe all pages of ``key [1,G,L,D]``; those that are not full are never looked at."""
    described = describe(key.unflatten(2, (-1, rule.page)), rule.method)
    if rule.by_level:
        return joined(described, torch.ones(1, described.shape[2] // SPAN, dtype=torch.bool))
    return described


def rule_of(method: str, **others: Any) -> Rule:
    options = {**OPTIONS, "budget": 40, "channels": 2, "dense_below": 6, **others}
    return Rule(scale=0.7, method=method, **options)


CHOICES = [
    (method, rerank, mass, 1)
    for method in METHODS
    if method != "bounds2"  # of whose super-pages not all are to be entered
    for rerank in (1, 2)
    for mass in (1.0, 0.5)
    if not (method == "landmark" and rerank == 2) and not (method == "hip" and mass < 1)
]
SHARED = [("lowbit", 2, 0.5, 7), ("hip", 1, 1.0, 7), ("bounds", 2, 1.0, 3), ("landmark", 1, 0.5, 4)]
QUICK = {
    ("hip", 2, 1.0, 1),
    ("landmark", 1, 0.5, 1),
    ("lowbit", 2, 0.5, 7),
    ("hip", 1, 1.0, 7),
    ("hip", 1),
    ("lowbit", 2),
}


def marked(*choice: Any) -> Any:
    return pytest.param(*choice, marks=() if choice in QUICK else slow)


@pytest.mark.parametrize(("method", "rerank", "mass", "refresh"), [marked(*choice) for choice in (*CHOICES, *SHARED)])
def test_the_tokens_read_are_those_of_the_reference(method: str, rerank: int, mass: float, refresh: int) -> None:
    """In float64, and all of them: the draws have no two scores so near that float32 would order them otherwise."""
    rule = rule_of(method, rerank=rerank, mass=mass, refresh=refresh)
    other = replace(rule, mass=0.75) if mass < 1 else replace(rule, budget=rule.budget - rule.page)
    differ_in(Tokens(rule), other)


@pytest.mark.parametrize(("rerank", "refresh"), [(2, 1), pytest.param(1, 5, marks=slow)])
def test_the_tokens_read_in_two_levels_are_those_of_the_reference(rerank: int, refresh: int) -> None:
    """One super-page of 16 tokens is entered of those before the window, beside the one that it reaches into."""
    sizes = {"page": 1, "budget": 16 // rerank, "sinks": 2, "window": 5}
    rule = rule_of("bounds2", rerank=rerank, refresh=refresh, beam=1, **sizes)
    differ_in(Tokens(rule), replace(rule, beam=99))


@pytest.mark.parametrize(("bits", "rerank"), [(4, 1), pytest.param(4, 2, marks=slow), pytest.param(8, 2, marks=slow)])
def test_the_tokens_read_over_few_bits_are_those_of_the_reference(bits: int, rerank: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(Coded, "bits", bits)
    rule = rule_of("bounds", rerank=rerank, own_page=True, page=5, budget=50)
    differ_in(Coded(rule, capacity=160), replace(rule, budget=rule.budget - rule.page))


@pytest.mark.parametrize("method", ["longheads", "infllm"])
def test_the_tokens_read_at_compact_places_are_those_of_the_reference(method: str) -> None:
    rule = rule_of(method)
    differ_in(Compact(rule), replace(rule, budget=rule.budget - rule.page))


def differ_in(tokens: Tokens, other: Rule) -> None:
    """Check what a token in five reads, and that another rule would read other tokens."""
    rule, differ = tokens.rule, 0
    # Rows of unlike lengths, which end by turns.
    tokens.read([span(0, 9), span(0, 4, left=5)])
    for start in range(9, 119, 5):
        tokens.read([span(start, 4), span(start - 5, 4)])
        tokens.read([[-1], [start - 1]])
        read = tokens.read([[start + 4], [-1]])[0]
        assert read == tokens.expected(0, start + 4, rule), start
        differ += read != tokens.expected(0, start + 4, other)
    assert tokens.read([[-1], [114]])[1] == tokens.expected(1, 114, rule)
    assert differ > 10, "another budget, or share, is another choice"


@pytest.mark.parametrize(("method", "rerank"), [marked(*choice[:2]) for choice in CHOICES if choice[2:] == (1, 1)])
def test_equal_scores_choose_the_lower_index(method: str, rerank: int) -> None:
    rule = rule_of(method, rerank=rerank)
    tokens = Tokens(rule, rows=1)
    tokens.key[:] = 0.5
    for start in range(0, 120, 5):
        tokens.read([span(start, 4)])
        assert tokens.read([[start + 4]])[0] == tokens.expected(0, start + 4, rule), start
