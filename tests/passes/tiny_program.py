"""Variants of the tiny decoder, its blocks, and an interpreter that puts a naive attention in its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from memc import sites
from memc.blocks import AttentionBlock
from memc.dialect import arguments
from memc.infer import infer
from memc.plugins import load_kernels
from memc.program import Program, named_tensors
from memc.target import Target
from tests.core.tiny import TinyConfig, tiny_program

load_kernels()

TARGET = Target(name="cpu", description="test", kind="cpu", backend="eager", instruction_set="any")


def tiny(**choices: Any) -> Program:
    """Copy the decoder that :func:`build` makes, whose parameters all copies share and nobody may change."""
    program = build(**choices)
    assert _fingerprint(program) == _first(**choices), "an earlier test has changed the decoder that all tests share"
    return program.copy()


def _fingerprint(program: Program) -> float:
    return sum(float(tensor.detach().double().abs().sum()) for _, tensor in named_tensors(program.module))


@cache
def _first(**choices: Any) -> float:
    return _fingerprint(build(**choices))


@cache
def build(
    *,
    window: int = 0,
    softcap: float = 0.0,
    slopes: tuple[float, ...] | None = None,
    sink_logits: tuple[float, ...] | None = None,
    **sizes: Any,
) -> Program:
    """Build the tiny decoder with these arguments on every attention."""
    program = tiny_program(TinyConfig(**sizes))
    graph = program.module.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.memc.attention.default):
        layer = len([n for n in graph.nodes if "memc" in n.meta])
        node.meta["memc"] = {"path": f"model.layers.{layer}.attention", "source": ""}
        node.kwargs = {**node.kwargs, "window": window, "softcap": softcap}
        for name, values in (("slopes", slopes), ("sink_logits", sink_logits)):
            if values is not None:
                program.module.register_buffer(name, torch.tensor(values))
                with graph.inserting_before(node):
                    node.kwargs = {**node.kwargs, name: graph.get_attr(name)}
    graph.lint()
    program.module.recompile()
    infer(program)
    return program


Attention = Callable[[dict[str, Any], AttentionBlock, Tensor], Tensor]


class Naive(Interpreter):
    """Runs a raised program on one call from empty state, attention done by a function in float64.

    The function gets the attention's arguments, its block and the block's input.
    """

    def __init__(self, program: Program, attention: Attention) -> None:
        super().__init__(program.module, garbage_collect_values=False)
        self.attention = attention
        self.blocks = {block.attention: block for block in sites.attention_blocks(program)}

    def run_node(self, n: Node) -> Any:
        if n not in self.blocks:
            return super().run_node(n)
        block = self.blocks[n]
        values = {name: self.env[value] if isinstance(value, Node) else value for name, value in arguments(n).items()}
        values |= {name: v.double() for name, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()}
        assert block.hidden is not None
        values["query_pre_rotary"] = self.env[block.query_pre_rotary].double()
        values["key_pre_rotary"] = self.env[block.key_pre_rotary].double()
        out = self.attention(values, block, self.env[block.hidden].double())
        return (out.float(), values["past_key"], values["past_value"], values["past_positions"])


def naive_run(program: Program, attention: Attention, tokens: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    logits: Tensor = Naive(program, attention).run(tokens, positions, *program.new_state(len(tokens)))[0]
    return logits


def scores(a: dict[str, Any], query: str = "query", key: str = "key") -> Tensor:
    """Scores ``[B,H,T,T]`` of every query with every key, soft-cap and slopes applied, unmasked."""
    groups = a[query].shape[1] // a[key].shape[1]
    s: Tensor = a["scale"] * a[query] @ a[key].repeat_interleave(groups, 1).transpose(-1, -2)
    if a["softcap"]:
        s = a["softcap"] * torch.tanh(s / a["softcap"])
    if a["slopes"] is not None:
        at = torch.arange(s.shape[-1])
        s = s + a["slopes"][:, None, None] * (at[None, :] - at[:, None])
    return s


def masked_softmax(window: int, sinks: int) -> Attention:
    """Attention under an explicit window mask."""

    def attention(a: dict[str, Any], block: AttentionBlock, hidden: Tensor) -> Tensor:
        s = scores(a)
        at = torch.arange(s.shape[-1])
        gap = at[:, None] - at[None, :]
        seen = (gap >= 0) & ((gap < window) | (at[None, :] < sinks))
        weight = s.masked_fill(~seen, -torch.inf).exp()
        total = weight.sum(-1, keepdim=True)
        if a["sink_logits"] is not None:
            total = total + a["sink_logits"].exp()[:, None, None]
        value = a["value"].repeat_interleave(s.shape[1] // a["value"].shape[1], 1)
        out: Tensor = (weight / total) @ value
        return out

    return attention


def tokens_of(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, TinyConfig().vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def run_pieces(program: Program, tokens: Tensor, positions: Tensor, cuts: Sequence[int]) -> Tensor:
    """Run a batch in pieces that end at ``cuts``, states carried over."""
    state = program.new_state(len(tokens))
    logits, start = [], 0
    for end in [*sorted(set(cuts)), tokens.shape[1]]:
        if end > start:
            out, *rest = program(tokens[:, start:end], positions[:, start:end], *state)
            state = tuple(rest)
            logits.append(out)
            start = end
    return torch.cat(logits, 1)


SLOPES = (0.5, 0.25, 0.125, 0.0625)
