"""A tiny raised decoder built by hand: embedding, norms, rotary attention with growing states, SwiGLU, tied head."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from memc.dialect import OPS
from memc.infer import infer
from memc.program import InputSpec, ModelInfo, OutputSpec, Program, Provenance, StateSpec

aten = torch.ops.aten
assert OPS, "importing the dialect defines the memc:: ops"


@dataclass(frozen=True)
class TinyConfig:
    """Sizes of the decoder, all distinct so that a mix-up shows."""

    layers: int = 2
    vocab: int = 37
    width: int = 24
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 10
    hidden: int = 28
    tied: bool = True
    seed: int = 0
    scale: float = 0.3


def tiny_program(config: TinyConfig | None = None) -> Program:
    """Build the decoder with seeded random weights."""
    return _Builder(config or TinyConfig()).build()


class _Builder:
    def __init__(self, config: TinyConfig) -> None:
        self.c = config
        self.root = torch.nn.Module()
        self.graph = Graph()
        self.generator = torch.Generator().manual_seed(config.seed)
        self.sources: dict[str, Provenance] = {}
        self.attrs: dict[str, Node] = {}
        self.path = ""

    def param(self, name: str, *shape: int, ones: bool = False) -> Node:
        value = torch.ones(shape) if ones else torch.randn(shape, generator=self.generator) * self.c.scale
        return self.attr(name, torch.nn.Parameter(value))

    def attr(self, name: str, value: torch.Tensor) -> Node:
        owner = self.root
        *parts, leaf = name.split(".")
        for part in parts:
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = getattr(owner, part)
        if isinstance(value, torch.nn.Parameter):
            owner.register_parameter(leaf, value)
            self.sources[name] = Provenance(name)
        else:
            owner.register_buffer(leaf, value)
        return self.graph.get_attr(name)

    def call(self, target: object, *args: object, **kwargs: object) -> Node:
        node = self.graph.call_function(target, args, kwargs)  # type: ignore[arg-type]
        if self.path:
            node.meta["nn_module_stack"] = {f"L['self'].{self.path}": (self.path, "tiny.Module")}
        return node

    def linear(self, x: Node, name: str, out: int, size: int) -> Node:
        return self.call(aten.linear.default, x, self.param(name + ".weight", out, size))

    def norm(self, x: Node, name: str) -> Node:
        weight = self.param(name + ".weight", self.c.width, ones=True)
        return self.call(torch.ops.memc.norm.default, x, weight, eps=1e-5)

    def heads(self, x: Node, count: int, tokens: Node, batch: Node) -> Node:
        split = self.call(aten.view.default, x, [batch, tokens, count, self.c.head_dim])
        return self.call(aten.transpose.int, split, 1, 2)

    def build(self) -> Program:
        c, g = self.c, self.graph
        tokens, positions = g.placeholder("tokens"), g.placeholder("positions")
        states = self.states()
        held = [g.placeholder(spec.name) for spec in states]
        batch = self.call(aten.sym_size.int, tokens, 0)
        length = self.call(aten.sym_size.int, tokens, 1)
        embedding = self.param("model.embed.weight", c.vocab, c.width)
        inv_freq = self.attr("model.inv_freq", 1.0 / 100 ** (torch.arange(0, c.head_dim, 2) / c.head_dim))
        x = self.call(aten.embedding.default, embedding, tokens)
        after: list[Node] = []
        for layer in range(c.layers):
            x = self.attention(x, layer, positions, inv_freq, held[3 * layer : 3 * layer + 3], batch, length, after)
            x = self.feed_forward(x, layer)
        self.path = ""
        x = self.norm(x, "model.norm")
        head = embedding
        if c.tied:
            self.root.add_module("lm_head", torch.nn.Module())
            tied = self.root.get_parameter("model.embed.weight")
            self.root.get_submodule("lm_head").register_parameter("weight", tied)
            head = g.get_attr("lm_head.weight")
        else:
            head = self.param("lm_head.weight", c.vocab, c.width)
        logits = self.call(aten.linear.default, x, head)
        g.output((logits, *after))
        g.lint()
        program = Program(
            module=GraphModule(self.root, g),
            inputs=(
                InputSpec("tokens", "tokens", torch.int64, ("B", "T")),
                InputSpec("positions", "positions", torch.int64, ("B", "T")),
            ),
            outputs=(OutputSpec("logits", torch.float32, ("B", "T", c.vocab)),),
            states=tuple(states),
            model=ModelInfo("tiny", "0" * 64, "tiny", c.vocab),
            provenance=self.sources,
            raised=True,
        )
        infer(program)
        return program

    def states(self) -> list[StateSpec]:
        c = self.c
        shape = ("B", c.kv_heads, "S", c.head_dim)
        return [
            spec
            for layer in range(c.layers)
            for spec in (
                StateSpec(f"layer{layer}_key", torch.float32, shape, grows=2),
                StateSpec(f"layer{layer}_value", torch.float32, shape, grows=2),
                StateSpec(f"layer{layer}_positions", torch.int64, ("B", "S"), init=-1, grows=1),
            )
        ]

    def attention(
        self,
        x: Node,
        layer: int,
        positions: Node,
        inv_freq: Node,
        held: list[Node],
        batch: Node,
        length: Node,
        after: list[Node],
    ) -> Node:
        c, prefix = self.c, f"model.layers.{layer}"
        self.path = f"{prefix}.attention"
        h = self.norm(x, f"{prefix}.norm1")
        q, k, v = (
            self.heads(self.linear(h, f"{self.path}.{name}", count * c.head_dim, c.width), count, length, batch)
            for name, count in (("q", c.heads), ("k", c.kv_heads), ("v", c.kv_heads))
        )
        q, k = (self.call(torch.ops.memc.rotary.default, t, positions, inv_freq) for t in (q, k))
        result = self.call(torch.ops.memc.attention.default, q, k, v, positions, *held, scale=c.head_dim**-0.5)
        out, *state = (self.call(operator.getitem, result, i) for i in range(4))
        after.extend(state)
        out = self.call(aten.transpose.int, out, 1, 2)
        out = self.call(aten.reshape.default, out, [batch, length, c.heads * c.head_dim])
        return self.call(aten.add.Tensor, x, self.linear(out, f"{self.path}.o", c.width, c.heads * c.head_dim))

    def feed_forward(self, x: Node, layer: int) -> Node:
        c, prefix = self.c, f"model.layers.{layer}"
        self.path = f"{prefix}.mlp"
        h = self.norm(x, f"{prefix}.norm2")
        gate = self.call(aten.silu.default, self.linear(h, f"{self.path}.gate", c.hidden, c.width))
        up = self.linear(h, f"{self.path}.up", c.hidden, c.width)
        down = self.linear(self.call(aten.mul.Tensor, gate, up), f"{self.path}.down", c.width, c.hidden)
        return self.call(aten.add.Tensor, x, down)
