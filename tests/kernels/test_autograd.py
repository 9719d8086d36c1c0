"""Every op: gradients by finite differences in float64, torch's own checks, and no output that is an input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import memc.kernels  # noqa: F401
from memc.dialect import OPS
from memc.dialect.quantised_attention import code_bytes
from memc.dialect.refreshed_attention import most_chosen
from memc.dialect.sparse_attention import described_tokens, description

B, H, G, T, D, E = 2, 4, 2, 7, 3, 5
POSITIONS = torch.tensor([[3, 4, -1, 0, 1, 2, -1], [-1, 5, 6, 7, 8, 9, 10]])


@dataclass(frozen=True)
class Case:
    """One call of one op."""

    op: str
    args: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)


def real(*sizes: int) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64)


def softmax_case(op: str, held: list[list[int]], bias: bool, **options: Any) -> Callable[[], Case]:
    def make() -> Case:
        past = torch.tensor(held, dtype=torch.int64)
        slots = past.shape[1]
        state = (real(B, G, slots, D), real(B, G, slots, E), past)
        extra = (real(H), real(H)) if bias else ()
        return Case(op, (real(B, H, T, D), real(B, G, T, D), real(B, G, T, E), POSITIONS, *state, *extra), options)

    return make


def sparse_case(held: int, bias: bool, groups: int = G, **options: Any) -> Callable[[], Case]:
    def make() -> Case:
        past, page = torch.arange(held).expand(B, held).contiguous(), options.get("page", 2)
        described = description(options["method"], page, D)
        positions = torch.stack([torch.arange(held, held + T), torch.tensor([held, -1, 0, 1, 2, 3, 4])])
        count = -(-held // described_tokens(options["method"], page))
        state = (real(B, groups, held, D), real(B, groups, held, E), past, real(B, groups, count, *described))
        extra = (real(2 * groups),) if bias else ()
        args = (real(B, 2 * groups, T, D), real(B, groups, T, D), real(B, groups, T, E), positions, *state, *extra)
        return Case("sparse_attention", args, {"scale": 0.4, "page": page, "sinks": 1, "window": 1, **options})

    return make


def refreshed_case(held: int, bias: bool, groups: int = G, **options: Any) -> Callable[[], Case]:
    """As a sparse case, with lists that were made by an earlier call."""

    def make() -> Case:
        case = sparse_case(held, bias, groups, **options)()
        most = most_chosen(options["method"], 2, options["budget"], options.get("rerank", 1))
        listed = torch.full((B, groups, most), -1)
        listed[..., :2] = torch.arange(2)
        args = (*case.args[:8], listed, *case.args[8:])
        return Case("refreshed_attention", args, {**case.options, "window": 3, "refresh": 3})

    return make


def eventful_case() -> Case:
    """One key-value head of one row, whose tokens held have events, the last one's not known yet."""
    held = (real(1, 1, 7, D), real(1, 1, 7, E), torch.arange(7)[None], real(1, 1, 4, D, 2))
    qkv = (real(1, 2, 3, D), real(1, 1, 3, D), real(1, 1, 3, E))
    args = (*qkv, torch.tensor([[7, -1, 8]]), *held, real(2), torch.tensor([[0, 0, 1, 1, 2, 2, -1]]))
    fixed = {"page": 2, "budget": 6, "dense_below": 6, "sinks": 1, "window": 1}
    by_events = {"method": "em", "channels": 2, "contiguity": 0.4, "delay": 1}
    return Case("sparse_attention", args, {"scale": 0.4, **fixed, **by_events})


def events_case() -> Case:
    """The events of a row that goes on, and of one that starts anew."""
    past, events = torch.arange(4).expand(B, 4).contiguous(), torch.tensor([[0, 0, 1, -1]]).expand(B, 4).contiguous()
    state = (real(B, 8), real(B, 3), real(B, G, 4, D), events, past)
    args = (real(B, T, 8), torch.arange(B * T).view(B, T) % 8, SPLIT, real(B, G, T, D), *state)
    return Case("events", args, {"gamma": 0.5, "longest": 3})


def quantised_case(held: int, bias: bool, groups: int = G, **options: Any) -> Callable[[], Case]:
    """Pages longer than the sequences: rounding has no derivative to compare with."""

    def make() -> Case:
        page, bits = 16, options["bits"]
        past = torch.arange(held).expand(B, held).contiguous()
        positions = torch.stack([torch.arange(held, held + T), torch.tensor([held, -1, 0, 1, 2, 3, 4])])
        codes = (
            torch.zeros(B, groups, -(-held // page), page, code_bytes(D, bits), dtype=torch.uint8),
            torch.zeros(B, groups, held, code_bytes(E, bits), dtype=torch.uint8),
        )
        there = (torch.arange(page) < held)[:, None]
        tails = (real(B, groups, page, D) * there, real(B, groups, page, E) * there)
        state = (*codes, past, real(B, groups, codes[0].shape[2], 2 * D), real(B, groups, held, 2), *tails)
        extra = (real(2 * groups),) if bias else ()
        args = (real(B, 2 * groups, T, D), real(B, groups, T, D), real(B, groups, T, E), positions, *state, *extra)
        fixed = {"scale": 0.4, "page": page, "budget": 32, "sinks": 1, "window": 1}
        return Case("quantised_attention", args, {**fixed, **options})

    return make


def compact_case(positions: list[int], held: int, bias: bool, **options: Any) -> Callable[[], Case]:
    """One key-value head of one row, since every query gathers keys of its own, which takes time."""

    def make() -> Case:
        tokens, past = len(positions), torch.arange(held)[None]
        qkv = (real(1, 2, tokens, D), real(1, 1, tokens, D), real(1, 1, tokens, D))
        state = (real(1, 1, held, D), real(1, 1, held, D), past, real(1, 1, -(-held // 2), 2 * D))
        args = (*qkv, torch.tensor([positions]), *state, real(1), *((real(2),) if bias else ()))
        fixed = {"scale": 0.4, "page": 2, "budget": 6, "sinks": 1, "window": 2, "scaling": 1.3}
        return Case("compact_attention", args, {**fixed, **options})

    return make


def memory_case(channels: int, update: str, tokens: int = T) -> Callable[[], Case]:
    def make() -> Case:
        gate = -2 * torch.rand(B, G, tokens, channels, dtype=torch.float64)
        beta = (torch.rand(B, G, tokens, dtype=torch.float64),) if update == "gated_delta" else ()
        q, k, v = real(B, H, tokens, D), real(B, G, tokens, D), real(B, G, tokens, E)
        return Case(
            "linear_memory", (q, k, v, gate, POSITIONS[:, :tokens], real(B, G, D, E), *beta), {"update": update}
        )

    return make


# Of each kind one case has several groups: a call for every entry of every input takes long.
SPLIT = torch.tensor([[4, -1, 5, 6, 7, 8, 9], [-1, 0, 1, 2, 3, -1, 4]])
KEYS = torch.tensor([[0, 1, -1, 2], [-1, -1, -1, -1]])
CASES: dict[str, Callable[[], Case]] = {
    "attention": softmax_case("attention", [[0, 1, -1, 2], [2, -1, 3, 4]], True, scale=0.4, window=3, softcap=2.0),
    "attention-empty": softmax_case("attention", [[], []], False, scale=0.4),
    "attention-chunk": softmax_case("attention", [[0, 1, -1, 2], [2, -1, 3, 4]], False, scale=0.4, chunk=4),
    "attention-prefix": softmax_case("attention", [[], []], False, scale=0.4, prefix=2),
    "window": softmax_case("window_memory", [[0, 1, 2], [0, 3, 4]], True, scale=0.4, window=2, sinks=1, softcap=2.0),
    "window-long": softmax_case("window_memory", [[2, 0, 1, -1], [4, 1, 2, 3]], False, scale=0.4, window=4),
    "sparse": sparse_case(5, True, method="bounds", budget=4, softcap=2.0),
    "sparse-levels": sparse_case(5, True, 1, method="bounds2", page=1, budget=4, beam=1),
    "sparse-again": sparse_case(5, False, 1, method="moments", budget=4, rerank=2, dense_below=3),
    "sparse-channels": sparse_case(5, True, 1, method="lowbit", channels=2, budget=4, rerank=2),
    "sparse-landmarks": sparse_case(5, True, 1, method="landmark", page=3, budget=9, softcap=2.0),
    "sparse-events": eventful_case,
    "sparse-empty": sparse_case(0, False, 1, method="moments", budget=4),
    "refreshed": refreshed_case(5, True, method="bounds", budget=6, softcap=2.0),
    "refreshed-again": refreshed_case(5, False, 1, method="lowbit", channels=2, budget=6, rerank=2, dense_below=3),
    "quantised": quantised_case(5, True, bits=4, softcap=2.0),
    "quantised-again": quantised_case(5, False, 1, bits=8, rerank=2),
    "quantised-empty": quantised_case(0, False, 1, bits=8),
    "compact": compact_case([7, -1, 8], 7, True, method="longheads", softcap=2.0, dense_below=8),
    "compact-clipped": compact_case([7, 8, 0, 1], 7, False, method="infllm", interleaved=True),
    "compact-empty": compact_case([0, 1, 2, 3], 0, True, method="infllm"),
    "events": events_case,
    "full": lambda: Case(
        "full_attention",
        (real(B, H, T, D), real(B, G, 4, D), real(B, G, 4, E), KEYS, real(H, 1, 4), real(H)),
        {"scale": 0.4, "softcap": 2.0},
    ),
    "full-plain": lambda: Case(
        "full_attention", (real(B, H, T, D), real(B, G, 4, D), real(B, G, 4, E)), {"scale": 0.4}
    ),
    "linear": memory_case(1, "gated"),
    "linear-channels": memory_case(D, "gated"),
    "linear-delta": memory_case(1, "gated_delta"),
    "linear-delta-channels": memory_case(D, "gated_delta"),
    "linear-one-token": memory_case(1, "gated", 1),
    "norm": lambda: Case("norm", (real(2, 3, 5), real(5), real(5)), {"eps": 1e-3}),
    "norm-center": lambda: Case("norm", (real(2, 3, 5), real(5)), {"eps": 1e-3, "center": True}),
    "bank": lambda: Case("bank_ffn", (real(B, T, D), real(B, 3, E, D)), {"activation": "silu"}),
    "rotary": lambda: Case("rotary", (real(B, H, T, 7), POSITIONS, real(2)), {"scaling": 1.3}),
    "rotary-interleaved": lambda: Case("rotary", (real(B, H, T, 4), POSITIONS, real(2)), {"interleaved": True}),
}


def call(case: Case, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    results = getattr(torch.ops.memc, case.op)(*args, **case.options)
    return results if isinstance(results, tuple) else (results,)


def is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def is_index(case: Case, index: int) -> bool:
    """Whether an argument chooses what is read and has no gradient."""
    indices = dict.fromkeys(("sparse_attention", "refreshed_attention", "compact_attention"), (7,))
    indices["quantised_attention"] = (7, 8)
    return index in indices.get(case.op, ())


def differentiable(case: Case, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The results that have a gradient."""
    paged = (0, 1, 2, 3)
    indices = dict.fromkeys(("sparse_attention", "refreshed_attention", "compact_attention"), paged)
    read = {**indices, "quantised_attention": (0, 1, 7, 8)}.get(case.op)
    kept = results if read is None else tuple(results[index] for index in read)
    return tuple(y for y in kept if is_real(y))


def test_every_op_has_a_case() -> None:
    assert {make().op for make in CASES.values()} == set(OPS)


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_finite_differences(name: str) -> None:
    case = CASES[name]()
    if not OPS[case.op].grads_to:
        leaves = tuple(x.requires_grad_() if is_real(x) else x for x in case.args)
        assert not any(y.requires_grad for y in call(case, leaves))
        return
    leaves = tuple(x.requires_grad_() for x in case.args if is_real(x))

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        given = iter(values)
        args = tuple(next(given) if is_real(x) else x for x in case.args)
        return differentiable(case, call(case, args))

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str) -> None:
    case = CASES[name]()
    args = tuple(x.float().requires_grad_() if is_real(x) else x for x in case.args)
    torch.library.opcheck(OPS[case.op].overload, args, case.options)


@pytest.mark.parametrize("name", CASES)
def test_outputs_share_no_memory_with_inputs_or_one_another(name: str) -> None:
    case = CASES[name]()
    results = call(case, case.args)
    places = [x.untyped_storage().data_ptr() for x in (*case.args, *results) if isinstance(x, Tensor) and x.numel()]
    assert len(places) == len(set(places))


@pytest.mark.parametrize("name", CASES)
def test_gradients_take_the_type_of_their_inputs(name: str) -> None:
    case = CASES[name]()
    kept = {"linear_memory": 5}.get(case.op)
    args = tuple(
        (x.float() if index == kept else x.bfloat16()).requires_grad_() if is_real(x) else x
        for index, x in enumerate(case.args)
    )
    results = call(case, args)
    if not OPS[case.op].grads_to:
        return
    sum((y.float().sum() for y in results if is_real(y)), torch.zeros(())).backward()
    for index, x in enumerate(args):
        if is_index(case, index):
            assert x.grad is None
        elif is_real(x):
            assert x.grad is not None
            assert x.grad.dtype == x.dtype
            assert torch.isfinite(x.grad).all()


def test_a_gradient_of_the_wrong_sign_is_found() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return torch.ops.memc.norm(x, eps=1e-3)  # type: ignore[no-any-return]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return -grad

    with pytest.raises(RuntimeError):
        torch.autograd.gradcheck(Wrong.apply, (real(2, 5).requires_grad_(),))


@pytest.mark.parametrize("op", ["attention", "window_memory", "linear_memory"])
def test_export_serves_every_length(op: str) -> None:
    state = {"attention": 0, "window_memory": 5}.get(op, 0)

    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *state: Tensor) -> Any:
            if op == "linear_memory":
                return torch.ops.memc.linear_memory(q, k, v, -k.abs(), positions, *state)
            options = {"window": 4, "sinks": 1} if op == "window_memory" else {}
            return getattr(torch.ops.memc, op)(q, k, v, positions, *state, scale=0.5, **options)

    def inputs(batch: int, tokens: int, held: int) -> tuple[Tensor, ...]:
        made = (torch.randn(batch, H, tokens, D), torch.randn(batch, G, tokens, D), torch.randn(batch, G, tokens, D))
        positions = torch.arange(tokens).expand(batch, tokens).contiguous()
        if op == "linear_memory":
            return *made, positions, torch.zeros(batch, G, D, D)
        slots = torch.zeros(batch, G, held, D)
        return *made, positions, slots, slots.clone(), torch.full((batch, held), -1)

    b, t, s = (torch.export.Dim.DYNAMIC,) * 3
    shapes: list[Any] = [{0: b, 2: t}] * 3 + [{0: b, 1: t}]
    grow = {2: s} if op == "attention" else {}
    shapes += (
        [{0: b}] if op == "linear_memory" else [{0: b, **grow}, {0: b, **grow}, {0: b, **({1: s} if grow else {})}]
    )
    held = 6 if op == "attention" else state
    program = torch.export.export(
        Layer(), inputs(2, 9, held), dynamic_shapes=(*shapes[:4], tuple(shapes[4:])), strict=False
    )
    for batch, tokens in ((1, 1), (3, 4)):
        values = inputs(batch, tokens, 0 if op == "attention" else state)
        for one, other in zip(program.module()(*values), Layer()(*values), strict=True):
            torch.testing.assert_close(one, other)
