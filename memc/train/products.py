"""What learns computes its products with pretrained weights in a narrow type, and everything else as it did."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from memc.program import Program, get_tensor, named_tensors, set_tensor
from memc.raising.feed_forward import LINEAR

ROOT = "memc.products"


@dataclass(frozen=True)
class Rounded:
    """Weights in the type of products, rounded once for all programs that read the same one."""

    kind: torch.dtype
    _held: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, weight: Tensor) -> Tensor:
        """Return a weight in that type; it must not change any more."""
        if id(weight) not in self._held:
            self._held[id(weight)] = weight, weight.detach().to(self.kind)
        return self._held[id(weight)][1]


def narrowed(program: Program, rounded: Rounded | None, trained: Collection[str]) -> GraphModule:
    """Return a module that computes what a program does, its products with pretrained weights in the ``rounded`` type.

    Forward and backward, which is what most of the time of a step goes into; the program's own module where
    ``rounded`` is None. Sums, norms, attention and products with parameters that memc made, adapters among them, stay
    in the types that they have. All parameters are those of the program: a weight that is ``trained`` is rounded in
    every run, so that what is learned adds up in full, others are rounded here once.
    """
    if rounded is None:
        return program.module
    copy = program.copy()
    narrow = _Narrow(copy, rounded, trained)
    for node in list(copy.module.graph.nodes):
        wide = node.target in LINEAR and node.meta["val"].dtype.itemsize > rounded.kind.itemsize
        if wide and narrow.pretrained(node):
            narrow.product(node)
    copy.module.graph.lint()
    copy.module.recompile()
    return copy.module


class _Narrow:
    """Rewrites products of a graph, whose factors are each rounded once. Tied weights are one."""

    def __init__(self, program: Program, rounded: Rounded, trained: Collection[str]) -> None:
        self._module, self._rounded_weight = program.module, rounded
        held = dict(named_tensors(program.module))  # what the graph reads
        sources = (name for name, origin in program.provenance.items() if origin.source)
        self._pretrained = {id(held[name]) for name in sources if name in held}
        self._trained = {id(held[name]) for name in trained if name in held}
        self._values: dict[Node, Node] = {}
        self._weights: dict[int, str] = {}

    def _of(self, name: str) -> int:
        return id(get_tensor(self._module, name))

    def pretrained(self, node: Node) -> bool:
        """Tell whether a product is one with a weight that the model came with."""
        held = [source for source in node.all_input_nodes if source.op == "get_attr"]
        return any(self._of(str(source.target)) in self._pretrained for source in held)

    def product(self, node: Node) -> None:
        """Let a product take rounded factors, and give back the type that it had."""
        graph = self._module.graph
        for source in node.all_input_nodes:
            if source not in self._values:
                with graph.inserting_before(node):
                    self._values[source] = self._rounded(source)
            node.replace_input_with(source, self._values[source])
        with graph.inserting_after(node):
            wide = graph.call_function(torch.ops.aten.to.dtype, (node, node.meta["val"].dtype))
        node.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)

    def _rounded(self, source: Node) -> Node:
        graph, name = self._module.graph, str(source.target)
        if source.op != "get_attr" or self._of(name) in self._trained:
            return graph.call_function(torch.ops.aten.to.dtype, (source, self._rounded_weight.kind))
        key = self._of(name)
        if key not in self._weights:
            self._weights[key] = f"{ROOT}.{len(self._weights)}"
            set_tensor(self._module, self._weights[key], self._rounded_weight(get_tensor(self._module, name)))
        return graph.get_attr(self._weights[key])
