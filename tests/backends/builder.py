"""Builds small programs, node by node, and the states of every op."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import memc.dialect  # noqa: F401  defines the ops
from memc.artifact import held
from memc.dialect.quantised_attention import code_bytes
from memc.dialect.sparse_attention import described_tokens, description
from memc.program import InputSpec, ModelInfo, OutputSpec, Program, StateSpec

VOCAB = 37
aten = torch.ops.aten


class Builder:
    """Builds a program node by node: parameters from one generator, states as they are asked for."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32, vocab: int = VOCAB) -> None:
        self.graph = Graph()
        self.root = torch.nn.Module()
        self.random = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.vocab = vocab
        self.states: list[StateSpec] = []
        self.fetched: list[InputSpec] = []
        self.next: list[Node] = []
        self.tokens = self.graph.placeholder("tokens")
        self.positions = self.graph.placeholder("positions")
        self._last_input = self.positions
        self._names: dict[str, int] = {}

    def parameter(self, name: str, *shape: int, scale: float | None = None) -> Node:
        if not hasattr(self.root, name):
            scale = (shape[-1] ** -0.5) if scale is None else scale
            value = (torch.randn(*shape, generator=self.random) * scale).to(self.dtype)
            self.root.register_parameter(name, torch.nn.Parameter(value))
        return self.graph.get_attr(name)

    def constant(self, name: str, value: Tensor) -> Node:
        self.root.register_buffer(name, value)
        return self.graph.get_attr(name)

    def state(self, name: str, *shape: int | str, dtype: torch.dtype | None = None, init: float = 0.0) -> Node:
        grows = next((axis for axis, size in enumerate(shape) if str(size).startswith("S")), None)
        self.states.append(StateSpec(name, dtype or self.dtype, shape, init, grows))
        with self.graph.inserting_after(self._last_input):
            self._last_input = self.graph.placeholder(name)
        return self._last_input

    def fetch(self, name: str, *shape: int | str) -> Node:
        """An input of each sequence's own; before any state."""
        self.fetched.append(InputSpec(name, "fetched", torch.float32, shape))
        with self.graph.inserting_after(self._last_input):
            self._last_input = self.graph.placeholder(name)
        return self._last_input

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        return self.graph.call_function(target, args, kwargs)

    def item(self, node: Node, index: int) -> Node:
        return self.graph.call_function(operator.getitem, (node, index))

    def linear(self, x: Node, name: str, out: int, into: int, bias: bool = False) -> Node:
        weight = self.parameter(f"{name}_weight", out, into)
        if bias:
            return self.call(aten.linear.default, x, weight, self.parameter(f"{name}_bias", out, scale=0.3))
        return self.call(aten.linear.default, x, weight)

    def heads(self, x: Node, name: str, heads: int, dim: int, into: int) -> Node:
        """``[B,T,into]`` to ``[B,heads,T,dim]``."""
        flat = self.linear(x, name, heads * dim, into)
        split = self.call(aten.unflatten.int, flat, -1, [heads, dim])
        return self.call(aten.transpose.int, split, 1, 2)

    def merge(self, x: Node) -> Node:
        """``[B,H,T,D]`` to ``[B,T,H*D]``."""
        return self.call(aten.flatten.using_ints, self.call(aten.transpose.int, x, 1, 2), 2, 3)

    def embed(self, dim: int) -> Node:
        return self.call(aten.embedding.default, self.parameter("embedding", self.vocab, dim, scale=1.0), self.tokens)

    def finish(self, logits: Node) -> Program:
        self.graph.output((logits, *self.next))
        module = GraphModule(self.root, self.graph)
        program = Program(
            module,
            (
                InputSpec("tokens", "tokens", torch.int64, ("B", "T")),
                InputSpec("positions", "positions", torch.int64, ("B", "T")),
                *self.fetched,
            ),
            (OutputSpec("logits", self.dtype, ("B", "T", self.vocab)),),
            tuple(self.states),
            ModelInfo("test", "", "test", self.vocab),
            raised=True,
        )
        record_shapes(program)
        return program


def record_shapes(program: Program) -> None:
    """Record every node's fake value in ``meta["val"]``."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    sizes = {"B": 3, "T": 5}
    with mode:
        fakes = [
            torch.zeros([sizes[n] if n in sizes else held(n, 7) for n in spec.shape], dtype=spec.dtype)  # type: ignore[index]
            for spec in (*program.inputs, *program.states)
        ]
    FakeTensorProp(program.module, mode).propagate_dont_convert_inputs(*fakes)


def ring(b: Builder, tag: str, groups: int, slots: int, key: int, value: int) -> list[Node]:
    """The states of ``window_memory``."""
    return [
        b.state(f"past_key{tag}", "B", groups, slots, key),
        b.state(f"past_value{tag}", "B", groups, slots, value),
        b.state(f"past_positions{tag}", "B", slots, dtype=torch.int64, init=-1),
    ]


def growing(b: Builder, tag: str, groups: int, key: int, value: int) -> list[Node]:
    """The states of ``attention``."""
    return [
        b.state(f"past_key{tag}", "B", groups, "S", key),
        b.state(f"past_value{tag}", "B", groups, "S", value),
        b.state(f"past_positions{tag}", "B", "S", dtype=torch.int64, init=-1),
    ]


def paged(b: Builder, tag: str, groups: int, key: int, value: int, page: int, method: str) -> list[Node]:
    """The states of ``sparse_attention``."""
    sizes = description(method, page, key)
    count = f"S/{described_tokens(method, page)}"
    return [*growing(b, tag, groups, key, value), b.state(f"past_pages{tag}", "B", groups, count, *sizes)]


def coded(b: Builder, tag: str, groups: int, key: int, value: int, page: int, bits: int) -> list[Node]:
    """The states of ``quantised_attention``."""
    u8 = torch.uint8
    return [
        b.state(f"past_key{tag}", "B", groups, f"S/{page}", page, code_bytes(key, bits), dtype=u8),
        b.state(f"past_value{tag}", "B", groups, "S", code_bytes(value, bits), dtype=u8),
        b.state(f"past_positions{tag}", "B", "S", dtype=torch.int64, init=-1),
        b.state(f"past_pages{tag}", "B", groups, f"S/{page}", 2 * key),
        b.state(f"past_ranges{tag}", "B", groups, "S", 2),
        b.state(f"past_key_tail{tag}", "B", groups, page, key),
        b.state(f"past_value_tail{tag}", "B", groups, page, value),
    ]
