"""Shapes and types of every node, inferred with symbolic batch, length and state sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    free_unbacked_symbols,
)
from torch.fx.node import map_arg

from memc.artifact import held
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
        if "/" in size:
            return held(size, self("S"))
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


class Known:
    """What the nodes met so far gave, by their kinds.

    A kind is a number for an op, its constants and the types of its inputs: a fake kernel sees no more than those, so
    that nodes of a kind share a value, also across programs. A conversion infers much the same graph many times.
    """

    MOST = 20_000
    """Kinds that are kept; a model has some hundreds."""

    def __init__(self) -> None:
        """Know nothing."""
        self.symbols = Symbols()
        self.values: dict[int, Any] = {}
        self._numbers: dict[Hashable, int] = {}
        self._next = itertools.count()

    def number(self, key: Hashable) -> int:
        """Return the number of what has this key."""
        if key not in self._numbers:
            self._numbers[key] = self.fresh()
        return self._numbers[key]

    def fresh(self) -> int:
        """Return a number that nothing else has."""
        return next(self._next)

    def usable(self) -> bool:
        """Tell whether no program has made a number, or another size, of a size, and there is room for more."""
        env = self.symbols.mode.shape_env
        return env is not None and not env.replacements and len(self._numbers) < self.MOST


_known: Known | None = None


def known() -> Known:
    """Return what this process has inferred, or nothing where that can no longer be relied on."""
    global _known
    if _known is None or not _known.usable():
        _known = Known()
    return _known


class Propagation:
    """One run of a graph on fake tensors, node by node; ``values`` holds what has been inferred so far.

    Nodes that are alike are inferred once and share their value: ``kinds`` gives each node the number of its kind.
    """

    def __init__(self, module: GraphModule, specs: Iterable[InputSpec | StateSpec]) -> None:
        """Start before the first node; ``specs`` are those of the placeholders, in order."""
        self._known = known()
        self.symbols = self._known.symbols
        self.values: dict[Node, Any] = {}
        self.kinds: dict[Node, int] = {}
        self._module = module
        self._specs = iter(specs)
        self._types: dict[Node, Any] = {}

    def step(self, node: Node) -> None:
        """Infer one node from those before it; raises whatever its fake kernel raises when shapes do not fit."""
        match node.op:
            case "placeholder":
                spec = next(self._specs)
                self._set(node, ("given", spec.dtype, spec.shape), lambda: self.symbols.tensor(spec.shape, spec.dtype))
            case "get_attr":
                tensor = get_tensor(self._module, str(node.target))
                shape = tuple(map(int, tensor.shape))
                self._set(node, ("stored", tensor.dtype, shape), lambda: self.symbols.tensor(shape, tensor.dtype))
            case "call_function":
                # As text, since 1, 1.0 and True are equal, and so are 0.0 and -0.0.
                arguments = repr(map_arg((node.args, node.kwargs), self._types.__getitem__))
                self._set(node, (node.target, arguments), lambda: call_fake(self.symbols.mode, node, self.values))

    def _set(self, node: Node, key: Hashable, make: Callable[[], Any]) -> None:
        kind = self._known.number(key)
        if kind in self._known.values:
            value = self._known.values[kind]
        elif free_unbacked_symbols(value := make()):
            # Sizes that the data decide are others at each node, and fake tensors remember theirs.
            inputs = {source: _copy(self.symbols.mode, self.values[source]) for source in node.all_input_nodes}
            kind, value = self._known.fresh(), call_fake(self.symbols.mode, node, inputs)
        else:
            self._known.values[kind] = value
        self.values[node], self.kinds[node] = value, kind
        self._types[node] = _Type(self._known.number(_describe(value)))


@dataclass(frozen=True)
class _Type:
    """Stands for an input in the text of a node's arguments; equal where :func:`_describe` gives the same."""

    number: int


def _describe(value: Any) -> Hashable:
    """Return everything that a fake kernel can ask of a value."""
    if isinstance(value, Tensor):
        sizes = (*value.shape, *value.stride(), value.storage_offset())
        bits = (value.requires_grad, value.is_conj(), value.is_neg())
        return value.dtype, value.device, value.layout, bits, tuple(map(_describe, sizes))
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_describe, value))
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return type(value), value.node.expr
    return type(value), repr(value)


def _copy(mode: FakeTensorMode, value: Any) -> Any:
    with mode:
        return torch.empty_like(value) if isinstance(value, Tensor) else value


def infer(program: Program) -> None:
    """Set ``meta['val']`` of every node from the specification of inputs and states and the parameters' shapes.

    Raises whatever an op's fake kernel raises when shapes do not fit.
    """
    run = Propagation(program.module, [*program.inputs, *program.states])
    for node in program.module.graph.nodes:
        run.step(node)
    for node, value in run.values.items():
        node.meta["val"] = value


def call_fake(mode: FakeTensorMode, node: Node, values: dict[Node, Any]) -> Any:
    """Run one node's op on fake values.

    Through the Python dispatcher: before torch 2.13 some composite kernels in C++, ``matmul`` among them, turn a
    symbolic size into a number.
    """
    args = map_arg(node.args, values.__getitem__)
    kwargs = map_arg(node.kwargs, values.__getitem__)
    assert callable(node.target)
    # Sizes that the data decide are in the value that is returned; torch would have the next trace return them too.
    unclaimed = mode.shape_env.ignore_fresh_unbacked_symbols() if mode.shape_env is not None else nullcontext()
    with mode, unclaimed, enable_python_dispatcher(), torch.no_grad():
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
