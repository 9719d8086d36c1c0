"""Kernel law, state law, places and descriptions of ``memc::compact_attention``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import memc.kernels  # noqa: F401
from memc.dialect.compact_attention import METHODS
from memc.kernels.compact_attention import choose
from memc.kernels.sparse_attention.choose import Rule
from tests.kernels import compact_oracle
from tests.kernels.cases import F64, Shape, cut, walk

OP = torch.ops.memc.compact_attention

# page, budget, sinks, window
SIZES = st.sampled_from([(1, 3, 1, 2), (2, 8, 1, 3), (3, 12, 2, 4), (4, 12, 0, 4), (4, 64, 3, 5)])
options = st.fixed_dictionaries(
    {
        "method": st.sampled_from(METHODS),
        "dense_below": st.sampled_from([0, 7]),
        "softcap": st.sampled_from([0.0, 1.5]),
        "interleaved": st.booleans(),
        "scaling": st.sampled_from([1.0, 1.2]),
    }
)
SHAPES = st.builds(
    Shape,
    batch=st.integers(1, 3),
    groups=st.integers(1, 2),
    per_group=st.integers(1, 3),
    tokens=st.one_of(st.sampled_from([1, 2]), st.integers(3, 40)),
    key_size=st.just(4),
    value_size=st.just(4),
    seed=st.integers(0, 1 << 16),
)
PLAIN: dict[str, Any] = {"scale": 0.7, "interleaved": False, "scaling": 1.0}


def sized(sizes: tuple[int, int, int, int]) -> dict[str, int]:
    return dict(zip(("page", "budget", "sinks", "window"), sizes, strict=True))


def run(call: dict[str, Any], parts: list[slice], **fixed: Any) -> list[Tensor]:
    """Run the op in several calls; output and log-sum-exp joined, then the state."""
    q, k, v, positions = (call[x] for x in ("query", "key", "value", "positions"))
    batch, groups, _, size = k.shape
    state = [
        k.new_zeros(batch, groups, 0, size),
        v.new_zeros(batch, groups, 0, v.shape[3]),
        positions.new_zeros(batch, 0),
    ]
    state.append(k.new_zeros(batch, groups, 0, 2 * size, dtype=torch.promote_types(k.dtype, torch.float32)))
    outputs = []
    for part in parts:
        rest = (positions[:, part], *state, call["inv_freq"], call["sink_logits"])
        results = OP(q[:, :, part], k[:, :, part], v[:, :, part], *rest, **fixed)
        outputs.append(results[:2])
        state = list(results[2:])
    return [torch.cat(pieces, 2) for pieces in zip(*outputs, strict=True)] + state


def make(shape: Shape, sink_logits: bool, dtype: torch.dtype = F64, **walking: float) -> tuple[dict[str, Any], Any]:
    generator = shape.generator()
    q, k, v = shape.qkv(generator, dtype)
    call: dict[str, Any] = {"query": q, "key": k, "value": v, "positions": walk(shape, generator, **walking)}
    call["sink_logits"] = torch.rand(shape.heads, dtype=F64, generator=generator).to(dtype) if sink_logits else None
    call["inv_freq"] = torch.tensor([1.0], dtype=dtype) if shape.seed % 2 else torch.tensor([0.9, 0.2], dtype=dtype)
    return call, generator


@settings(max_examples=40, deadline=None)
@given(SHAPES, options, SIZES, st.booleans())
def test_compact_attention_equals_oracle_however_it_is_cut(
    shape: Shape, extra: dict[str, Any], sizes: tuple[int, int, int, int], sink_logits: bool
) -> None:
    call, generator = make(shape, sink_logits, padding=0.1, restart=0.03)
    fixed = {"scale": 0.7, **sized(sizes), **extra}
    expected = compact_oracle.compact_attention(**call, **fixed)
    whole = run(call, [slice(None)], **fixed)
    torch.testing.assert_close(whole[0], expected.out)
    torch.testing.assert_close(whole[1], expected.lse)
    for one, other in zip(whole, run(call, cut(shape.tokens, generator), **fixed), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("method", METHODS)
def test_one_token_at_a_time_equals_one_call(method: str) -> None:
    shape = Shape(batch=3, groups=2, per_group=2, tokens=40, key_size=4, value_size=4, seed=8)
    call, _ = make(shape, True)
    fixed = {**PLAIN, "method": method, **sized((3, 12, 2, 4))}
    single = run(call, [slice(t, t + 1) for t in range(shape.tokens)], **fixed)
    for one, other in zip(run(call, [slice(None)], **fixed), single, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_mixed_lengths_equals_one_at_a_time(method: str) -> None:
    shape = Shape(batch=3, groups=2, per_group=2, tokens=30, key_size=4, value_size=4, seed=6)
    call, _ = make(shape, True, restart=0.0, padding=0.4)
    fixed = {**PLAIN, "method": method, **sized((2, 8, 1, 3))}
    together = run(call, [slice(None)], **fixed)[0]
    for b in range(shape.batch):
        kept = call["positions"][b] >= 0
        row = {x: call[x][b : b + 1, :, kept] for x in ("query", "key", "value")}
        row |= {"positions": call["positions"][b : b + 1, kept], **{x: call[x] for x in ("sink_logits", "inv_freq")}}
        torch.testing.assert_close(together[b, :, kept], run(row, [slice(None)], **fixed)[0][0])
        assert not together[b, :, ~kept].any()


@pytest.mark.parametrize("size", [64, 80, 96, 128])
@pytest.mark.parametrize(("method", "sizes"), [("longheads", (16, 80, 4, 20)), ("infllm", (16, 128, 4, 75))])
def test_where_nothing_is_left_out_it_is_attention_of_rotated_keys(
    method: str, sizes: tuple[int, int, int, int], size: int
) -> None:
    shape = Shape(batch=2, groups=2, per_group=3, tokens=75, key_size=size, value_size=size, seed=size)
    call, _ = make(shape, True, torch.float32, padding=0.1, restart=0.0)
    call["inv_freq"] = 100.0 ** (-torch.arange(size // 2) * 2 / size)
    fixed = {"scale": size**-0.5, "method": method, "interleaved": False, "scaling": 1.0, **sized(sizes)}
    turned = [torch.ops.memc.rotary(call[x], call["positions"], call["inv_freq"]) for x in ("query", "key")]
    dense = torch.ops.memc.attention(
        *turned, call["value"], call["positions"],
        call["key"][:, :, :0], call["value"][:, :, :0], call["positions"][:, :0], None, call["sink_logits"],
        scale=size**-0.5,
    )  # fmt: skip
    torch.testing.assert_close(run(call, [slice(0, 33), slice(33, 75)], **fixed)[0], dense[0], atol=2e-5, rtol=0)
    less = run(call, [slice(None)], **{**fixed, **sized((16, 64, 4, 16))})[0]
    assert (less - dense[0]).abs().max() > 1e-3, "a smaller budget or window is another function"


@settings(max_examples=30, deadline=None)
@given(SHAPES, options, SIZES)
def test_places_keep_the_order_and_stay_in_the_span(
    shape: Shape, extra: dict[str, Any], sizes: tuple[int, int, int, int]
) -> None:
    from memc.dialect.compact_attention import span

    rule = Rule(scale=0.7, method=extra["method"], rerank=1, dense_below=extra["dense_below"], **sized(sizes))
    pages = -(-shape.tokens // rule.page)
    generator = shape.generator()
    q, _, _ = shape.qkv(generator)
    descriptions = torch.randn(shape.batch, shape.groups, pages, 4, dtype=F64, generator=generator)
    at = torch.arange(shape.tokens).expand(shape.batch, -1)
    reads = choose.read(q, descriptions, at, rule)
    p = at[:, None, :, None]
    assert bool((reads.tokens <= p)[reads.live].all())
    ordered = reads.tokens.masked_fill(~reads.live, shape.tokens)
    assert bool((ordered.diff(dim=-1) > 0)[reads.live[..., 1:]].all()), "each once, in order of time"
    away = reads.query_at[..., None] - reads.key_at
    assert bool((away[reads.live] >= 0).all())
    longest = span(rule.method, rule.budget, rule.window, rule.dense_below)
    assert int(reads.key_at[reads.live].max()) < longest and int(reads.query_at.max()) < longest
    assert bool((away == 0)[reads.live & (reads.tokens == p)].all()), "the query stands where its own key does"
    near = reads.live & (p - reads.tokens < rule.window)
    assert bool((away == p - reads.tokens)[near].all()), "distances within the window are the true ones"
    forced = (reads.live & ((reads.tokens < rule.sinks) | (p - reads.tokens < rule.window))).sum(-1)
    expected = torch.minimum(at + 1, torch.full_like(at, rule.window)) + (at - rule.window + 1).clamp(0, rule.sinks)
    assert bool((forced == expected[:, None]).all())
    assert int(reads.live.sum(-1).max()) <= max(rule.budget, rule.dense_below)


@pytest.mark.parametrize("method", METHODS)
def test_a_page_is_found_by_what_stands_in_it(method: str) -> None:
    """One page of keys that the query asks for; descriptions of another page's keys are the planted fault."""
    generator = torch.Generator().manual_seed(2)
    rule = Rule(32**-0.5, method, page=16, budget=96, sinks=4, window=32, rerank=1, dense_below=0)
    shape = Shape(batch=1, groups=1, per_group=2, tokens=512, key_size=32, value_size=32, seed=1)
    found = {"right": 0, "shifted": 0}
    for where in range(3, 28, 2):
        subject = 2 * torch.randn(32, dtype=F64, generator=generator)
        q, k, v = shape.qkv(generator)
        k[:, :, where * 16 : where * 16 + 16] += subject
        q[:, :, -1] = subject
        call = {"query": q, "key": k, "value": v, "positions": torch.arange(512)[None]}
        call |= {"inv_freq": torch.tensor([0.5, 0.1], dtype=F64), "sink_logits": None}
        fixed = {"interleaved": False, "scaling": 1.0, "method": method, **sized((16, 96, 4, 32))}
        pages = run(call, [slice(None)], scale=rule.scale, **fixed)[-1][..., :32]
        for name, descriptions in (("right", pages), ("shifted", pages.roll(5, 2))):
            reads = choose.read(q[:, :, -1:], descriptions, torch.tensor([[511]]), rule)
            found[name] += where * 16 in reads.tokens[reads.live].tolist()
    assert found["right"] == 13 and found["shifted"] <= 4, found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_types_are_as_near_as_they_can_be(dtype: torch.dtype, method: str) -> None:
    shape = Shape(batch=2, groups=2, per_group=2, tokens=30, key_size=4, value_size=4, seed=3)
    call, _ = make(shape, True, dtype)
    exact = {x: y.double() if isinstance(y, Tensor) and y.is_floating_point() else y for x, y in call.items()}
    fixed: dict[str, Any] = {**PLAIN, "method": method, **sized((2, 8, 1, 3))}
    out, *_, pages = run(call, [slice(0, 11), slice(11, 30)], **fixed)
    assert out.dtype == dtype and pages.dtype == torch.float32
    near = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(out.double(), run(exact, [slice(None)], **fixed)[0], rtol=near, atol=near)


def true_places(tokens: Tensor, count: Tensor, at: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    return tokens, at[:, None].expand_as(count)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fault", [{"budget": 10}, {"window": 5}, {"sinks": 3}, {"scaling": 1.1}, "method", "places"])
def test_the_oracle_sees_a_fault(fault: dict[str, Any] | str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(batch=2, groups=2, per_group=2, tokens=40, key_size=4, value_size=4, seed=7)
    call, _ = make(shape, False, padding=0.0, restart=0.0)
    fixed: dict[str, Any] = {**PLAIN, "method": method, **sized((2, 8, 1, 3))}
    expected = compact_oracle.compact_attention(**call, **fixed)
    torch.testing.assert_close(run(call, [slice(None)], **fixed)[0], expected.out)
    if fault == "places":
        monkeypatch.setattr(choose, "_places", true_places)
    elif isinstance(fault, str):
        fixed["method"] = next(other for other in METHODS if other != method)
    else:
        fixed |= fault
    with pytest.raises(AssertionError):
        torch.testing.assert_close(run(call, [slice(None)], **fixed)[0], expected.out)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"budget": 7}, "whole pages"),
        ({"window": 6}, "fit the budget"),
        ({"method": "bounds"}, "one of longheads"),
        ({"method": "infllm", "window": 1}, "a window of a page"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(wrong: dict[str, Any], reason: str) -> None:
    shape = Shape(batch=1, groups=1, per_group=1, tokens=5, key_size=4, value_size=4, seed=1)
    call, _ = make(shape, False)
    fixed: dict[str, Any] = {**PLAIN, "method": "longheads", **sized((2, 6, 1, 2)), **wrong}
    with pytest.raises(RuntimeError, match=reason), torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        run(call, [slice(None)], **fixed)
