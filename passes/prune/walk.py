"""Coupled dimensions: everything in a graph that has to get smaller with a few seeds, found op by op."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from memc.dialect import arguments
from memc.passes.prune import moves
from memc.program import get_tensor
from memc.raising.evaluate import hints
from memc.raising.feed_forward import LINEAR, linear_input, linear_parts

aten = torch.ops.aten
_NORM = torch.ops.memc.norm.default
ROTARY = torch.ops.memc.rotary.default
_ATTENTION = (torch.ops.memc.attention.default, torch.ops.memc.full_attention.default)


@dataclass(frozen=True)
class BlockedError(Exception):
    """A group cannot be cut: the code of a ``Rejection`` and the reason, which names the node."""

    code: str
    reason: str


@dataclass(frozen=True)
class Labels:
    """The unit that each position on one axis of a node's value belongs to, -1 where to none."""

    axis: int
    units: Tensor


Step = tuple[Node, int, Tensor]


@dataclass
class Walk:
    """Labels of every node that is coupled to the seeds.

    ``attention`` is the attention whose operands are the seeds, None for a feed-forward network; ``exits`` are the
    linear ops that the labelled dimension ends in. ``readers`` gives the nodes that read the same parameter.
    """

    module: GraphModule
    attention: Node | None
    readers: Mapping[int, list[Node]]

    def __post_init__(self) -> None:
        """Start without labels."""
        self.found: dict[Node, Labels] = {}
        self.exits: list[Node] = []
        self._seeds: set[Node] = set()

    def run(self, seeds: Mapping[Node, Labels]) -> None:
        """Follow the seeds through the graph; raises :class:`BlockedError` where they lead to what cannot be cut."""
        self._seeds = set(seeds)
        stack: list[Step] = [(node, labels.axis, labels.units) for node, labels in seeds.items()]
        while stack:
            node, axis, units = stack.pop()
            if not self._merge(node, axis, units):
                continue
            labels = self.found[node]
            stack += self._to_sources(node, labels.axis, labels.units)
            for user in node.users:
                stack += self._to_user(node, labels.axis, labels.units, user)

    def _merge(self, node: Node, axis: int, units: Tensor) -> bool:
        """Add labels to a node's; tells whether there was anything new."""
        assert hints(node)[axis] == len(units)
        if bool((units < 0).all()):
            return False
        before = self.found.get(node)
        if before is None:
            self.found[node] = Labels(axis, units)
            return True
        clash = (before.units >= 0) & (units >= 0) & (before.units != units)
        if before.axis != axis or bool(clash.any()):
            raise BlockedError("conflict", f"{node.name} would have to lose different positions at once")
        merged = torch.maximum(before.units, units)
        self.found[node] = Labels(axis, merged)
        return not torch.equal(merged, before.units)

    def _to_sources(self, node: Node, axis: int, units: Tensor) -> Iterator[Step]:
        last = axis == len(hints(node)) - 1
        if node.op == "get_attr":
            for reader in self.readers[id(get_tensor(self.module, str(node.target)))]:
                yield reader, axis, units
        elif node in self._seeds and node.op == "placeholder":
            return
        elif node.target in _ATTENTION or self._is_result(node):
            if node not in self._seeds:
                raise BlockedError("shared", f"{node.name} belongs to another attention")
        elif node.target in LINEAR and last:
            weight, bias, outs, _ = linear_parts(node)
            yield weight, outs, units
            if bias is not None:
                yield bias, len(hints(bias)) - 1, units
        elif node.target in moves.ELEMENTWISE:
            for source in node.all_input_nodes:
                yield from _aligned(source, node, axis, units)
        elif node.target in (_NORM, ROTARY, aten.type_as.default):
            self._keep_last(node, axis, units)
            yield node.all_input_nodes[0], axis, units
        elif (origin := moves.moved_from(node)) is not None:
            where = moves.backward(node, origin, axis, units)
            if where is None:
                raise BlockedError("mixed", f"{node.name} lays the dimension out among others")
            yield origin, *where
        else:
            raise _unknown(node)

    def _to_user(self, node: Node, axis: int, units: Tensor, user: Node) -> Iterator[Step]:
        if user is self.attention or (user.op == "output" and node in self._seeds):
            if node not in self._seeds:
                raise BlockedError("conflict", f"{node.name} is read by the attention in another way")
        elif user.target in _ATTENTION:
            raise BlockedError("shared", f"{user.name}, another attention, reads {node.name}")
        elif user.target in LINEAR:
            yield from self._to_linear(node, axis, units, user)
        elif user.target in moves.ELEMENTWISE:
            yield user, axis + len(hints(user)) - len(hints(node)), units
        elif user.target == aten.type_as.default:
            if user.args[0] is node:
                yield user, axis, units
        elif user.target in (_NORM, ROTARY):
            if user.args[0] is not node:
                raise BlockedError("norm", f"{user.name} has {node.name} for a weight")
            self._keep_last(user, axis, units)
            yield user, axis, units
        elif user.target == aten.sym_size.int:
            if user.args[1] == axis:
                raise BlockedError("size", f"{user.name} computes with the size")
        elif user.target in moves.SPLITS:
            for piece in user.users:
                yield from self._moved(node, axis, units, piece)
        elif moves.moved_from(user) is node:
            yield from self._moved(node, axis, units, user)
        else:
            raise _unknown(user)

    def _moved(self, node: Node, axis: int, units: Tensor, user: Node) -> Iterator[Step]:
        if moves.cuts_apart(user, axis):
            raise BlockedError("mixed", f"{user.name} picks single positions of the dimension")
        where = moves.forward(user, node, axis, units)
        if where is None:
            raise BlockedError("mixed", f"{user.name} lays the dimension out among others")
        yield user, *where

    def _to_linear(self, node: Node, axis: int, units: Tensor, user: Node) -> Iterator[Step]:
        weight, bias, outs, ins = linear_parts(user)
        entry, last = linear_input(user), len(hints(user)) - 1
        if node is entry and axis == len(hints(node)) - 1:
            if user not in self.exits:
                self.exits.append(user)
            yield weight, ins, units
        elif node is weight and axis == ins:
            yield entry, len(hints(entry)) - 1, units
        elif (node is weight and axis == outs) or node is bias:
            yield user, last, units
        else:
            raise _unknown(user)

    def _keep_last(self, node: Node, axis: int, units: Tensor) -> None:
        """Refuse what would take channels from under a norm, or one alone of a pair that is rotated together."""
        if axis < len(hints(node)) - 1 or node.target == aten.type_as.default:
            return
        if node.target == _NORM:
            raise BlockedError("norm", f"the norm {node.name} runs over the dimension")
        first, second = rotated_pairs(node)
        if not torch.equal(units[first], units[second]):
            raise BlockedError("mixed", f"{node.name} rotates channels of the dimension into one another")

    def _is_result(self, node: Node) -> bool:
        return node.target is operator.getitem and node.all_input_nodes[0].target in _ATTENTION


def rotated_pairs(rotary: Node) -> tuple[Tensor, Tensor]:
    """Return the first and the second channels of the pairs that a ``memc::rotary`` node rotates, by frequency."""
    bound = arguments(rotary)
    count = hints(bound["inv_freq"])[0]
    if bound["interleaved"]:
        return 2 * torch.arange(count), 2 * torch.arange(count) + 1
    return torch.arange(count), count + torch.arange(count)


def _aligned(source: Node, node: Node, axis: int, units: Tensor) -> Iterator[Step]:
    """Yield the labels of an element-wise op's operand, unless it is broadcast along the axis."""
    sizes = hints(source)
    at = axis + len(sizes) - len(hints(node))
    if at >= 0 and sizes[at] == len(units) != 1:
        yield source, at, units


def _unknown(node: Node) -> BlockedError:
    what = str(node.target) if node.op == "call_function" else f"{node.op} {node.name}"
    return BlockedError("unknown_op", f"{node.name} ({what}) may mix the dimension with others")
