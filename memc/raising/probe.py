"""Run parts of a graph at sizes of our choice, by its own symbolic shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from memc.program import InputSpec, get_tensor
from memc.raising.evaluate import ancestors, evaluate, hint, shape


@dataclass(frozen=True)
class RotaryForm:
    """How channels are rotated: ``inv_freq [R/2]`` float64, pairing and scaling."""

    inv_freq: Tensor
    interleaved: bool
    scaling: float


class Probe:
    """A raw program's graph with its inputs, ready to evaluate subgraphs at any batch and length."""

    def __init__(self, module: GraphModule, inputs: tuple[InputSpec, ...]) -> None:
        """Take the graph as it stands; it may be edited afterwards."""
        self.module = module
        self.rotary_forms: dict[str, RotaryForm | None] = {}
        self.specs = dict(zip(module.graph.find_nodes(op="placeholder"), inputs, strict=False))

    def node(self, role: str) -> Node | None:
        """Return the first placeholder of a role."""
        return next((node for node, spec in self.specs.items() if spec.role == role), None)

    def input_of(self, dim: str) -> tuple[Node, int]:
        """Return a placeholder and the axis at which it has the symbolic size ``dim``."""
        for node, spec in self.specs.items():
            if dim in spec.shape:
                return node, spec.shape.index(dim)
        raise LookupError(dim)

    def symbol(self, dim: str) -> Any:
        """Return the sympy symbol of a named size, or None when no input has it."""
        try:
            node, axis = self.input_of(dim)
        except LookupError:
            return None
        size = node.meta["val"].shape[axis]
        return None if isinstance(size, int) else size.node.expr

    def is_dim(self, size: Any, dim: str) -> bool:
        """Tell whether a size is the named symbol itself."""
        return not isinstance(size, int) and size.node.expr == self.symbol(dim)

    def size_at(self, size: Any, sizes: Mapping[str, int]) -> int:
        """Evaluate a size with the named symbols at ``sizes``."""
        if isinstance(size, int):
            return size
        known = {symbol: value for dim, value in sizes.items() if (symbol := self.symbol(dim)) is not None}
        value = size.node.expr.subs(known)
        return int(value) if value.is_number else hint(size)

    def shape_at(self, node: Node, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return a node's shape with the named symbols at ``sizes``."""
        return tuple(self.size_at(size, sizes) for size in shape(node))

    def feeds(self, sizes: Mapping[str, int], positions: Tensor | None = None) -> dict[Node, Tensor]:
        """Make values for the inputs: zeros, and 0, 1, 2, ... for positions."""
        made = {}
        for node, spec in self.specs.items():
            dims = [sizes.get(size, 3) if isinstance(size, str) else size for size in spec.shape]
            if spec.role == "positions":
                row = torch.arange(dims[1]) if positions is None else positions
                made[node] = row.expand(dims).contiguous()
            else:
                made[node] = torch.zeros(dims, dtype=spec.dtype)
        return made

    def stand_ins(self, targets: Iterable[Node], stop: Iterable[Node]) -> dict[Node, Tensor]:
        """Make random values for the parameters under ``targets`` that have none, so that their use can be probed."""
        made = {}
        for node in ancestors(targets, stop):
            if node.op == "get_attr" and isinstance(get_tensor(self.module, str(node.target)), FakeTensor):
                generator = torch.Generator().manual_seed(0)
                made[node] = torch.randn(tuple(map(hint, shape(node))), generator=generator)
        return made

    def run(
        self,
        node: Node,
        feeds: Mapping[Node, Any],
        sizes: Mapping[str, int],
        positions: Tensor | None = None,
        replace: Mapping[Any, Any] | None = None,
    ) -> Tensor:
        """Evaluate one node with some values fed and the inputs filled in.

        Raises ``UnknownValueError`` where a parameter's value is needed and there is none.
        """
        result: Tensor = evaluate(self.module, [node], {**self.feeds(sizes, positions), **feeds}, replace)[0]
        return result
