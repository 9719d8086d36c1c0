"""Kernel law, state law, rounding and gradient of ``memc::quantised_attention``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import memc.kernels  # noqa: F401
from memc.dialect.quantised_attention import BITS, code_bytes
from memc.kernels.quantised_attention.codes import decode, encode
from tests.kernels import oracles
from tests.kernels.cases import F64, Shape, cut, shapes, walk

OP = torch.ops.memc.quantised_attention

# page, budget, sinks, window
SIZES = st.sampled_from([(1, 3, 1, 2), (2, 6, 1, 2), (3, 9, 2, 1), (3, 12, 0, 4), (4, 8, 0, 2), (4, 64, 3, 5)])
options = st.fixed_dictionaries(
    {
        "bits": st.sampled_from(BITS),
        "rerank": st.sampled_from([1, 2, 3]),
        "dense_below": st.sampled_from([0, 7]),
        "softcap": st.sampled_from([0.0, 1.5]),
    }
)
SMALL = {"scale": 0.7, "bits": 4, "page": 2, "budget": 6, "sinks": 1, "window": 2}


def empty(call: dict[str, Any], bits: int, page: int) -> list[Tensor]:
    """The state before the first token."""
    key, value, positions = call["key"], call["value"], call["positions"]
    batch, groups, _, size = key.shape
    return [
        torch.zeros(batch, groups, 0, page, code_bytes(size, bits), dtype=torch.uint8),
        torch.zeros(batch, groups, 0, code_bytes(value.shape[3], bits), dtype=torch.uint8),
        positions.new_zeros(batch, 0),
        key.new_zeros(batch, groups, 0, 2 * size),
        value.new_zeros(batch, groups, 0, 2),
        key.new_zeros(batch, groups, page, size),
        value.new_zeros(batch, groups, page, value.shape[3]),
    ]


def run(call: dict[str, Any], parts: list[slice], **fixed: Any) -> list[Tensor]:
    """Run the op in several calls; output and log-sum-exp joined, then the state."""
    q, k, v, positions = (call[x] for x in ("query", "key", "value", "positions"))
    state, outputs = empty(call, fixed["bits"], fixed["page"]), []
    for part in parts:
        new = (q[:, :, part], k[:, :, part], v[:, :, part], positions[:, part])
        results = OP(*new, *state, call["sink_logits"], **fixed)
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


@settings(max_examples=40, deadline=None)
@given(shapes(30), options, SIZES, st.booleans())
def test_quantised_attention_equals_oracle_in_any_split(
    shape: Shape, extra: dict[str, Any], sizes: tuple[int, int, int, int], sink_logits: bool
) -> None:
    call, generator = make(shape, sink_logits)
    fixed = {"scale": 0.7, **sized(sizes), **extra}
    expected = oracles.sparse_attention(**call, **fixed)
    whole = run(call, [slice(None)], **fixed)
    torch.testing.assert_close(whole[0], expected.out)
    torch.testing.assert_close(whole[1], expected.lse)
    for b, held in enumerate(expected.held):
        page = fixed["page"]
        tail = [x for x in held if x.position >= len(held) // page * page]
        for name, index in (("key", 7), ("value", 8)):
            there = torch.stack([getattr(x, name) for x in tail], 1) if tail else whole[index][b, :, :0]
            assert torch.equal(whole[index][b, :, : len(tail)], there)
            assert not whole[index][b, :, len(tail) :].any()
    for one, other in zip(whole, run(call, cut(shape.tokens, generator), **fixed), strict=True):
        torch.testing.assert_close(one, other)


@settings(max_examples=10, deadline=None)
@given(shapes(25), options, SIZES)
def test_appending_one_token_at_a_time_builds_the_same_state(
    shape: Shape, extra: dict[str, Any], sizes: tuple[int, int, int, int]
) -> None:
    call, _ = make(shape, True)
    fixed = {"scale": 0.7, **sized(sizes), **extra}
    single = run(call, [slice(t, t + 1) for t in range(shape.tokens)], **fixed)
    whole = run(call, [slice(None)], **fixed)
    torch.testing.assert_close(single[0], whole[0])
    assert all(torch.equal(one, other) for one, other in zip(single[2:], whole[2:], strict=True)), "the same bits"


@settings(max_examples=20, deadline=None)
@given(shapes(20), options)
def test_a_batch_of_mixed_lengths_equals_one_at_a_time(shape: Shape, extra: dict[str, Any]) -> None:
    call, _ = make(shape, True, restart=0.0)
    fixed = {**SMALL, **extra}
    together = run(call, [slice(None)], **fixed)[0]
    for b in range(shape.batch):
        kept = call["positions"][b] >= 0
        if kept.any():
            row = {x: call[x][b : b + 1, :, kept] for x in ("query", "key", "value")}
            row |= {"positions": call["positions"][b : b + 1, kept], "sink_logits": call["sink_logits"]}
            torch.testing.assert_close(together[b, :, kept], run(row, [slice(None)], **fixed)[0][0])
        assert not together[b, :, ~kept].any()


@pytest.mark.parametrize("size", [64, 80, 96, 128])
@pytest.mark.parametrize("bits", BITS)
def test_sequences_of_a_page_are_dense_and_longer_ones_nearly(size: int, bits: int) -> None:
    shape = Shape(batch=2, groups=2, per_group=3, tokens=75, key_size=size, value_size=size, seed=size)
    call, _ = make(shape, True, torch.float32, padding=0.0, restart=0.0)
    dense = torch.ops.memc.attention(
        *(call[x] for x in ("query", "key", "value", "positions")),
        call["key"][:, :, :0], call["value"][:, :, :0], call["positions"][:, :0], None, call["sink_logits"],
        scale=size**-0.5,
    )[0]  # fmt: skip
    fixed = {"scale": size**-0.5, "bits": bits, **sized((80, 160, 4, 20))}
    torch.testing.assert_close(run(call, [slice(0, 33), slice(33, 75)], **fixed)[0], dense, atol=1e-5, rtol=0)
    out = run(call, [slice(None)], **{**fixed, **sized((16, 80, 4, 20))})[0]
    torch.testing.assert_close(out[:, :, :16], dense[:, :, :16], atol=1e-5, rtol=0)
    away = (out - dense)[:, :, 16:].norm() / dense[:, :, 16:].norm()
    assert {8: 1e-4, 4: 1e-2}[bits] < away < {8: 2e-2, 4: 0.3}[bits]


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 7), st.sampled_from(BITS), st.integers(0, 99))
def test_rounding_is_to_the_nearest_level_within_the_range(page: int, channels: int, bits: int, seed: int) -> None:
    x = torch.randn(3, page, channels, dtype=F64, generator=torch.Generator().manual_seed(seed))
    top, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    codes = encode(x, top, low, bits)
    assert codes.shape == (3, page, code_bytes(channels, bits)) and codes.dtype == torch.uint8
    back = decode(codes, top, low, bits, channels)
    assert bool(((back - x).abs() <= (top - low) / (2**bits - 1) / 2 + 1e-12).all())
    assert bool((back <= top + 1e-12).all()) and bool((back >= low).all()), "its range bounds what is read of a page"
    if page > 2:
        other = decode(encode(x, top, low, 4), top, low, 4, channels)
        assert bits == 4 or (other - x).abs().max() > (back - x).abs().max()


def test_equal_numbers_are_their_own_level() -> None:
    x = torch.full((1, 3, 5), 0.3)
    assert torch.equal(decode(encode(x, x, x, 4), x, x, 4, 5), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_types_are_as_near_as_they_can_be(dtype: torch.dtype) -> None:
    shape = Shape(batch=2, groups=2, per_group=2, tokens=30, key_size=4, value_size=3, seed=3)
    call, _ = make(shape, True, dtype)
    exact = {x: y.double() if isinstance(y, Tensor) and y.is_floating_point() else y for x, y in call.items()}
    fixed: dict[str, Any] = {**SMALL, "bits": 8}
    out = run(call, [slice(0, 11), slice(11, 30)], **fixed)[0]
    assert out.dtype == dtype
    near = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(out.double(), run(exact, [slice(None)], **fixed)[0], rtol=near, atol=near)


def test_gradients_pass_straight_through_the_rounding() -> None:
    """Against autograd of a dense softmax over keys and values that are rounded, the rounding a constant added."""
    shape = Shape(batch=1, groups=2, per_group=2, tokens=14, key_size=4, value_size=3, seed=11)
    call, generator = make(shape, False, padding=0.0, restart=0.0)
    page, leaves = 4, [call[x].requires_grad_() for x in ("query", "key", "value")]
    fixed: dict[str, Any] = {"scale": 0.7, "bits": 4, **sized((page, 16, 0, 2))}
    weight = torch.randn(1, shape.heads, 14, 3, dtype=F64, generator=generator)
    found = torch.autograd.grad((run(call, [slice(None)], **fixed)[0] * weight).sum(), leaves)
    query, key, value = leaves
    outs = []
    for p in range(14):
        rows = [oracles.Token(t, key[0, :, t].detach(), value[0, :, t].detach()) for t in range(p + 1)]
        read = oracles.through_codes(rows, p, fixed)
        keys = key[0, :, : p + 1] + torch.stack([x.key for x in read], 1) - key[0, :, : p + 1].detach()
        values = value[0, :, : p + 1] + torch.stack([x.value for x in read], 1) - value[0, :, : p + 1].detach()
        scores = query[0, :, p].view(2, 2, 4) @ keys.mT * 0.7
        outs.append((scores.softmax(-1) @ values).flatten(0, 1))
    wanted = torch.autograd.grad((torch.stack(outs, 1)[None] * weight).sum(), leaves)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


FAULTS = [{"budget": 4}, {"window": 2}, {"sinks": 0}, {"rerank": 3}, {"bits": 8}, {"page": 1}]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_oracle_sees_a_fault(fault: dict[str, Any]) -> None:
    shape = Shape(batch=2, groups=2, per_group=2, tokens=40, key_size=4, value_size=3, seed=7)
    call, _ = make(shape, False, padding=0.0, restart=0.0)
    fixed: dict[str, Any] = {"scale": 0.7, "bits": 4, "page": 2, "budget": 6, "sinks": 2, "window": 1, "rerank": 2}
    fixed |= {"page": 1} if "window" in fault else {}
    expected = oracles.sparse_attention(**call, **fixed)
    torch.testing.assert_close(run(call, [slice(None)], **fixed)[0], expected.out)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(run(call, [slice(None)], **{**fixed, **fault})[0], expected.out)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [({"budget": 7}, "whole pages"), ({"window": 6}, "fit the budget"), ({"bits": 5}, "one of 8, 4")],
)
def test_arguments_that_do_not_fit_are_refused(wrong: dict[str, Any], reason: str) -> None:
    shape = Shape(batch=1, groups=1, per_group=1, tokens=5, key_size=2, value_size=2, seed=1)
    call, _ = make(shape, False)
    with pytest.raises(RuntimeError, match=reason), torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        run(call, [slice(None)], **{**SMALL, **wrong})
