"""Make a program smaller: parameters sliced, shapes and states changed, branches taken out."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.nn.functional import linear

from memc.blocks import AttentionBlock
from memc.dialect import arguments, op_spec
from memc.passes.prune.groups import Branch, Group, residual
from memc.passes.prune.moves import SIZED, SPLITS
from memc.passes.prune.walk import ROTARY, rotated_pairs
from memc.program import Program, get_tensor, set_tensor
from memc.raising.evaluate import content_nodes, hints
from memc.raising.feed_forward import linear_parts
from memc.rewrite import Editor

aten = torch.ops.aten

PASS = "prune"

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Fit:
    """New values of an exit projection: ``weight [out, in]`` over the kept input channels, and ``bias [out]``."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Cut:
    """Units of a group to remove. ``biased`` gives an exit projection that has no bias one; ``fit`` has the values."""

    group: Group
    removed: tuple[int, ...]
    biased: bool = False
    fit: Fit | None = None

    @property
    def columns(self) -> Tensor:
        """Which input channels of the exit projection stay, ``[in]`` bool."""
        return ~torch.isin(self.group.columns, torch.tensor(self.removed, dtype=torch.int64))

    def exit_function(self) -> Callable[[Tensor], Tensor]:
        """Return what the exit projection becomes, of the inputs that it has in the original; needs ``fit``."""
        assert self.fit is not None
        fit, kept = self.fit, torch.nonzero(self.columns)[:, 0]

        def function(x: Tensor) -> Tensor:
            return linear(x[..., kept.to(x.device)], fit.weight.to(x), fit.bias.to(x))

        return function

    @property
    def parameters(self) -> int:
        """How many parameters go."""
        return int(self.group.cost[list(self.removed)].sum())

    @property
    def places(self) -> list[int]:
        """What goes, by the numbers that a reader knows: units, or key channels of a head."""
        if self.group.kind != "key_channels":
            return list(self.removed)
        places: list[int] = torch.nonzero(torch.isin(self.group.keys, torch.tensor(self.removed)))[:, 0].tolist()
        return places

    @property
    def sizes(self) -> tuple[int, int]:
        """How many units, or key channels of a head, there were and are left."""
        before = len(self.group.keys) if self.group.kind == "key_channels" else self.group.units
        return before, before - len(self.places)

    @property
    def new_bias(self) -> int:
        """How many parameters a new bias of the exit projection has."""
        weight, bias, outs, _ = linear_parts(self.group.exit)
        return hints(weight)[outs] if self.biased and self.removed and bias is None else 0


@dataclass
class Pruner:
    """Cuts and removals on a copy of a program, whose groups and branches have the names of the copy's nodes."""

    program: Program
    _lost: dict[Node, dict[int, Tensor]] = field(default_factory=dict)
    _content: set[Node] = field(default_factory=set)
    _tables: dict[tuple[str, Ranges], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Copy the program."""
        self.editor = Editor(self.program)
        self._nodes = {node.name: node for node in self.editor.graph.nodes}

    def run(self, cuts: Iterable[Cut], branches: Iterable[Branch] = ()) -> Program:
        """Apply everything and return the smaller program, every shape inferred again."""
        cuts = list(cuts)
        for cut in cuts:
            self._note(cut)
        for node, axes in list(self._lost.items()):
            self._shrink(node, axes)
        for cut in cuts:
            if cut.removed and (cut.biased or cut.fit is not None):
                self._set_exit(cut)
        for branch in branches:
            self._remove(branch)
        return self.editor.finish()

    def _note(self, cut: Cut) -> None:
        removed = torch.tensor(cut.removed, dtype=torch.int64)
        for old, labels in cut.group.labels.items():
            gone = torch.isin(labels.units, removed)
            if bool(gone.any()):
                axes = self._lost.setdefault(self._nodes[old.name], {})
                axes[labels.axis] = gone | axes.get(labels.axis, torch.zeros_like(gone))

    def _shrink(self, node: Node, axes: Mapping[int, Tensor]) -> None:
        args: tuple[Any, ...] = node.args
        if node.op == "get_attr":
            self._slice(str(node.target), axes)
        elif node.op == "placeholder":
            spec = next(spec for spec in self.program.states if spec.name == node.target)
            shape = tuple(_left(axes[i]) if i in axes else size for i, size in enumerate(spec.shape))
            self.editor.reshape_state(node, replace(spec, shape=shape))
        elif node.target in SIZED:
            node.args = (args[0], [self._size(size, axes.get(i), node) for i, size in enumerate(args[1])])
        elif node.target == aten.unflatten.int:
            first = args[1] % len(hints(args[0]))
            node.args = (*args[:2], [self._size(size, axes.get(first + i), node) for i, size in enumerate(args[2])])
        elif node.target == ROTARY and len(hints(node)) - 1 in axes:
            self._rotate_fewer(node, ~axes[len(hints(node)) - 1])
        for user in list(node.users):
            if user.target in SPLITS:
                self._split(user, node, axes)
            elif user.target == aten.slice.Tensor:
                self._slice_op(user, node, axes)

    def _slice(self, name: str, axes: Mapping[int, Tensor]) -> None:
        module = self.editor.program.module
        value = get_tensor(module, name)
        if all(value.shape[axis] == _left(gone) for axis, gone in axes.items()):
            return  # under another of its names
        for axis, gone in axes.items():
            value = _keep(value.detach(), axis, ~gone)
        origin = self.editor.source_of(name)
        kept = tuple((axis, _ranges(~gone)) for axis, gone in sorted(axes.items()))
        transform = PASS if origin.transform == "identity" else f"{origin.transform},{PASS}"
        source = replace(origin, transform=transform, invertible=False, kept=(*origin.kept, *kept))
        self.editor.replace_parameter(name, value, source)

    def _size(self, size: Any, gone: Tensor | None, node: Node) -> Any:
        """Return what a size in a node's arguments becomes: a number, -1, or an expression of symbolic sizes."""
        if gone is None or (isinstance(size, int) and size < 0):
            return size
        if isinstance(size, int):
            return _left(gone)
        with self.editor.graph.inserting_before(node):
            product = self.editor.graph.call_function(operator.mul, (size, _left(gone)))
            return self.editor.graph.call_function(operator.floordiv, (product, len(gone)))

    def _slice_op(self, node: Node, source: Node, axes: Mapping[int, Tensor]) -> None:
        """Move the ends of a slice along an axis that loses positions."""
        given: tuple[Any, ...] = node.args
        dim, start, end = (*given, 0, None, None)[1:4] if len(given) < 4 else given[1:4]
        gone = axes.get(dim % len(hints(source)))
        if gone is not None:
            first, last, _ = slice(start, end).indices(len(gone))
            node.args = (source, dim, _left(gone[:first]), _left(gone[:last]), *given[4:])

    def _rotate_fewer(self, node: Node, kept: Tensor) -> None:
        """Give a rotation the frequencies of the pairs that are left, in a table that like ones of other layers share.

        Pairs keep their order, so that what is left is again laid out as the op has it.
        """
        old = arguments(node)["inv_freq"]
        module, pairs = self.editor.program.module, kept[rotated_pairs(node)[0]]
        if not bool(pairs.any()):  # what is left passes through
            node.replace_all_uses_with(arguments(node)["x"])
            return
        key = (str(old.target), _ranges(pairs))
        if key not in self._tables:
            self._tables[key] = f"{old.target}_{PASS}_{len(self._tables)}"
            set_tensor(module, self._tables[key], _keep(get_tensor(module, str(old.target)), 0, pairs))
        with self.editor.graph.inserting_before(node):
            made = self.editor.graph.get_attr(self._tables[key])
        node.replace_input_with(old, made)

    def _split(self, node: Node, source: Node, axes: Mapping[int, Tensor]) -> None:
        """Give a split the sizes that are left of its pieces."""
        dim: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        gone = axes.get(dim % len(hints(source)))
        if gone is not None:
            target: Any = node.target
            pieces = target(gone, node.args[1], 0)
            node.target = aten.split_with_sizes.default
            node.args, node.kwargs = (source, [_left(piece) for piece in pieces], dim), {}

    def _set_exit(self, cut: Cut) -> None:
        """Put the fitted weight and bias in the place of a group's exit projection's."""
        node = self._nodes[cut.group.exit.name]
        weight, bias, outs, _ = linear_parts(node)
        name, width = str(weight.target), hints(weight)[outs]
        value = get_tensor(self.editor.program.module, name)
        if cut.fit is not None:
            fitted = cut.fit.weight if outs == 0 else cut.fit.weight.T
            self._refitted(name, fitted.to(value.dtype).contiguous())
        if bias is not None:
            if cut.fit is not None:
                self._refitted(str(bias.target), cut.fit.bias.to(value.dtype))
            return
        if not cut.biased:
            return
        given = cut.fit.bias.to(value.dtype) if cut.fit is not None else torch.zeros(width, dtype=value.dtype)
        path = f"{name.rpartition('.')[0]}.{'bias' if name.endswith('.weight') else f'{PASS}_bias'}"
        made = self.editor.add_parameter(path, (width,), lambda: given, PASS, node, value.dtype)
        if node.target == aten.mm.default:
            node.target, node.args = aten.addmm.default, (made, *node.args)
        else:
            node.args = (*node.args[:2], made)

    def _refitted(self, name: str, value: Tensor) -> None:
        origin = self.editor.source_of(name)
        transform = origin.transform if PASS in origin.transform.split(",") else f"{origin.transform},{PASS}"
        self.editor.replace_parameter(name, value, replace(origin, transform=transform, invertible=False))

    def _remove(self, branch: Branch) -> None:
        """Take a block out of the residual stream, with its states."""
        if isinstance(branch.block, AttentionBlock):
            attention = self._nodes[branch.block.attention.name]
            row, bound = op_spec(attention.target), arguments(attention)
            assert row is not None
            for name in row.states:
                self.editor.remove_state(bound[name])
        # Found anew: where branches run side by side, their sum changes with each of them.
        self._content = self._content or content_nodes(self.editor.program.module, self.editor.program.placeholders())
        add, addend = residual(self._nodes[branch.start.name], self._content)
        (stream,) = (source for source in add.args[:2] if source is not addend)
        assert isinstance(stream, Node)
        add.replace_all_uses_with(stream)
        self.editor.graph.erase_node(add)


def _keep(value: Tensor, axis: int, kept: Tensor) -> Tensor:
    if isinstance(value, FakeTensor) or value.is_meta:
        return value.new_empty([int(kept.sum()) if i == axis else size for i, size in enumerate(value.shape)])
    return value.index_select(axis, torch.nonzero(kept)[:, 0].to(value.device))


def _left(gone: Tensor) -> int:
    return len(gone) - int(gone.sum())


def _ranges(kept: Tensor) -> Ranges:
    """Write which positions stay as ranges."""
    at = torch.nonzero(kept)[:, 0].tolist()
    runs = itertools.groupby(enumerate(at), lambda pair: pair[1] - pair[0])
    return tuple((run[0][1], run[-1][1] + 1) for run in (list(items) for _, items in runs))
