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
    flat = len(shape(block.output)) == 2
    tokens = editor.program.placeholders()[0]

    def added(t: Values) -> tuple[Tensor, ...]:
        output = t["output"]
        x = t["x"].unflatten(0, (t["tokens"].shape[0], -1)) if flat else t["x"]
        made = read({**t, "x": x})
        made = made.flatten(0, 1) if flat else made
        return (output + (made if made.dtype == output.dtype else made.to(output.dtype)),)

    given = {"x": block.input, "output": block.output, **({"tokens": tokens} if flat else {}), **inputs}
    (total,) = editor.insert(added, given, block.output.next, block.path, key)
    block.output.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)


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
