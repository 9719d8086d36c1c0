"""Blocks of a bank made part of a program: concatenated into the feed-forward networks that they stand beside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from memc.bank.layout import MATRICES
from memc.blocks import FeedForwardBlock
from memc.dialect import arguments, op_spec
from memc.program import Program, get_tensor, readers
from memc.raising import find_blocks
from memc.raising.evaluate import ancestors
from memc.raising.feed_forward import ACTIVATIONS, ELEMENTWISE, linear_parts
from memc.rewrite import Editor

ROOT = "memc.memory_bank"
TRANSFORM = "fused"
aten = torch.ops.aten


@dataclass(frozen=True)
class Fused:
    """A program that fetches nothing any more: layers whose networks are ``wider``, and those with one ``beside``."""

    program: Program
    wider: tuple[int, ...]
    beside: tuple[int, ...]


def fuse(program: Program, blocks: Mapping[str, Tensor]) -> Fused:
    """Put ``blocks [1,3,R,C]``, by the names of the program's fetched inputs, into a copy of the program.

    Where a layer's own network is gated by the same activation, each projection a matrix of its own, its gate, up and
    down projections get R more hidden units, in their own type. Anywhere else three more products stand beside it,
    in float32. Either sums in another order than ``memc::bank_ffn``, so that results agree but for rounding.
    """
    editor = Editor(program)
    found = {block.layer: block for block in find_blocks(editor.program) if isinstance(block, FeedForwardBlock)}
    count = readers(editor.program.module)
    wider, beside = [], []
    for node in list(editor.graph.nodes):
        spec = op_spec(node.target) if node.op == "call_function" else None
        if spec is None or spec.name != "bank_ffn":
            continue
        bound = arguments(node)
        source: Node = bound["block"]
        block, layer = blocks[str(source.target)][0].float(), int(str(source.target).rpartition("_")[2])
        own = found.get(layer)
        if own is not None and _widens(editor.program, own, bound["activation"], count):
            _widen(editor, own, block)
            _drop(node)
            wider.append(layer)
        else:
            _put_beside(editor, node, layer, block)
            beside.append(layer)
        editor.remove_fetched(source)
    return Fused(editor.finish(), tuple(wider), tuple(beside))


def _widens(program: Program, own: FeedForwardBlock, activation: str, count: Counter[int]) -> bool:
    """Tell whether more hidden units of a network are more rows and columns of its matrices and nothing else."""
    if own.gate is None or own.up is None or own.down is None or own.gate is own.up or own.activation != activation:
        return False
    (down, offset, *_), *entries = (linear_parts(node) for node in (own.down, own.gate, own.up))
    held = [down, *(part for weight, bias, *_ in entries for part in (weight, bias) if part is not None)]
    if any(part.op != "get_attr" for part in held):
        return False
    alone = all(count[id(get_tensor(program.module, str(part.target)))] == 1 for part in held)
    between = ancestors([own.down], [own.gate, own.up]) - {own.down, down, offset}
    return alone and all(node.target in ELEMENTWISE for node in between)


def _widen(editor: Editor, own: FeedForwardBlock, block: Tensor) -> None:
    """Append ``block [3,R,C]`` to the gate, up and down projections of a network."""
    for name, part in zip(MATRICES, block, strict=True):
        node: Node = getattr(own, name)
        weight, bias, out, entry = linear_parts(node)
        # Units are outputs of gate and up, and inputs of down, whose rows here are the units as well.
        units = entry if name == "down" else out
        _append(editor, weight, part if units == 0 else part.T, units)
        if bias is not None and name != "down":
            _append(editor, bias, torch.zeros(part.shape[0]), 0)


def _append(editor: Editor, source: Node, more: Tensor, axis: int) -> None:
    name = str(source.target)
    old = get_tensor(editor.program.module, name).detach()
    before = editor.source_of(name)
    transform = TRANSFORM if before.transform == "identity" else f"{before.transform},{TRANSFORM}"
    new = torch.cat([old, more.to(old.dtype)], axis).contiguous()
    editor.replace_parameter(name, new, replace(before, transform=transform, invertible=False))


def _drop(node: Node) -> None:
    """Let the sum that what a bank gives is added in be the network's own output."""
    made = node
    while made.target != aten.add.Tensor:
        (before, made) = made, next(iter(made.users))
    own = next(source for source in made.all_input_nodes if source is not before)
    made.replace_all_uses_with(own)


def _put_beside(editor: Editor, node: Node, layer: int, block: Tensor) -> None:
    """Compute what ``memc::bank_ffn`` does of a block that is part of the program."""
    bound = arguments(node)
    activation = ACTIVATIONS[bound["activation"]]

    def beside(t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        x = t["x"].float()
        hidden = activation(functional.linear(x, t["gate"])) * functional.linear(x, t["up"])
        return (functional.linear(hidden, t["down"]).to(t["x"].dtype),)

    inputs = {"x": bound["x"]}
    for name, part in zip(MATRICES, block, strict=True):
        value = (part.T if name == "down" else part).contiguous()
        place = f"{ROOT}.{layer}.{name}"
        inputs[name] = editor.add_parameter(place, tuple(value.shape), value.clone, TRANSFORM, node)
    (made,) = editor.insert(beside, inputs, node, f"layers.{layer}", (TRANSFORM, bound["activation"]))
    node.replace_all_uses_with(made)
