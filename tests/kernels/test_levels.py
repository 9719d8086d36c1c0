"""Two levels of bounds: what super-pages are entered, what that leaves out, and where that is nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import memc.kernels  # noqa: F401
from memc.dialect.sparse_attention import SPAN, SparseAttention, entered
from memc.kernels.sparse_attention import levels
from memc.kernels.sparse_attention.choose import Rule, best_of_group, candidates, describe, features
from tests.kernels import oracles
from tests.kernels.cases import F64, Shape, cut
from tests.kernels.test_sparse_attention import make, run, sized

wide = st.builds(
    Shape,
    batch=st.integers(1, 2),
    groups=st.integers(1, 2),
    per_group=st.integers(1, 2),
    tokens=st.integers(60, 180),
    key_size=st.sampled_from([1, 3, 4]),
    value_size=st.just(2),
    seed=st.integers(0, 1 << 16),
)
"""Calls of several super-pages of pages of 1 or 2."""

SIZES = st.sampled_from([(1, 6, 1, 2), (2, 12, 3, 5), (1, 24, 17, 3), (2, 44, 33, 4), (1, 36, 0, 20)])


def held(keys: Tensor, page: int) -> Tensor:
    """Return two levels of the bounds of ``keys [B,G,L,D]``, whole super-pages."""
    pages = describe(keys.unflatten(2, (-1, page)), "bounds")
    return levels.joined(pages, torch.ones(len(keys), pages.shape[2] // SPAN, dtype=torch.bool))


@settings(max_examples=8, deadline=None)
@given(wide, SIZES, st.sampled_from([1, 2]), st.sampled_from([1, 3]), st.sampled_from([0, 9]))
def test_several_super_pages_equal_the_oracle_however_they_are_cut(
    shape: Shape, sizes: tuple[int, int, int, int], rerank: int, beam: int, dense_below: int
) -> None:
    call, generator = make(shape, True, padding=0.1, restart=0.01)
    fixed: dict[str, Any] = {"scale": 0.7, "method": "bounds2", "rerank": rerank, "beam": beam, **sized(sizes)}
    fixed["dense_below"] = dense_below
    expected = oracles.sparse_attention(**call, **fixed)
    whole = run(call, [slice(None)], **fixed)
    torch.testing.assert_close(whole[0], expected.out)
    torch.testing.assert_close(whole[1], expected.lse)
    for one, other in zip(whole, run(call, cut(shape.tokens, generator), **fixed), strict=True):
        torch.testing.assert_close(one, other)
    piece = SPAN * fixed["page"]
    for b, own in enumerate(expected.held):
        for number in range(whole[5].shape[2]):
            keys = [x.key for x in own if x.position // piece == number]
            wanted = describe(torch.stack(keys, 1), "bounds") if len(keys) == piece else torch.zeros(()).double()
            torch.testing.assert_close(whole[5][b, :, number, 0], wanted.expand_as(whole[5][b, :, number, 0]))


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_what_is_held_is_the_same_bits_one_token_at_a_time(dtype: torch.dtype) -> None:
    shape = Shape(batch=2, groups=2, per_group=1, tokens=70, key_size=3, value_size=2, seed=2)
    call, _ = make(shape, False, dtype, padding=0.1, restart=0.02)
    fixed = {"scale": 0.7, "method": "bounds2", **sized((2, 8, 1, 3))}
    whole, single = run(call, [slice(None)], **fixed), run(call, [slice(t, t + 1) for t in range(70)], **fixed)
    assert torch.equal(whole[5], single[5]) and bool(whole[5][:, :, 0, 0].any())


@settings(max_examples=30, deadline=None)
@given(wide, st.sampled_from([1, 2, 3]))
def test_a_super_page_bounds_its_pages_and_their_tokens(shape: Shape, page: int) -> None:
    q, k, _ = shape.qkv(shape.generator())
    whole = k[:, :, : shape.tokens // (SPAN * page) * SPAN * page]
    state = held(whole, page)
    asking = features(q, "bounds2")
    above = best_of_group(asking, state[:, :, :, 0]).repeat_interleave(SPAN, -1)
    pages = best_of_group(asking, levels.lower(state))
    assert bool((above >= pages - 1e-12).all())
    assert bool((above.repeat_interleave(page, -1) >= best_of_group(q, whole) - 1e-12).all())
    mean = levels.lower(state).unflatten(2, (-1, SPAN)).mean(3)
    assert bool((best_of_group(asking, mean).repeat_interleave(SPAN, -1) < pages).any()), "a mean of bounds is none"


@settings(max_examples=10, deadline=None)
@given(wide, SIZES)
def test_entering_every_super_page_is_flat_bounds(shape: Shape, sizes: tuple[int, int, int, int]) -> None:
    call, _ = make(shape, True, padding=0.1, restart=0.0)
    fixed: dict[str, Any] = {"scale": 0.7, "rerank": 2, **sized(sizes)}
    flat, all_entered = (
        run(call, [slice(None)], method="bounds", **fixed),
        run(call, [slice(None)], method="bounds2", beam=shape.tokens, **fixed),
    )
    for one, other in zip(flat[:5], all_entered[:5], strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_are_those_of_what_is_read() -> None:
    shape = Shape(batch=1, groups=1, per_group=2, tokens=90, key_size=3, value_size=2, seed=3)
    call, _ = make(shape, True, padding=0.0, restart=0.0)
    fixed: dict[str, Any] = {"scale": 0.7, **sized((1, 16, 1, 3))}
    leaves = [call[name].requires_grad_() for name in ("query", "key", "value")]

    def gradients(parts: list[slice], **options: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(call, parts, **fixed, **options)[0].square().sum(), leaves)

    flat, few = gradients([slice(None)], method="bounds"), gradients([slice(None)], method="bounds2", beam=1)
    for one, other in zip(gradients([slice(None)], method="bounds2", beam=90), flat, strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(gradients([slice(0, 37), slice(37, 90)], method="bounds2", beam=1), few, strict=True):
        torch.testing.assert_close(one, other)
    assert (few[1] - flat[1]).abs().max() > 1e-3, "what is not entered gets none"


def test_equal_super_pages_go_by_the_lower_index_and_few_are_entered() -> None:
    rule = Rule(1.0, "bounds2", page=1, budget=16, sinks=1, window=3, beam=1)
    assert rule.entered == entered(16, 1) == 1
    keys, at = torch.zeros(1, 1, 8 * SPAN, 2), torch.tensor([[6 * SPAN + 5]])
    query = torch.ones(1, 1, 1, 2)
    # Of equal super-pages the first: its page 0 is the sink, 1 to 12 fill the budget but for the window.
    assert candidates(query, held(keys, 1), at, rule)[0, 0, 0].nonzero()[:, 0].tolist() == [*range(13), 99, 100, 101]
    # The best page of all lies in the one super-page that is entered, the next best elsewhere is not seen.
    keys[0, 0, 40], keys[0, 0, 20], keys[0, 0, 97] = 3.0, 2.0, 1.0
    taken = candidates(query, held(keys, 1), at, rule)[0, 0, 0]
    assert taken[[40, 97]].all() and not taken[20]
    flat = candidates(query, describe(keys.unflatten(2, (-1, 1)), "bounds"), at, Rule(1.0, "bounds", 1, 16, 1, 3))
    assert bool(flat[0, 0, 0, [20, 40, 97]].all())


def test_what_is_wholly_forced_takes_no_place_of_what_is_entered() -> None:
    """With 32 sinks the first two super-pages are read anyhow: entering one of them would be entering none."""
    rule = Rule(1.0, "bounds2", page=1, budget=40, sinks=32, window=3, beam=1)
    keys, at = torch.zeros(1, 1, 12 * SPAN, 2), torch.tensor([[11 * SPAN + 5]])
    keys[0, 0, :32], keys[0, 0, 150] = 9.0, 1.0
    assert rule.entered == 3
    for number, where in enumerate((150, 60, 90)):
        keys[0, 0, where] = 1.0 + number
    assert bool(candidates(torch.ones(1, 1, 1, 2), held(keys, 1), at, rule)[0, 0, 0, [150, 60, 90]].all())


@pytest.mark.parametrize("fault", ["the first pages", "incomplete ones", "nothing behind"])
def test_the_oracle_sees_a_fault_of_the_levels(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(batch=2, groups=2, per_group=2, tokens=90, key_size=4, value_size=3, seed=7)
    call, _ = make(shape, False, padding=0.0, restart=0.0)
    fixed: dict[str, Any] = {"scale": 0.7, "method": "bounds2", "beam": 1, **sized((1, 16, 2, 4))}
    expected = oracles.sparse_attention(**call, **fixed)
    torch.testing.assert_close(run(call, [slice(None)], **fixed)[0], expected.out)
    right = levels.ranked

    def wrong(scores: Tensor, sunk: int, edge: Tensor) -> Tensor:
        if fault == "the first pages":
            return right(-torch.arange(scores.shape[3]).to(scores).expand_as(scores), sunk, edge)
        if fault == "incomplete ones":
            return right(scores, sunk, edge + SPAN)
        return right(scores, sunk, edge).masked_fill(torch.arange(scores.shape[3]) == edge // SPAN, -torch.inf)

    monkeypatch.setattr(levels, "ranked", wrong)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(run(call, [slice(None)], **fixed)[0], expected.out)


def test_the_cost_reads_super_pages_and_what_is_entered() -> None:
    def args(method: str) -> SparseAttention:
        q, k = torch.empty(1, 8, 1, 64), torch.empty(1, 2, 1, 64)
        held, none = k[:, :, :0], torch.empty(1, 0, dtype=torch.int64)
        options: dict[str, Any] = {"scale": 1.0, "method": method, "page": 16, "budget": 512, "sinks": 4, "window": 48}
        return SparseAttention(q, k, k, none, held, held, none, held, **options)

    each = 2 * 64 * 4 * 2  # bounds of a page, of both key-value heads
    for context, looked in ((4096, 16 + 9 * 16), (32768, 128 + 9 * 16), (512, 2 + 32)):
        flat, two = (args(method).cost(context).bytes for method in ("bounds", "bounds2"))
        assert two - flat == (looked - context // 16) * each
