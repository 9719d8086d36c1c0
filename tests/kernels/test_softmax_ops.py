"""Kernel law and state law of ``memc::attention`` and ``memc::window_memory``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import memc.kernels  # noqa: F401
from tests.kernels import oracles
from tests.kernels.cases import F64, Shape, cut, shapes, walk

OPS = torch.ops.memc
options = st.fixed_dictionaries(
    {"softcap": st.sampled_from([0.0, 1.5]), "slopes": st.booleans(), "sink_logits": st.booleans()}
)


def run(name: str, call: dict[str, Any], shape: Shape, parts: list[slice], **fixed: Any) -> list[Tensor]:
    """Run one of the two ops in several calls; per-token outputs joined, then the state."""
    q, k, v, positions = (call[x] for x in ("query", "key", "value", "positions"))
    slots = fixed["window"] + fixed["sinks"] if name == "window_memory" else 0
    state: list[Tensor] = [
        torch.zeros(q.shape[0], shape.groups, slots, shape.key_size, dtype=k.dtype),
        torch.zeros(q.shape[0], shape.groups, slots, shape.value_size, dtype=v.dtype),
        torch.full((q.shape[0], slots), -1),
    ]
    outputs = []
    for part in parts:
        results = getattr(OPS, name)(
            q[:, :, part], k[:, :, part], v[:, :, part], positions[:, part], *state,
            call["slopes"], call["sink_logits"], **fixed,
        )  # fmt: skip
        outputs.append(results[:-3])
        state = list(results[-3:])
    joined = [torch.cat(pieces, 1 if pieces[0].dim() == 2 else 2) for pieces in zip(*outputs, strict=True)]
    return joined + state


def make(shape: Shape, extra: dict[str, Any], dtype: torch.dtype = F64, **walking: float) -> tuple[dict[str, Any], Any]:
    generator = shape.generator()
    q, k, v = shape.qkv(generator, dtype)
    call: dict[str, Any] = {"query": q, "key": k, "value": v, "positions": walk(shape, generator, **walking)}
    for name in ("slopes", "sink_logits"):
        call[name] = torch.rand(shape.heads, dtype=F64, generator=generator).to(dtype) if extra[name] else None
    return call, generator


def oracle(call: dict[str, Any], **fixed: Any) -> oracles.Result:
    return oracles.attention(
        call["query"], call["key"], call["value"], call["positions"], [[] for _ in call["query"]],
        slopes=call["slopes"], sink_logits=call["sink_logits"], **fixed,
    )  # fmt: skip


def check_window(results: list[Tensor], expected: oracles.Result, window: int, sinks: int) -> None:
    out, lse, left_key, left_value, left_positions, key, value, positions = results
    torch.testing.assert_close(out, expected.out)
    torch.testing.assert_close(lse, expected.lse)
    for b, row in enumerate(expected.left):
        for t, token in enumerate(row):
            assert int(left_positions[b, t]) == (-1 if token is None else token.position)
            assert torch.equal(left_key[b, :, t], torch.zeros_like(left_key[b, :, t]) if token is None else token.key)
            assert torch.equal(left_value[b, :, t], torch.zeros_like(value[b, :, 0]) if token is None else token.value)
    for b, held in enumerate(expected.held):
        newest = max((token.position for token in held), default=-1)
        slots = dict.fromkeys(range(window + sinks), -1)
        for token in held:
            p = token.position
            if p < sinks or p > newest - window:
                slot = p if p < sinks else sinks + (p - sinks) % window
                slots[slot] = p
                assert torch.equal(key[b, :, slot], token.key)
                assert torch.equal(value[b, :, slot], token.value)
        assert positions[b].tolist() == list(slots.values())


@given(shapes(), options, st.sampled_from([(0, 0, 0), (3, 0, 0), (0, 4, 0), (1, 0, 0), (2, 3, 0), (0, 0, 4)]))
def test_attention_equals_oracle(shape: Shape, extra: dict[str, Any], rule: tuple[int, int, int]) -> None:
    call, generator = make(shape, extra)
    fixed = {"scale": 0.7, "softcap": extra["softcap"], **dict(zip(("window", "chunk", "prefix"), rule, strict=True))}
    expected = oracle(call, **fixed)
    whole = run("attention", call, shape, [slice(None)], **fixed)
    torch.testing.assert_close(whole[0], expected.out)
    for b, held in enumerate(expected.held):
        assert sorted(p for p in whole[3][b].tolist() if p >= 0) == [token.position for token in held]
    if not rule[2]:
        for one, other in zip(whole, run("attention", call, shape, cut(shape.tokens, generator), **fixed), strict=True):
            torch.testing.assert_close(one, other)


@given(shapes(40), options, st.integers(1, 5), st.integers(0, 3))
def test_window_memory_equals_oracle(shape: Shape, extra: dict[str, Any], window: int, sinks: int) -> None:
    call, generator = make(shape, extra)
    fixed = {"scale": 0.7, "softcap": extra["softcap"], "window": window, "sinks": sinks}
    whole = run("window_memory", call, shape, [slice(None)], **fixed)
    check_window(whole, oracle(call, **fixed), window, sinks)
    parts = run("window_memory", call, shape, cut(shape.tokens, generator), **fixed)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other)


@given(shapes(12), st.sampled_from(["attention", "window_memory"]))
def test_a_batch_of_mixed_lengths_equals_one_at_a_time(shape: Shape, name: str) -> None:
    call, _ = make(shape, {"slopes": True, "sink_logits": True}, restart=0.0)
    fixed: dict[str, Any] = {"scale": 0.5, "window": 3, **({"sinks": 2} if name == "window_memory" else {})}
    together = run(name, call, shape, [slice(None)], **fixed)[0]
    for b in range(shape.batch):
        kept = call["positions"][b] >= 0
        if kept.any():
            row = {x: call[x][b : b + 1, :, kept] for x in ("query", "key", "value")}
            row |= {"positions": call["positions"][b : b + 1, kept], **{x: call[x] for x in ("slopes", "sink_logits")}}
            alone = run(name, row, shape, [slice(None)], **fixed)[0]
            torch.testing.assert_close(together[b, :, kept], alone[0])
        assert not together[b, :, ~kept].any()


@pytest.mark.parametrize("restart", [0.0, 0.004])
@pytest.mark.parametrize(("window", "sinks"), [(5, 2), (70, 3), (100, 0), (300, 1)])
def test_window_memory_over_many_blocks(window: int, sinks: int, restart: float) -> None:
    shape = Shape(batch=2, groups=1, per_group=2, tokens=420, key_size=3, value_size=2, seed=1)
    call, _ = make(shape, {"slopes": True, "sink_logits": True}, padding=0.1, restart=restart)
    fixed = {"scale": 0.7, "window": window, "sinks": sinks}
    parts = [slice(0, 60), slice(60, 420)]
    whole = run("window_memory", call, shape, [slice(None)], **fixed)
    single = run("window_memory", call, shape, [slice(t, t + 1) for t in range(420)], **fixed)
    for one, two, three in zip(whole, run("window_memory", call, shape, parts, **fixed), single, strict=True):
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(one, three)
    if not sinks:
        dense = run("attention", call, shape, [slice(None)], scale=0.7, window=window)
        torch.testing.assert_close(whole[0], dense[0])


def test_window_memory_needs_no_square_of_the_length() -> None:
    shape = Shape(batch=1, groups=1, per_group=1, tokens=60_000, key_size=2, value_size=2, seed=1)
    call, _ = make(shape, {"slopes": False, "sink_logits": False}, torch.float32, padding=0.0, restart=0.0)
    out = run("window_memory", call, shape, [slice(None)], scale=1.0, window=32, sinks=2)[0]
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["attention", "window_memory"])
def test_half_types_are_as_near_as_they_can_be(name: str, dtype: torch.dtype) -> None:
    shape = Shape(batch=2, groups=2, per_group=2, tokens=20, key_size=4, value_size=3, seed=3)
    call, _ = make(shape, {"slopes": False, "sink_logits": True}, dtype)
    exact = {x: y.double() if isinstance(y, Tensor) and y.is_floating_point() else y for x, y in call.items()}
    fixed: dict[str, Any] = {"scale": 0.5, "window": 3, **({"sinks": 2} if name == "window_memory" else {})}
    out = run(name, call, shape, [slice(None)], **fixed)[0]
    assert out.dtype == dtype
    near = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(out.double(), run(name, exact, shape, [slice(None)], **fixed)[0], rtol=near, atol=near)


@pytest.mark.parametrize("name", ["attention", "window_memory"])
def test_a_window_that_is_off_by_one_is_found(name: str) -> None:
    shape = Shape(batch=1, groups=1, per_group=1, tokens=9, key_size=3, value_size=2, seed=5)
    call, _ = make(shape, {"slopes": False, "sink_logits": False}, padding=0.0, restart=0.0)
    fixed: dict[str, Any] = {"scale": 0.5, **({"sinks": 0} if name == "window_memory" else {})}
    out = run(name, call, shape, [slice(None)], window=4, **fixed)[0]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(out, oracle(call, window=3, **fixed).out)


def test_a_sink_that_is_forgotten_is_found() -> None:
    shape = Shape(batch=1, groups=1, per_group=1, tokens=9, key_size=3, value_size=2, seed=5)
    call, _ = make(shape, {"slopes": False, "sink_logits": False}, padding=0.0, restart=0.0)
    results = run("window_memory", call, shape, [slice(None)], scale=0.5, window=3, sinks=2)
    with pytest.raises(AssertionError):
        check_window(results, oracle(call, scale=0.5, window=3, sinks=1), 3, 2)
