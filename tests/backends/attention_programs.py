"""Small programs around the dialect ops that attend, shared by the backends' tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from memc.dialect import OPS, OpSpec
from memc.dialect.refreshed_attention import most_chosen
from memc.program import Program
from tests.backends.builder import VOCAB, Builder, aten, coded, growing, paged, ring


def start(b: Builder, heads: int, groups: int, key: int, value: int, width: int) -> tuple[Node, list[Node]]:
    """Tokens to vectors ``[B,T,width]``, and these to query, key and value."""
    x = b.embed(width)
    return x, _heads(b, x, heads, groups, key, value, width)


def _heads(b: Builder, x: Node, heads: int, groups: int, key: int, value: int, width: int) -> list[Node]:
    return [
        b.heads(x, "query", heads, key, width),
        b.heads(x, "key", groups, key, width),
        b.heads(x, "value", groups, value, width),
    ]


def _extras(b: Builder, heads: int, slopes: bool, sink_logits: bool) -> list[Node | None]:
    return [
        b.constant("slopes", 2.0 ** -torch.arange(1.0, heads + 1)) if slopes else None,
        b.parameter("sink", heads, scale=1.0) if sink_logits else None,
    ]


def _layers(
    b: Builder,
    sizes: tuple[int, int, int, int],
    layers: int,
    op: OpSpec,
    states: Callable[[str], list[Node]],
    *,
    rest: Callable[[str], list[Node | None]],
    lse: bool = False,
    behind: Callable[[Node, Node], None] | None = None,
    **options: Any,
) -> Program:
    """Tokens to query, key and value, the op with its states and the ``rest`` of its tensors, logits.

    ``sizes`` are heads, groups, and channels of a key and a value. A layer reads the log-sum-exp where asked. What
    comes ``behind`` is given the logits and a key.
    """
    heads, groups, key, value = sizes
    x, qkv = start(b, heads, groups, key, value, 24)
    for layer in map(str, range(layers)):
        held, others = states(layer), rest(layer)
        out = b.call(op.overload, *qkv, b.positions, *held, *others, scale=0.7, **options)
        b.next += [b.item(out, index) for index in op.states.values()]
        x = b.linear(b.merge(b.item(out, 0)), "out", 24, heads * value)
        if lse:
            per_token = b.call(aten.transpose.int, b.item(out, 1), 1, 2)
            x = b.call(aten.add.Tensor, x, b.linear(per_token, "lse", 24, heads))
        qkv = _heads(b, x, heads, groups, key, value, 24)
    logits = b.linear(x, "logits", VOCAB, 24, bias=True)
    if behind is not None:
        behind(logits, qkv[1])
    return b.finish(logits)


def attention(
    heads: int = 6,
    groups: int = 2,
    key: int = 8,
    value: int = 10,
    *,
    slopes: bool = False,
    sink_logits: bool = False,
    layers: int = 1,
    **options: Any,
) -> Program:
    """Layers of ``memc::attention``."""
    b = Builder()
    return _layers(
        b,
        (heads, groups, key, value),
        layers,
        OPS["attention"],
        lambda tag: growing(b, tag, groups, key, value),
        rest=lambda _: _extras(b, heads, slopes, sink_logits),
        **options,
    )


def window_memory(
    heads: int = 6,
    groups: int = 2,
    key: int = 8,
    value: int = 10,
    *,
    window: int = 5,
    sinks: int = 2,
    slopes: bool = False,
    sink_logits: bool = False,
    lse: bool = False,
    left: bool = False,
    softcap: float = 0.0,
) -> Program:
    """Tokens to query, key and value, ``memc::window_memory``, logits that also read the other outputs asked for."""
    b = Builder()
    _, qkv = start(b, heads, groups, key, value, 24)
    states = ring(b, "", groups, window + sinks, key, value)
    extras = _extras(b, heads, slopes, sink_logits)
    op = torch.ops.memc.window_memory.default
    options = {"scale": 0.7, "window": window, "sinks": sinks, "softcap": softcap}
    out = b.call(op, *qkv, b.positions, *states, *extras, **options)
    b.next += [b.item(out, i) for i in (5, 6, 7)]
    logits = b.linear(b.merge(b.item(out, 0)), "logits", VOCAB, heads * value)
    if lse:
        per_token = b.call(aten.transpose.int, b.item(out, 1), 1, 2)
        logits = b.call(aten.add.Tensor, logits, b.linear(per_token, "lse", VOCAB, heads))
    if left:
        for index, size in ((2, key), (3, value)):
            read = b.linear(b.merge(b.item(out, index)), f"left{index}", VOCAB, groups * size)
            logits = b.call(aten.add.Tensor, logits, read)
        place = b.call(aten._to_copy.default, b.item(out, 4), dtype=torch.float32)
        place = b.call(aten.mul.Tensor, b.call(aten.unsqueeze.default, place, -1), 0.1)
        logits = b.call(aten.add.Tensor, logits, place)
    return b.finish(logits)


def sparse_attention(
    heads: int = 6,
    groups: int = 2,
    key: int = 8,
    value: int = 10,
    *,
    method: str = "bounds",
    page: int = 2,
    budget: int = 6,
    sinks: int = 1,
    window: int = 2,
    sink_logits: bool = False,
    lse: bool = False,
    layers: int = 1,
    bits: int = 0,
    refresh: int = 0,
    **options: Any,
) -> Program:
    """Layers of ``memc::sparse_attention``; ``quantised_attention`` with ``bits``, ``refreshed_`` with ``refresh``."""
    b, op = Builder(), "quantised" if bits else "refreshed" if refresh else "sparse"
    chosen: dict[str, Any] = {"bits": bits} if bits else {"method": method}
    chosen |= {"refresh": refresh} if refresh else {}

    def states(tag: str) -> list[Node]:
        if bits:
            return coded(b, tag, groups, key, value, page, bits)
        held = paged(b, tag, groups, key, value, page, method)
        if refresh:
            most = most_chosen(method, page, budget, options.get("rerank", 1))
            held.append(b.state(f"past_choice{tag}", "B", groups, most, dtype=torch.int64, init=-1))
        return held

    return _layers(
        b,
        (heads, groups, key, value),
        layers,
        OPS[f"{op}_attention"],
        states,
        rest=lambda _: _extras(b, heads, False, sink_logits)[1:],
        lse=lse,
        page=page,
        budget=budget,
        sinks=sinks,
        window=window,
        **chosen,
        **options,
    )


def eventful_attention(
    heads: int = 6,
    groups: int = 2,
    *,
    layers: int = 1,
    page: int = 2,
    budget: int = 8,
    longest: int = 3,
    gamma: float = 0.5,
    refine: str = "modularity",
    history: int = 7,
    sink_logits: bool = False,
    lse: bool = False,
    **options: Any,
) -> Program:
    """Layers of ``memc::sparse_attention`` by events, and ``memc::events`` behind the logits."""
    b, key, value = Builder(), 8, 10
    numbers = b.state("event_numbers", "B", "S", dtype=torch.int64, init=-1)

    def behind(logits: Node, k: Node) -> None:
        places = b.state("event_positions", "B", "S", dtype=torch.int64, init=-1)
        kept = [b.state("event_logits", "B", VOCAB), b.state("event_surprises", "B", history)]
        state = [*kept, b.state("event_keys", "B", groups, longest + 1, key), numbers, places]
        found = b.call(
            OPS["events"].overload,
            logits,
            b.tokens,
            b.positions,
            k,
            *state,
            gamma=gamma,
            longest=longest,
            refine=refine,
        )
        made = [b.item(found, index) for index in range(1, 6)]
        b.next = [made[3], *b.next, made[4], *made[:3]]

    chosen = {"page": page, "budget": budget, "sinks": 1, "window": 3, "channels": 2, "contiguity": 0.3, **options}
    return _layers(
        b,
        (heads, groups, key, value),
        layers,
        OPS["sparse_attention"],
        lambda tag: paged(b, tag, groups, key, value, page, "em"),
        rest=lambda _: [_extras(b, heads, False, sink_logits)[1], numbers],
        lse=lse,
        behind=behind,
        method="em",
        **{"dense_below": budget, "delay": longest, **chosen},
    )


def compact_attention(
    heads: int = 6,
    groups: int = 2,
    size: int = 8,
    value: int | None = None,
    *,
    method: str = "longheads",
    page: int = 2,
    budget: int = 8,
    sinks: int = 1,
    window: int = 3,
    rotated: int = 8,
    sink_logits: bool = False,
    lse: bool = False,
    layers: int = 1,
    **options: Any,
) -> Program:
    """Layers of ``memc::compact_attention``."""
    b, value = Builder(), value or size
    frequencies = 100.0 ** -(torch.arange(rotated // 2) * 2.0 / rotated)

    def states(tag: str) -> list[Node]:
        return [*growing(b, tag, groups, size, value), b.state(f"past_pages{tag}", "B", groups, f"S/{page}", 2 * size)]

    def rest(tag: str) -> list[Node | None]:
        return [b.constant(f"inv_freq{tag}", frequencies.clone()), *_extras(b, heads, False, sink_logits)[1:]]

    options |= {"method": method, "page": page, "budget": budget, "sinks": sinks, "window": window}
    sizes = (heads, groups, size, value)
    return _layers(b, sizes, layers, OPS["compact_attention"], states, rest=rest, lse=lse, **options)


def full_attention(
    *, positions: bool = True, bias: bool = False, sink_logits: bool = False, softcap: float = 0.0
) -> Program:
    """Tokens to query, key and value, ``memc::full_attention``, logits."""
    b = Builder()
    _, qkv = start(b, 6, 2, 8, 10, 24)
    masks: list[Node | None] = [b.positions if positions else None, None, None]
    if bias:
        # log(0) of odd positions masks them: an additive bias with -inf, one row for all queries.
        odd = b.call(aten.remainder.Scalar, b.positions, 3)
        odd = b.call(aten._to_copy.default, odd, dtype=torch.float32)
        masks[1] = b.call(aten.unsqueeze.default, b.call(aten.unsqueeze.default, b.call(aten.log.default, odd), 1), 1)
    if sink_logits:
        masks[2] = b.parameter("sink", 6, scale=1.0)
    out = b.call(torch.ops.memc.full_attention.default, *qkv, *masks, scale=0.7, softcap=softcap)
    return b.finish(b.linear(b.merge(out), "logits", VOCAB, 60))
