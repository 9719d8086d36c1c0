"""Small programs around one dialect op each, shared by the backends' conformance tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from memc.dialect.bank_ffn import ACTIVATIONS
from memc.program import Program
from tests.backends.attention_programs import (
    attention,
    compact_attention,
    eventful_attention,
    full_attention,
    sparse_attention,
    start,
    window_memory,
)
from tests.backends.builder import VOCAB, Builder, aten
from tests.backends.model_programs import llama, memory


def linear_memory(
    heads: int = 6,
    groups: int = 2,
    key: int = 8,
    value: int = 10,
    *,
    update: str = "gated",
    per_channel: bool = True,
    strength: float = 1.0,
) -> Program:
    """Tokens to query, key, value and gates, ``memc::linear_memory``, logits. ``strength`` scales the log-decay."""
    b = Builder()
    x, (q, k, v) = start(b, heads, groups, key, value, 24)
    gate = b.heads(x, "gate", groups, key if per_channel else 1, 24)
    decay = b.call(aten.mul.Tensor, b.call(aten.softplus.default, gate), -strength)
    state = b.state("memory", "B", groups, key, value, dtype=torch.float32)
    arguments: list[Node] = [q, k, v, decay, b.positions, state]
    if update == "gated_delta":
        norm = b.call(aten.linalg_vector_norm.default, k, 2.0, [-1], True)
        arguments[1] = b.call(aten.div.Tensor, k, norm)
        beta = b.call(aten.sigmoid.default, b.linear(x, "beta", groups, 24))
        arguments.append(b.call(aten.transpose.int, beta, 1, 2))
    out = b.call(torch.ops.memc.linear_memory.default, *arguments, update=update)
    b.next.append(b.item(out, 1))
    return b.finish(b.linear(b.merge(b.item(out, 0)), "logits", VOCAB, heads * value))


def rotary(*, interleaved: bool = False, scaling: float = 1.0, rotated: int = 8, head: int = 8) -> Program:
    """Tokens to heads, ``memc::rotary``, logits."""
    b = Builder()
    x = b.heads(b.embed(24), "heads", 3, head, 24)
    inv_freq = b.constant("inv_freq", 100.0 ** -(torch.arange(rotated // 2) * 2.0 / rotated))
    op = torch.ops.memc.rotary.default
    turned = b.call(op, x, b.positions, inv_freq, interleaved=interleaved, scaling=scaling)
    return b.finish(b.linear(b.merge(turned), "logits", VOCAB, 3 * head))


def norm(*, center: bool = False, weight: bool = True, bias: bool = False) -> Program:
    """Tokens to vectors, ``memc::norm``, logits."""
    b = Builder()
    w = b.parameter("weight", 24, scale=1.0) if weight else None
    shift = b.parameter("bias", 24, scale=1.0) if bias else None
    x = b.call(torch.ops.memc.norm.default, b.embed(24), w, shift, eps=1e-5, center=center)
    return b.finish(b.linear(x, "logits", VOCAB, 24))


def powers(*exponents: float) -> Program:
    """Tokens to vectors, the sum of their powers (of what is not negative, where the exponent is broken), logits."""
    b = Builder()
    x = total = b.embed(24)
    for exponent in exponents:
        base = x if exponent == int(exponent) else b.call(aten.relu.default, x)
        total = b.call(aten.add.Tensor, total, b.call(aten.pow.Tensor_Scalar, base, exponent))
    return b.finish(b.linear(total, "logits", VOCAB, 24))


def activations(width: int = 37) -> Program:
    """Tokens to vectors, the sum of what makes exponentials of them, along either of the last axes, logits."""
    b = Builder()
    x = total = b.embed(width)
    wide = b.call(aten.mul.Tensor, x, 40.0)  # beyond what the exponential of a float32 can be
    for each in (x, wide):
        for op in (aten.silu.default, aten.sigmoid.default):
            total = b.call(aten.add.Tensor, total, b.call(op, each))
        total = b.call(aten.add.Tensor, total, b.call(aten.softmax.int, each, -1))
        total = b.call(aten.add.Tensor, total, b.call(aten.softmax.int, each, 1))
    largest = b.call(aten.mul.Tensor, b.call(aten.logsumexp.default, wide, [-1], True), 1 / 40)
    total = b.call(aten.add.Tensor, total, largest)
    return b.finish(b.linear(total, "logits", VOCAB, width))


def selected(axis: int, index: int) -> Program:
    """Tokens to vectors, to which one of them, or one of their channels, is added, logits."""
    b = Builder()
    x = b.embed(24)
    one = b.call(aten.unsqueeze.default, b.call(aten.select.int, x, axis, index), axis)
    return b.finish(b.linear(b.call(aten.add.Tensor, x, one), "logits", VOCAB, 24))


def bank_ffn(*activations: str, units: int = 6) -> Program:
    """Tokens to vectors, to which ``memc::bank_ffn`` adds a block for each activation, side by side, logits."""
    b = Builder()
    blocks = [b.fetch(f"bank_{layer}", "B", 3, units, 24) for layer in range(len(activations))]
    x = total = b.embed(24)
    for activation, block in zip(activations, blocks, strict=True):
        made = b.call(torch.ops.memc.bank_ffn.default, x, block, activation=activation)
        total = b.call(aten.add.Tensor, total, made)
    return b.finish(b.linear(total, "logits", VOCAB, 24))


CASES: dict[str, Callable[[], Program]] = {
    "norm": norm,
    "norm centred with bias": lambda: norm(center=True, bias=True),
    "norm without weight": lambda: norm(weight=False, bias=True),
    "norm centred alone": lambda: norm(center=True, weight=False),
    "rotary": lambda: rotary(rotated=4),
    "rotary interleaved": lambda: rotary(interleaved=True, scaling=1.3, rotated=6, head=10),
    "full": full_attention,
    "full, no mask": lambda: full_attention(positions=False),
    "full, bias": lambda: full_attention(bias=True),
    "full, sink logits": lambda: full_attention(sink_logits=True, softcap=2.0),
    "window": window_memory,
    "window of 1": lambda: window_memory(window=1, sinks=0, left=True),
    "window, every option": lambda: window_memory(slopes=True, sink_logits=True, lse=True, left=True, softcap=2.0),
    "window, log-sum-exp": lambda: window_memory(lse=True, groups=6),
    "attention": lambda: attention(layers=2, window=4),
    "attention, every option": lambda: attention(slopes=True, sink_logits=True, softcap=2.0),
    "attention, chunk": lambda: attention(chunk=4),
    "sparse": lambda: sparse_attention(layers=2),
    "sparse, moments, guarded": lambda: sparse_attention(method="moments", dense_below=7, groups=6),
    "sparse, by means": lambda: sparse_attention(method="hcam", rerank=2),
    "sparse, by channels": lambda: sparse_attention(method="lowbit", channels=3, layers=2, dense_below=5),
    "sparse, by channels, again": lambda: sparse_attention(
        method="lowbit", channels=2, rerank=2, groups=3, page=3, budget=9, window=4, sink_logits=True, lse=True
    ),
    "sparse, ranked again": lambda: sparse_attention(rerank=2, groups=1, page=3, budget=6, sinks=0),
    "sparse, every option": lambda: sparse_attention(
        rerank=3, dense_below=4, sink_logits=True, lse=True, softcap=2.0, layers=2, page=1, budget=4
    ),
    "sparse, refreshed": lambda: sparse_attention(refresh=2, layers=2),
    "sparse, refreshed, every option": lambda: sparse_attention(
        method="lowbit",
        channels=2,
        rerank=2,
        refresh=3,
        window=3,
        budget=12,
        dense_below=4,
        softcap=1.5,
        sink_logits=True,
        lse=True,
        page=4,
        layers=2,
    ),
    "sparse, by mass": lambda: sparse_attention(mass=0.5, budget=12, layers=2, rerank=2, sink_logits=True),
    "sparse, by a tree": lambda: sparse_attention(method="hip", budget=8, layers=2),
    "sparse, by a tree, refreshed": lambda: sparse_attention(
        method="hip", budget=15, page=3, refresh=2, rerank=2, window=3, dense_below=5, groups=3
    ),
    "sparse, in two levels": lambda: sparse_attention(method="bounds2", page=1, budget=6, beam=1, layers=2, lse=True),
    "sparse, by landmarks": lambda: sparse_attention(method="landmark", budget=10, layers=2),
    "sparse, by landmarks, every option": lambda: sparse_attention(
        method="landmark", page=3, budget=9, window=1, mass=0.8, softcap=2.0, sink_logits=True, lse=True, groups=3
    ),
    "sparse, by events": lambda: eventful_attention(layers=2),
    "sparse, by events, every option": lambda: eventful_attention(
        refine="conductance", budget=12, page=3, delay=5, softcap=2.0, sink_logits=True, lse=True, groups=3, layers=2
    ),
    "sparse, few bits": lambda: sparse_attention(bits=4, layers=2, rerank=2),
    "sparse, few bits, one stage": lambda: sparse_attention(bits=8, page=3, budget=9, window=4, dense_below=6),
    "sparse, few bits, every option": lambda: sparse_attention(
        bits=4, key=7, value=5, rerank=3, dense_below=5, sink_logits=True, lse=True, softcap=2.0, groups=6
    ),
    "sparse, few bits, a page of one token": lambda: sparse_attention(bits=8, page=1, budget=4, groups=1, rerank=2),
    "sparse, compact": lambda: compact_attention(layers=2),
    "sparse, compact, every option": lambda: compact_attention(
        size=10, rotated=6, interleaved=True, scaling=1.3, sink_logits=True, lse=True, softcap=2.0, dense_below=9
    ),
    "sparse, clipped": lambda: compact_attention(method="infllm", layers=2, groups=3),
    "sparse, clipped, every option": lambda: compact_attention(
        method="infllm", value=5, page=3, budget=12, window=6, interleaved=True, sink_logits=True, lse=True, softcap=2.0
    ),
    "bank": lambda: bank_ffn(*ACTIVATIONS, units=3),
    "gated": linear_memory,
    "gated, strong": lambda: linear_memory(strength=50.0, per_channel=False, groups=6),
    "gated, shut": lambda: linear_memory(strength=float("inf")),
    "gated delta": lambda: linear_memory(update="gated_delta", strength=40.0),
    "gated delta per head": lambda: linear_memory(update="gated_delta", per_channel=False),
    "llama, window": lambda: llama(softcap=3.0),
    "llama, dense": lambda: llama("attention"),
    "llama, product keys": lambda: memory("pkm", slots=64, heads=2, top=3, row=5),
    "llama, memory head": lambda: memory("head", layers="[1]", depth=2),
    "llama, side copy": lambda: memory("side", layers="[1]"),
    "llama, engram": lambda: memory("engram", slots=50, heads=2, row=5),
}
"""Every dialect op, with the options that take forms of their own."""

ASIDE = ("by a tree", "two levels", "by mass", "by events", "refreshed", "few bits", "compact", "clipped")
"""Words of the sparse cases that share most of their kernels with the others, or whose own ``tests/kernels`` runs."""

ON_GPUS = tuple(case for case in CASES if "landmarks" not in case and "events" not in case)
"""Those of ops that have kernels in place."""
