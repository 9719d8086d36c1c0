"""Shapes and types of every node, inferred with symbolic batch, length and state sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.node import map_arg

from memc.program import Dim, InputSpec, Program, StateSpec, get_tensor

# Distinct and at least 2, so that no size is taken for another or for a constant.
EXAMPLE_SIZES: dict[str, int] = {"B": 2, "T": 7, "S": 5, "U": 11, "K": 3}


class Symbols:
    """One symbolic integer for each named size, under one fake mode."""

    def __init__(self) -> None:
        """Make an empty table."""
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self._known: dict[str, Any] = {}

    def __call__(self, size: Dim) -> Any:
        """Return the size, or the symbolic integer that stands for its name."""
        if isinstance(size, int):
            return size
        if size not in self._known:
            example = torch.empty(EXAMPLE_SIZES.get(size, 13 + len(self._known)))
            context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
            self._known[size] = self.mode.from_tensor(example, symbolic_context=context).shape[0]
        return self._known[size]

    def tensor(self, shape: tuple[Dim, ...], dtype: torch.dtype) -> Tensor:
        """Make a fake tensor of this shape."""
        sizes = [self(size) for size in shape]  # outside the mode: a symbol is made from a real tensor
        with self.mode:
            return torch.empty(sizes, dtype=dtype)


class Propagation:
    """One run of a program's graph on fake tensors, node by node; ``values`` holds what has been inferred so far."""

    def __init__(self, program: Program) -> None:
        """Start before the first node."""
        self.symbols = Symbols()
        self.values: dict[Node, Any] = {}
        self._module = program.module
        self._specs: Iterator[InputSpec | StateSpec] = iter([*program.inputs, *program.states])

    def step(self, node: Node) -> None:
        """Infer one node from those before it; raises whatever its fake kernel raises when shapes do not fit."""
        match node.op:
            case "placeholder":
                spec = next(self._specs)
                self.values[node] = self.symbols.tensor(spec.shape, spec.dtype)
            case "get_attr":
                tensor = get_tensor(self._module, str(node.target))
                self.values[node] = self.symbols.tensor(tuple(map(int, tensor.shape)), tensor.dtype)
            case "call_function":
                self.values[node] = call_fake(self.symbols.mode, node, self.values)


def infer(program: Program) -> None:
    """Set ``meta['val']`` of every node from the specification of inputs and states and the parameters' shapes.

    Raises whatever an op's fake kernel raises when shapes do not fit.
    """
    run = Propagation(program)
    for node in program.module.graph.nodes:
        run.step(node)
    for node, value in run.values.items():
        node.meta["val"] = value


def call_fake(mode: FakeTensorMode, node: Node, values: dict[Node, Any]) -> Any:
    """Run one node's op on fake values."""
    args = map_arg(node.args, values.__getitem__)
    kwargs = map_arg(node.kwargs, values.__getitem__)
    assert callable(node.target)
    with mode, torch.no_grad():
        return node.target(*args, **kwargs)


def fill_in(*nodes: Node) -> None:
    """Set ``meta['val']`` of new nodes from those of their inputs, in the order given."""
    for node in nodes:
        inputs = {source: source.meta["val"] for source in node.all_input_nodes}
        mode = next((found for value in inputs.values() if (found := mode_of(value))), None)
        if mode is None:
            raise ValueError(f"{node} has no fake input to take its fake mode from")
        node.meta["val"] = call_fake(mode, node, inputs)


def mode_of(value: Any) -> FakeTensorMode | None:
    """Return the fake mode of a fake tensor, or of the first one in a tuple."""
    if isinstance(value, FakeTensor):
        return value.fake_mode
    if isinstance(value, tuple | list):
        return next((found for item in value if (found := mode_of(item))), None)
    return None
