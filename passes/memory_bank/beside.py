"""What the kinds of memory share: what stands beside a feed-forward block, and what is carried from call to call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from memc.blocks import FeedForwardBlock
from memc.program import StateSpec
from memc.raising.evaluate import shape
from memc.rewrite import Editor

ROOT = "memc.memory_bank"
"""Where the parameters of memories that are part of the program are."""

SEED = 20251128
"""Seed of first values, beside the layer's number."""

EPSILON = 1e-6
"""Added to the mean square that a memory's own norms divide by."""

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Inserted:
    """What was added to one layer: facts for the report, and the parameters that are to be trained, by short name."""

    facts: dict[str, Any]
    parameters: dict[str, str] = field(default_factory=dict)


def add_beside(
    editor: Editor, block: FeedForwardBlock, read: Callable[[Values], Tensor], inputs: Mapping[str, Node], key: Hashable
) -> None:
    """Add what ``read`` gives of a block's own input to the block's output, in the output's type.

    ``read`` gets ``x [B,T,C]`` beside ``inputs``, whatever the shape that the block sees, and returns ``[B,T,C]``.
    Where that is all zeros the output stays as it is, bit for bit. Functions of equal ``key`` are the same.
    """

    def added(t: Values) -> tuple[Tensor, ...]:
        return (total(t["output"], read(t)),)

    replace_output(editor, block, added, {"x": block.input}, inputs, key)


def replace_output(
    editor: Editor,
    block: FeedForwardBlock,
    rewrite: Callable[[Values], tuple[Tensor, ...]],
    activations: Mapping[str, Node],
    inputs: Mapping[str, Node],
    key: Hashable,
) -> tuple[Node, ...]:
    """Put what ``rewrite`` gives first in the place of a block's output, and return the nodes of what it gives beside.

    It gets ``output`` and ``activations`` as ``[B,T,...]``, whatever the shape that the block sees, beside ``inputs``.
    """
    seen = {"output": block.output, **activations}
    flat = {name for name, node in seen.items() if len(shape(node)) == 2}

    def rewritten(t: Values) -> tuple[Tensor, ...]:
        rows = {name: t[name].unflatten(0, (t["tokens"].shape[0], -1)) for name in flat}
        output, *rest = rewrite({**t, **rows})
        return (output.flatten(0, 1) if "output" in flat else output, *rest)

    tokens = {"tokens": editor.program.placeholders()[0]} if flat else {}
    made, *rest = editor.insert(rewritten, {**seen, **tokens, **inputs}, block.output.next, block.path, key)
    inside = {made, *_between(block.output, made)}
    block.output.replace_all_uses_with(made, delete_user_cb=lambda user: user not in inside)
    return tuple(rest)


def _between(first: Node, last: Node) -> set[Node]:
    """Return the nodes that follow ``first``, up to ``last``, in the order of the graph."""
    found, node = set(), first.next
    while node is not last:
        found.add(node)
        node = node.next
    return found


def total(output: Tensor, made: Tensor) -> Tensor:
    """Return the sum of a block's output and of what a memory made, in the output's type."""
    return output + (made if made.dtype == output.dtype else made.to(output.dtype))


def add_last_state(editor: Editor, spec: StateSpec) -> Node:
    """Add a state of a fixed size behind all others and return its placeholder."""
    return editor.add_state(spec, editor.program.placeholders()[-1])


def columns(positions: Tensor) -> Tensor:
    """Return for each token ``[B,T]`` how many tokens of its row came up to it in this call, 0 for padding.

    The first that is no padding gets 1: so padding can be anywhere, and tokens of one sequence that follow one another
    have columns that do.
    """
    real = positions >= 0
    return torch.where(real, real.long().cumsum(1), 0)


def normed(x: Tensor) -> Tensor:
    """Return ``x [..., C]`` in float32 divided by its root mean square."""
    x = x.float()
    return x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
