"""Kernel law, state law and the shared choices of ``memc::refreshed_attention``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import memc.kernels  # noqa: F401
from memc.dialect.refreshed_attention import most_chosen
from memc.dialect.selectors import SELECTORS
from memc.dialect.sparse_attention import METHODS, description
from memc.kernels.refreshed_attention.choose import Choices
from tests.kernels import oracles
from tests.kernels.cases import F64, Shape, cut, shapes
from tests.kernels.test_sparse_attention import JOINT, fitting, make, sized
from tests.kernels.test_sparse_attention import run as run_sparse

OP = torch.ops.memc.refreshed_attention

# page, budget, sinks, window and refresh: at most the window
SIZES = st.sampled_from(
    [(1, 6, 1, 2, 2), (2, 8, 1, 3, 3), (3, 9, 2, 1, 1), (3, 12, 0, 4, 3), (4, 16, 3, 5, 5), (4, 64, 3, 9, 7)]
)
options = st.fixed_dictionaries(
    {
        "method": st.sampled_from(METHODS),
        "channels": st.integers(1, 3),
        "rerank": st.sampled_from([1, 2]),
        "dense_below": st.sampled_from([0, 7]),
        "softcap": st.sampled_from([0.0, 1.5]),
        "mass": st.sampled_from([1.0, 0.55]),
        "beam": st.sampled_from([1, 4]),
    }
).map(lambda o: {**o, "mass": 1.0} if SELECTORS[o["method"]].searches else o)


def run(call: dict[str, Any], parts: list[slice], **fixed: Any) -> list[Tensor]:
    """Run the op in several calls; output and log-sum-exp joined, then the state."""
    q, k, v, positions = (call[x] for x in ("query", "key", "value", "positions"))
    batch, groups, _, size = k.shape
    fixed["channels"] = min(fixed.get("channels", 2), size)
    state = [k.new_zeros(batch, groups, 0, size), v.new_zeros(batch, groups, 0, v.shape[3])]
    state += [positions.new_zeros(batch, 0), k.new_zeros(batch, groups, 0, *described(fixed, size))]
    most = most_chosen(fixed["method"], fixed["page"], fixed["budget"], fixed.get("rerank", 1))
    state.append(positions.new_full((batch, groups, most), -1))
    outputs = []
    for part in parts:
        new = (q[:, :, part], k[:, :, part], v[:, :, part], positions[:, part])
        results = OP(*new, *state, call["sink_logits"], **fixed)
        outputs.append(results[:2])
        state = list(results[2:])
    return [torch.cat(pieces, 2) for pieces in zip(*outputs, strict=True)] + state


def described(fixed: dict[str, Any], size: int) -> tuple[int, ...]:
    return description(fixed["method"], fixed["page"], size)


def with_refresh(sizes: tuple[int, int, int, int, int], extra: dict[str, Any]) -> dict[str, Any]:
    """Return sizes and options that go together."""
    return {"refresh": sizes[4], **fitting(sizes[:4], extra)}


def of(sizes: tuple[int, int, int, int, int]) -> dict[str, int]:
    return {**sized(sizes[:4]), "refresh": sizes[4]}


@given(shapes(40), options, SIZES, st.booleans())
def test_refreshed_attention_equals_oracle_however_it_is_cut(
    shape: Shape, extra: dict[str, Any], sizes: tuple[int, int, int, int, int], sink_logits: bool
) -> None:
    call, generator = make(shape, sink_logits)
    fixed = with_refresh(sizes, extra)
    fixed["channels"] = min(fixed["channels"], shape.key_size)
    expected = oracles.sparse_attention(**call, **fixed)
    whole = run(call, [slice(None)], **fixed)
    torch.testing.assert_close(whole[0], expected.out)
    torch.testing.assert_close(whole[1], expected.lse)
    for one, other in zip(whole, run(call, cut(shape.tokens, generator), **fixed), strict=True):
        torch.testing.assert_close(one, other)


@settings(max_examples=10, deadline=None)
@given(shapes(30), options, SIZES)
def test_one_token_at_a_time_equals_one_call(
    shape: Shape, extra: dict[str, Any], sizes: tuple[int, int, int, int, int]
) -> None:
    call, _ = make(shape, True)
    fixed = with_refresh(sizes, extra)
    single = run(call, [slice(t, t + 1) for t in range(shape.tokens)], **fixed)
    for one, other in zip(run(call, [slice(None)], **fixed), single, strict=True):
        torch.testing.assert_close(one, other)


@settings(max_examples=20, deadline=None)
@given(shapes(30), options, SIZES)
def test_a_choice_for_one_token_is_sparse_attention(
    shape: Shape, extra: dict[str, Any], sizes: tuple[int, int, int, int, int]
) -> None:
    call, _ = make(shape, True)
    fixed = fitting(sizes[:4], extra)
    each, sparse = run(call, [slice(None)], **fixed, refresh=1), run_sparse(call, [slice(None)], **fixed)
    for one, other in zip(each[:-1], sparse, strict=True):
        torch.testing.assert_close(one, other)


@settings(max_examples=10, deadline=None)
@given(shapes(20), options)
def test_a_batch_of_mixed_lengths_equals_one_at_a_time(shape: Shape, extra: dict[str, Any]) -> None:
    call, _ = make(shape, True, restart=0.0)
    fixed = with_refresh((2, 8, 1, 3, 3), extra)
    together = run(call, [slice(None)], **fixed)
    for b in range(shape.batch):
        kept = call["positions"][b] >= 0
        if kept.any():
            row = {x: call[x][b : b + 1, :, kept] for x in ("query", "key", "value")}
            row |= {"positions": call["positions"][b : b + 1, kept], "sink_logits": call["sink_logits"]}
            alone = run(row, [slice(None)], **fixed)
            torch.testing.assert_close(together[0][b, :, kept], alone[0][0])
            torch.testing.assert_close(together[-1][b], alone[-1][0])
        assert not together[0][b, :, ~kept].any()


@pytest.mark.parametrize("method", JOINT)
@pytest.mark.parametrize("rerank", [1, 4])
def test_a_budget_that_holds_everything_is_dense(method: str, rerank: int) -> None:
    shape = Shape(batch=2, groups=2, per_group=3, tokens=75, key_size=16, value_size=16, seed=5)
    call, _ = make(shape, True, torch.float32, padding=0.1, restart=0.0)
    fixed: dict[str, Any] = {"scale": 0.25, "method": method, "rerank": rerank, **of((16, 80, 4, 20, 20))}
    dense = torch.ops.memc.attention(
        *(call[x] for x in ("query", "key", "value", "positions")),
        call["key"][:, :, :0], call["value"][:, :, :0], call["positions"][:, :0], None, call["sink_logits"], scale=0.25,
    )  # fmt: skip
    torch.testing.assert_close(run(call, [slice(0, 33), slice(33, 75)], **fixed)[0], dense[0], atol=1e-5, rtol=0)
    less = run(call, [slice(None)], **{**fixed, **of((16, 48, 4, 8, 8))})[0]
    assert (less - dense[0]).abs().max() > 1e-3, "a smaller budget is another function"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("refresh", [1, 3, 7])
def test_nothing_recent_is_missed_and_the_budget_holds(
    method: str, refresh: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Shape(batch=1, groups=2, per_group=2, tokens=90, key_size=4, value_size=3, seed=refresh)
    call, _ = make(shape, False, padding=0.0, restart=0.0)
    fixed = {"scale": 0.7, "method": method, **of((4, 20, 3, 7, refresh))}
    seen: list[tuple[Tensor, Tensor]] = []
    right = Choices.candidates

    def spy(self: Choices, rows: slice, at: Tensor, count: int, rule: Any) -> Tensor:
        taken = right(self, rows, at, count, rule)
        seen.append((at, taken.repeat_interleave(rule.unit, -1)))
        return taken

    monkeypatch.setattr(Choices, "candidates", spy)
    run(call, [slice(0, 31), slice(31, 90)], **fixed)
    for at, taken in seen:
        p, j = at[:, None, :, None], torch.arange(taken.shape[3])
        must = (j <= p) & ((j < 3) | (p - j < 7))
        assert bool(taken.masked_select(must).all())
        count = (taken & (j <= p)).sum(-1)
        assert int(count.max()) <= 20
        early = (at < 20)[:, None].expand(count.shape)
        assert bool((count == at[:, None] + 1)[early].all())


def test_equal_scores_are_listed_by_the_lower_index() -> None:
    shape = Shape(batch=1, groups=1, per_group=2, tokens=40, key_size=4, value_size=3, seed=1)
    call, _ = make(shape, False, padding=0.0, restart=0.0)
    call["key"].zero_()
    choice = run(call, [slice(None)], scale=0.7, method="bounds", **of((2, 12, 1, 3, 3)))[-1]
    # Chosen at 39: the pages of the sink and of positions 37 to 39, then the first of all others.
    assert choice.tolist() == [[[0, 18, 19, 1, 2, 3]]]


FAULTS = [
    {"refresh": 2},
    {"refresh": 1},
    {"budget": 10},
    {"window": 4},
    {"dense_below": 1},
    {"method": "moments"},
    {"mass": 0.5},
]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_oracle_sees_a_fault(fault: dict[str, Any]) -> None:
    shape = Shape(batch=2, groups=2, per_group=2, tokens=40, key_size=4, value_size=3, seed=7)
    call, _ = make(shape, False, padding=0.0, restart=0.0)
    fixed: dict[str, Any] = {"scale": 0.7, "method": "bounds", **of((2, 14 if "mass" in fault else 8, 2, 3, 3))}
    expected = oracles.sparse_attention(**call, **fixed)
    torch.testing.assert_close(run(call, [slice(None)], **fixed)[0], expected.out)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(run(call, [slice(None)], **{**fixed, **fault})[0], expected.out)


def test_a_list_that_is_lost_between_calls_is_seen() -> None:
    shape = Shape(batch=2, groups=2, per_group=2, tokens=40, key_size=4, value_size=3, seed=7)
    call, _ = make(shape, False, F64, padding=0.0, restart=0.0)
    fixed: dict[str, Any] = {"scale": 0.7, "method": "bounds", **of((2, 8, 2, 3, 3))}
    q, k, v, positions = (call[x] for x in ("query", "key", "value", "positions"))
    early = {x: call[x][:, :, :20] for x in ("query", "key", "value")}
    first = run({**early, "positions": positions[:, :20], "sink_logits": None}, [slice(None)], **fixed)
    whole = run(call, [slice(None)], **fixed)[0]
    new = (q[:, :, 20:], k[:, :, 20:], v[:, :, 20:], positions[:, 20:])
    kept, lost = OP(*new, *first[2:], **fixed)[0], OP(*new, *first[2:-1], first[-1].fill_(-1), **fixed)[0]
    torch.testing.assert_close(kept, whole[:, :, 20:])
    assert (lost[:, :, 0] - whole[:, :, 20]).abs().max() > 1e-3
    torch.testing.assert_close(lost[:, :, 1:], whole[:, :, 21:])


def test_a_window_that_does_not_hold_what_is_newer_is_refused() -> None:
    shape = Shape(batch=1, groups=1, per_group=1, tokens=5, key_size=2, value_size=2, seed=1)
    call, _ = make(shape, False)
    with (
        pytest.raises(RuntimeError, match="at most the window"),
        torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True),
    ):
        run(call, [slice(None)], scale=0.5, method="bounds", **of((2, 8, 1, 2, 3)))
