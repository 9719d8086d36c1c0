"""Small decoders, shared by the backends' tests."""

from __future__ import annotations

from typing import Any

import torch

from memc.infer import infer
from memc.passes.memory_bank import MemoryBank
from memc.program import Program, set_tensor
from memc.target import get_target
from tests.backends.builder import VOCAB, Builder, aten, growing, ring


def llama(
    mixer: str = "window_memory",
    *,
    layers: int = 2,
    width: int = 24,
    heads: int = 6,
    groups: int = 2,
    head: int = 8,
    hidden: int = 40,
    window: int = 5,
    sinks: int = 2,
    softcap: float = 0.0,
    dtype: torch.dtype = torch.float32,
    vocab: int = VOCAB,
) -> Program:
    """A llama-like decoder with tied embeddings: norm, rotary attention of the kind ``mixer``, gated feed-forward."""
    b = Builder(dtype=dtype, vocab=vocab)
    x = b.embed(width)
    inv_freq = b.constant("inv_freq", 100.0 ** -(torch.arange(head // 2) * 2.0 / head))
    for i in range(layers):
        h = b.call(torch.ops.memc.norm.default, x, b.parameter(f"norm{i}", width, scale=1.0), eps=1e-5)
        q, k, v = (b.heads(h, f"{n}{i}", c, head, width) for n, c in (("q", heads), ("k", groups), ("v", groups)))
        q, k = (b.call(torch.ops.memc.rotary.default, y, b.positions, inv_freq) for y in (q, k))
        if mixer == "window_memory":
            states = ring(b, str(i), groups, window + sinks, head, head)
            options: dict[str, Any] = {"window": window, "sinks": sinks}
        else:
            states, options = growing(b, str(i), groups, head, head), {}
        op = getattr(torch.ops.memc, mixer).default
        out = b.call(op, q, k, v, b.positions, *states, scale=head**-0.5, **options)
        b.next += [b.item(out, j) for j in ((5, 6, 7) if mixer == "window_memory" else (1, 2, 3))]
        x = b.call(aten.add.Tensor, x, b.linear(b.merge(b.item(out, 0)), f"o{i}", width, heads * head))
        h = b.call(torch.ops.memc.norm.default, x, b.parameter(f"post{i}", width, scale=1.0), eps=1e-5)
        gate = b.call(aten.silu.default, b.linear(h, f"gate{i}", hidden, width))
        up = b.call(aten.mul.Tensor, gate, b.linear(h, f"up{i}", hidden, width))
        x = b.call(aten.add.Tensor, x, b.linear(up, f"down{i}", width, hidden))
    x = b.call(torch.ops.memc.norm.default, x, b.parameter("final", width, scale=1.0), eps=1e-5)
    logits = b.call(aten.linear.default, x, b.parameter("embedding", vocab, width))
    if softcap:
        logits = b.call(aten.mul.Tensor, b.call(aten.tanh.default, b.call(aten.div.Tensor, logits, softcap)), softcap)
    return b.finish(logits)


def memory(kind: str, **options: Any) -> Program:
    """A llama-like decoder with a memory of a kind in every layer, its values drawn where they come as zeros."""
    program = llama("attention")
    infer(program)
    pass_ = MemoryBank(kind=kind, **{"layers": "all", **options})
    result, _ = pass_.apply(program, pass_.plan(program, get_target("cpu")))
    random = torch.Generator().manual_seed(1)
    for name, value in list(result.module.named_parameters()):
        if name.startswith("memc.") and not value.any():
            drawn = torch.randn(value.shape, generator=random)
            set_tensor(result.module, name, drawn.abs() if name.endswith("threshold") else 0.5 * drawn)
    return result
