"""Kernel law, state law and the choice of ``memc::sparse_attention``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import memc.kernels  # noqa: F401
from memc.dialect.selectors import SELECTORS
from memc.dialect.sparse_attention import METHODS, description
from memc.kernels.softmax_groups import Groups
from memc.kernels.sparse_attention.choose import (
    Rule,
    best_of_group,
    candidates,
    chosen,
    describe,
    features,
    first,
    ranks,
)
from memc.kernels.sparse_attention.levels import joined, lower
from tests.kernels import oracles
from tests.kernels.cases import F64, Shape, cut, shapes, walk

OP = torch.ops.memc.sparse_attention
JOINT = [method for method in METHODS if not SELECTORS[method].grouped]

# page, budget, sinks, window
SIZES = st.sampled_from([(1, 3, 1, 2), (2, 6, 1, 2), (3, 9, 2, 1), (3, 12, 0, 4), (4, 8, 0, 2), (4, 64, 3, 5)])
options = st.fixed_dictionaries(
    {
        "method": st.sampled_from(METHODS),
        "channels": st.integers(1, 3),
        "rerank": st.sampled_from([1, 2, 3]),
        "dense_below": st.sampled_from([0, 7]),
        "softcap": st.sampled_from([0.0, 1.5]),
        "mass": st.sampled_from([1.0, 0.55]),
        "beam": st.sampled_from([1, 4]),
    }
).map(lambda o: {**o, "mass": 1.0} if SELECTORS[o["method"]].searches else o)


def fitting(sizes: tuple[int, int, int, int], extra: dict[str, Any]) -> dict[str, Any]:
    """Return sizes and options that go together: pages with landmarks are read whole, and have two tokens."""
    if extra["method"] == "landmark":
        return {"scale": 0.7, **sized(sizes if sizes[0] > 1 else (2, 6, 1, 2)), **extra, "rerank": 1}
    return {"scale": 0.7, **sized(sizes), **extra}


def run(call: dict[str, Any], parts: list[slice], **fixed: Any) -> list[Tensor]:
    """Run the op in several calls; output and log-sum-exp joined, then the state."""
    q, k, v, positions = (call[x] for x in ("query", "key", "value", "positions"))
    batch, groups, _, size = k.shape
    fixed["channels"] = min(fixed.get("channels", 2), size)
    method = fixed["method"] if fixed["method"] in METHODS else METHODS[0]  # a wrong one is for the op to refuse
    pages = k.new_zeros(batch, groups, 0, *description(method, fixed["page"], size))
    state = [k.new_zeros(batch, groups, 0, size), v.new_zeros(batch, groups, 0, v.shape[3])]
    state += [positions.new_zeros(batch, 0), pages]
    outputs = []
    for part in parts:
        results = OP(
            q[:, :, part], k[:, :, part], v[:, :, part], positions[:, part], *state, call["sink_logits"], **fixed
        )
        outputs.append(results[:2])
        state = list(results[2:])
    return [torch.cat(pieces, 2) for pieces in zip(*outputs, strict=True)] + state


def make(shape: Shape, sink_logits: bool, dtype: torch.dtype = F64, **walking: float) -> tuple[dict[str, Any], Any]:
    generator = shape.generator()
    q, k, v = shape.qkv(generator, dtype)
    call: dict[str, Any] = {"query": q, "key": k, "value": v, "positions": walk(shape, generator, **walking)}
    call["sink_logits"] = torch.rand(shape.heads, dtype=F64, generator=generator).to(dtype) if sink_logits else None
    return call, generator


def sized(sizes: tuple[int, int, int, int]) -> dict[str, int]:
    return dict(zip(("page", "budget", "sinks", "window"), sizes, strict=True))


@given(shapes(40), options, SIZES, st.booleans())
def test_sparse_attention_equals_oracle(
    shape: Shape, extra: dict[str, Any], sizes: tuple[int, int, int, int], sink_logits: bool
) -> None:
    call, generator = make(shape, sink_logits)
    fixed = fitting(sizes, extra)
    fixed["channels"] = min(fixed["channels"], shape.key_size)
    expected = oracles.sparse_attention(**call, **fixed)
    whole = run(call, [slice(None)], **fixed)
    torch.testing.assert_close(whole[0], expected.out)
    torch.testing.assert_close(whole[1], expected.lse)
    for b, held in enumerate(expected.held):
        assert sorted(p for p in whole[4][b].tolist() if p >= 0) == [token.position for token in held]
        page = fixed["page"]
        pages = lower(whole[5]) if fixed["method"] == "bounds2" else whole[5]
        for number in range(pages.shape[2]):
            keys = [x.key for x in held if x.position // page == number]
            wanted = describe(torch.stack(keys, 1), fixed["method"]) if len(keys) == page else torch.zeros(()).double()
            torch.testing.assert_close(pages[b, :, number], wanted.expand_as(pages[b, :, number]))
    for one, other in zip(whole, run(call, cut(shape.tokens, generator), **fixed), strict=True):
        torch.testing.assert_close(one, other)


@settings(max_examples=10, deadline=None)
@given(shapes(30), options, SIZES)
def test_one_token_at_a_time_equals_one_call(
    shape: Shape, extra: dict[str, Any], sizes: tuple[int, int, int, int]
) -> None:
    call, _ = make(shape, True)
    fixed = fitting(sizes, extra)
    single = run(call, [slice(t, t + 1) for t in range(shape.tokens)], **fixed)
    for one, other in zip(run(call, [slice(None)], **fixed), single, strict=True):
        torch.testing.assert_close(one, other)


@given(shapes(20), options)
def test_a_batch_of_mixed_lengths_equals_one_at_a_time(shape: Shape, extra: dict[str, Any]) -> None:
    call, _ = make(shape, True, restart=0.0)
    fixed = fitting((2, 6, 1, 2), extra)
    together = run(call, [slice(None)], **fixed)[0]
    for b in range(shape.batch):
        kept = call["positions"][b] >= 0
        if kept.any():
            row = {x: call[x][b : b + 1, :, kept] for x in ("query", "key", "value")}
            row |= {"positions": call["positions"][b : b + 1, kept], "sink_logits": call["sink_logits"]}
            torch.testing.assert_close(together[b, :, kept], run(row, [slice(None)], **fixed)[0][0])
        assert not together[b, :, ~kept].any()


@pytest.mark.parametrize("method", JOINT)
@pytest.mark.parametrize("size", [64, 80, 96, 128])
@pytest.mark.parametrize("rerank", [1, 4])
def test_a_budget_that_holds_everything_is_dense(method: str, size: int, rerank: int) -> None:
    shape = Shape(batch=2, groups=2, per_group=3, tokens=75, key_size=size, value_size=size, seed=size)
    call, _ = make(shape, True, torch.float32, padding=0.1, restart=0.0)
    fixed = {"scale": size**-0.5, "method": method, "rerank": rerank, **sized((16, 80, 4, 20))}
    dense = torch.ops.memc.attention(
        *(call[x] for x in ("query", "key", "value", "positions")),
        call["key"][:, :, :0], call["value"][:, :, :0], call["positions"][:, :0], None, call["sink_logits"],
        scale=size**-0.5,
    )  # fmt: skip
    torch.testing.assert_close(run(call, [slice(0, 33), slice(33, 75)], **fixed)[0], dense[0], atol=1e-5, rtol=0)
    less = run(call, [slice(None)], **{**fixed, **sized((16, 48, 4, 8))})[0]
    assert (less - dense[0]).abs().max() > 1e-3, "a smaller budget is another function"


@given(shapes(30), st.integers(1, 7))
def test_bounds_are_upper_bounds(shape: Shape, page: int) -> None:
    q, k, _ = shape.qkv(shape.generator())
    whole = k[:, :, : shape.tokens // page * page]
    if not whole.shape[2]:
        return
    bound = best_of_group(features(q, "bounds"), describe(whole.unflatten(2, (-1, page)), "bounds"))
    true = best_of_group(q, whole).unflatten(3, (-1, page)).amax(-1)
    assert bool((bound >= true - 1e-12).all())
    mean = best_of_group(q, whole.unflatten(2, (-1, page)).mean(3))
    if page > 1 and shape.key_size > 1:
        assert bool((mean < true).any()), "the mean of a page is no bound"


@given(shapes(40), options, SIZES)
def test_choices_are_causal_within_the_budget_and_hold_what_is_forced(
    shape: Shape, extra: dict[str, Any], sizes: tuple[int, int, int, int]
) -> None:
    extra = {**extra, "dense_below": 0}
    extra.pop("softcap")
    extra["channels"] = min(extra["channels"], shape.key_size)
    rule = Rule(**fitting(sizes, extra))
    q, k, _ = shape.qkv(shape.generator())
    length = -(-shape.tokens // rule.piece) * rule.piece
    keys = torch.nn.functional.pad(k, (0, 0, 0, length - shape.tokens))
    at = torch.arange(shape.tokens).expand(shape.batch, -1)
    pages = describe(keys.unflatten(2, (-1, rule.page)), rule.method)
    if rule.by_level:
        pages = joined(pages, torch.arange(rule.piece, length + 1, rule.piece) <= at[:, -1:] + 1)
    mask = chosen(q, keys, pages, at, rule)
    p, j = torch.arange(shape.tokens)[:, None], torch.arange(length)
    assert not bool((mask & (j > p)).any())
    forced = (j <= p) & ((j < rule.sinks) | (p - j < rule.window))
    assert bool(mask[..., forced].all())
    count = mask.sum(-1)
    assert int(count.max()) <= rule.budget
    full = (p[:, 0] + 1 <= rule.budget).nonzero()[:, 0] if rule.mass == 1 else p[:0, 0]
    assert bool((count[:, :, full] == full + 1).all())


@given(shapes(40), st.sampled_from([0.0, 1.5]), st.booleans())
def test_landmarks_of_no_pages_are_dense_and_of_any_are_not(shape: Shape, softcap: float, sink_logits: bool) -> None:
    call, _ = make(shape, sink_logits, restart=0.0, padding=0.0)
    fixed: dict[str, Any] = {"scale": 0.7, "method": "landmark", "softcap": softcap, **sized((4, 64, 3, 5))}
    dense = torch.ops.memc.attention(
        *(call[x] for x in ("query", "key", "value", "positions")),
        call["key"][:, :, :0], call["value"][:, :, :0], call["positions"][:, :0], None, call["sink_logits"],
        scale=0.7, softcap=softcap,
    )  # fmt: skip
    out, lse = run(call, [slice(None)], **fixed)[:2]
    # The page of the sinks, and those that a window of 5 may lie on.
    torch.testing.assert_close(out[:, :, :12], dense[0][:, :, :12])
    below = run(call, [slice(None)], **fixed, dense_below=40)
    torch.testing.assert_close(below[0], dense[0])
    if shape.tokens > 12 and shape.key_size > 1:
        assert (lse[:, :, 12:] - below[1][:, :, 12:]).abs().max() > 1e-6, "though the budget holds all"


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_landmarks_of_strong_logits(dtype: torch.dtype) -> None:
    """Scores of hundreds, of which no softmax within a page survives as an exponential that is not shifted."""
    shape = Shape(batch=2, groups=2, per_group=2, tokens=40, key_size=8, value_size=3, seed=4)
    call, _ = make(shape, True, dtype, restart=0.0)
    fixed: dict[str, Any] = {"scale": 40.0, "method": "landmark", **sized((4, 16, 1, 2))}
    expected = oracles.sparse_attention(**call, **fixed)
    out, lse = run(call, [slice(0, 17), slice(17, 40)], **fixed)[:2]
    assert float(lse.max()) > 200
    near = {F64: 1e-9, torch.float32: 1e-3}[dtype]
    torch.testing.assert_close(out.double(), expected.out, atol=near, rtol=near)
    torch.testing.assert_close(lse.double(), expected.lse, atol=near, rtol=near)


@pytest.mark.parametrize("fault", ["with its own value", "by the mean of the page", "without its softmax"])
def test_the_oracle_sees_a_fault_of_the_grouped_softmax(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def join(self: Groups, scores: Tensor) -> None:
        pages = scores.unflatten(-1, (-1, self.page))
        rest = pages if fault == "with its own value" else pages[..., :-1]
        within = rest.mean(-1) if fault == "by the mean of the page" else rest.logsumexp(-1)
        shift = (pages[..., -1] - within).masked_fill(~self.through | (fault == "without its softmax"), 0)
        pages.add_(shift[..., None])
        if fault != "with its own value":
            pages[..., -1].masked_fill_(self.through, -torch.inf)

    shape = Shape(batch=2, groups=2, per_group=2, tokens=40, key_size=4, value_size=3, seed=7)
    call, _ = make(shape, False, padding=0.0, restart=0.0)
    fixed: dict[str, Any] = {"scale": 0.7, "method": "landmark", **sized((4, 16, 1, 2))}
    expected = oracles.sparse_attention(**call, **fixed)
    monkeypatch.setattr(Groups, "join_", join)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(run(call, [slice(None)], **fixed)[0], expected.out)


def test_equal_scores_are_taken_by_the_lower_index() -> None:
    rank = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, -torch.inf])
    assert first(rank, 3).tolist() == [False, True, True, True, False, False]
    assert first(torch.zeros(4), 2).tolist() == [True, True, False, False]
    assert first(rank, 9).all()


@pytest.mark.parametrize("method", ["bounds", "moments", "hcam", "landmark", "lowbit"])
def test_as_few_are_taken_as_hold_the_mass(method: str) -> None:
    shape = Shape(batch=2, groups=2, per_group=2, tokens=96, key_size=6, value_size=3, seed=11)
    q, k, _ = shape.qkv(shape.generator())
    rule = Rule(0.7, method, page=4, budget=48, sinks=1, window=4, rerank=1, dense_below=0, channels=3)
    pages, at = describe(k.unflatten(2, (24, 4)), method), torch.arange(96).expand(2, -1)
    rank, everything = ranks(q * 0.7, pages, at, rule), candidates(q * 0.7, pages, at, rule)
    weight = rank.masked_fill(rank.isinf(), -torch.inf).softmax(-1).nan_to_num()
    before = rank.isposinf()
    for mass in (0.1, 0.5, 0.9):
        taken = candidates(q * 0.7, pages, at, replace(rule, mass=mass))
        assert bool((taken <= everything).all()) and bool((before <= taken).all()), "never more than the budget"
        held, last = (weight * taken).sum(-1), weight.masked_fill(~taken | rank.isposinf(), torch.inf).amin(-1)
        enough = (held >= mass) | (taken == everything).all(-1)
        assert bool(enough.all())
        assert bool((held - last < mass)[last.isfinite()].all()), "one fewer would not do"
        assert int((taken & ~before).sum()) > 0 and bool((taken.sum(-1) < everything.sum(-1)).any())
        before = taken


def test_bounds_and_channels_find_a_needle_that_means_lose() -> None:
    """One token in keys that resemble their neighbours; describing pages by their mean is the planted weak selector."""
    generator = torch.Generator().manual_seed(5)
    size, tokens = 64, 1024
    rule = Rule(size**-0.5, "bounds", page=16, budget=128, sinks=4, window=20, rerank=1, dense_below=0)
    at, found = torch.tensor([[tokens - 1]]), {"bounds": 0, "lowbit": 0, "hcam": 0}
    by_channels = replace(rule, method="lowbit", channels=8)
    for where in range(100, 900, 40):
        noise = torch.randn(1, 1, tokens, size, generator=generator)
        keys = noise.clone()
        for t in range(1, tokens):
            keys[:, :, t] = 0.9 * keys[:, :, t - 1] + 0.19**0.5 * noise[:, :, t]
        query = torch.randn(1, 1, 1, size, generator=generator)
        keys[:, :, where] += query[:, :, 0]
        pages = keys.unflatten(2, (-1, 16))
        found["bounds"] += bool(chosen(query, keys, describe(pages, "bounds"), at, rule)[0, 0, 0, where])
        found["lowbit"] += bool(chosen(query, keys, pages.mT, at, by_channels)[0, 0, 0, where])
        by_means = replace(rule, method="hcam")
        found["hcam"] += bool(chosen(query, keys, describe(pages, "hcam"), at, by_means)[0, 0, 0, where])
    assert found["bounds"] >= 19 and found["lowbit"] >= 19 and found["hcam"] <= 10, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_types_are_as_near_as_they_can_be(dtype: torch.dtype) -> None:
    shape = Shape(batch=2, groups=2, per_group=2, tokens=30, key_size=4, value_size=3, seed=3)
    call, _ = make(shape, True, dtype)
    exact = {x: y.double() if isinstance(y, Tensor) and y.is_floating_point() else y for x, y in call.items()}
    fixed: dict[str, Any] = {"scale": 0.5, "method": "bounds", **sized((2, 6, 1, 2))}
    out = run(call, [slice(0, 11), slice(11, 30)], **fixed)[0]
    assert out.dtype == dtype
    near = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(out.double(), run(exact, [slice(None)], **fixed)[0], rtol=near, atol=near)


FAULTS = [{"budget": 4}, {"window": 2}, {"sinks": 0}, {"rerank": 3}, {"method": "moments"}, {"method": "hcam"}]
FAULTS += [{"method": "lowbit"}, {"method": "hip"}, {"method": "landmark"}, {"mass": 0.5}]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_oracle_sees_a_fault(fault: dict[str, Any]) -> None:
    shape = Shape(batch=2, groups=2, per_group=2, tokens=40, key_size=4, value_size=3, seed=7)
    call, _ = make(shape, False, padding=0.0, restart=0.0)
    fixed: dict[str, Any] = {"scale": 0.7, "method": "bounds", "page": 1, "budget": 6, "sinks": 2, "window": 1}
    fixed |= {"page": 2} if "rerank" in fault or "method" in fault else {}
    expected = oracles.sparse_attention(**call, **fixed)
    torch.testing.assert_close(run(call, [slice(None)], **fixed)[0], expected.out)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(run(call, [slice(None)], **{**fixed, **fault})[0], expected.out)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"budget": 7}, "whole pages"),
        ({"window": 6}, "fit the budget"),
        ({"method": "x"}, "one of bounds"),
        ({"mass": 0.0}, "above 0"),
        ({"mass": 0.5, "method": "hip"}, "too few pages"),
        ({"mass": 0.5, "method": "bounds2"}, "bounds2 scores too few pages"),
        ({"beam": 0}, "as many pages"),
        ({"method": "landmark", "page": 1}, "at least one other token"),
        ({"method": "landmark", "rerank": 2}, "read whole"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(wrong: dict[str, Any], reason: str) -> None:
    shape = Shape(batch=1, groups=1, per_group=1, tokens=5, key_size=2, value_size=2, seed=1)
    call, _ = make(shape, False)
    fixed: dict[str, Any] = {"scale": 0.5, "method": "bounds", **sized((2, 6, 1, 2)), **wrong}
    with pytest.raises(RuntimeError, match=reason), torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        run(call, [slice(None)], **fixed)
