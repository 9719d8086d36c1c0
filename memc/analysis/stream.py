"""Sequences run through a program piece by piece: each piece over all of them before the next, little held between."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from memc.pipeline import Calibration
from memc.plugins import load_kernels
from memc.program import Program, get_tensor


class Stream:
    """Calibration sequences on their way through a program, each from an empty state.

    What is held between two pieces is what later nodes read: at the end of a block the residual stream of every
    sequence, and nothing of what lies behind. Parameters are read as they are used.
    """

    def __init__(self, program: Program, calibration: Calibration) -> None:
        """Start every sequence before the first node."""
        load_kernels()
        self._module = program.module
        self._order = list(program.module.graph.nodes)
        self._place = {node: index for index, node in enumerate(self._order)}
        # Not for the output, to which nothing is run: the next states of all layers would be held for it.
        readers = {node: [user for user in node.users if user.op != "output"] for node in self._order}
        self._last = {node: max(map(self._place.__getitem__, readers[node]), default=-1) for node in self._order}
        self._instead: dict[Node, tuple[Node, Callable[[Tensor], Tensor]]] = {}
        self._scales: dict[Node, Tensor] = {}
        self._at = 0
        device = next((p.device for p in program.module.parameters()), torch.device("cpu"))
        nodes, self._held = program.placeholders(), list[dict[Node, Any]]()
        rest = (*program.nothing_fetched(1, device), *program.new_state(1, device))
        for row in range(len(calibration.tokens)):
            given = (part[row : row + 1].to(device) for part in (calibration.tokens, calibration.positions))
            self._held.append(dict(zip(nodes, (*given, *rest), strict=True)))

    def fork(self, rows: int | None = None) -> Stream:
        """Return another stream of the first ``rows`` sequences (all of them) from here on, replacements included."""
        other = copy(self)
        other._held = [dict(held) for held in self._held[:rows]]
        other._instead = dict(self._instead)
        other._scales = dict(self._scales)
        return other

    def replace(self, node: Node, source: Node, function: Callable[[Tensor], Tensor]) -> None:
        """From here on compute ``node``, which is still to come, as a function of ``source``, which it reads."""
        assert self._place[node] >= self._at and source in node.all_input_nodes
        self._instead[node] = (source, function)

    def scale(self, node: Node, factor: Tensor) -> None:
        """From here on multiply what ``node``, which is still to come, gives by a factor that broadcasts to it."""
        assert self._place[node] >= self._at
        self._scales[node] = factor

    def reaches(self, nodes: Collection[Node]) -> bool:
        """Tell whether every value of ``nodes`` is still to come, or held."""
        return all(self._place[node] >= self._at or all(node in held for held in self._held) for node in nodes)

    def advance(self, last: Node, watch: Collection[Node]) -> Iterator[dict[Node, Tensor]]:
        """Run every sequence up to ``last`` and yield the values of ``watch``, one sequence at a time.

        They are those of this piece, and what is still held from before it. The next piece starts when the iterator is
        exhausted.
        """
        start, stop = self._at, self._place[last] + 1
        for held in self._held:
            seen: dict[Node, Tensor] = {node: held[node] for node in watch if node in held}
            for node in self._order[start:stop]:
                if node.op == "call_function":
                    held[node] = self._scaled(node, self._call(node, held))
                if node in watch:
                    seen[node] = held[node]
                for source in (node, *node.all_input_nodes):
                    if self._last[source] <= self._place[node]:
                        held.pop(source, None)
            yield seen
        self._at = stop

    def _scaled(self, node: Node, value: Any) -> Any:
        return value * self._scales[node].to(value) if node in self._scales else value

    @torch.no_grad()
    def _call(self, node: Node, held: dict[Node, Any]) -> Any:
        def value(source: Node) -> Any:
            return get_tensor(self._module, str(source.target)) if source.op == "get_attr" else held[source]

        if node in self._instead:
            source, function = self._instead[node]
            return function(value(source))
        target: Any = node.target
        return target(*map_arg(node.args, value), **map_arg(dict(node.kwargs), value))
