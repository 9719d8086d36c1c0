"""The units that an analysis of a model tells apart: query heads, feed-forward channels, and whole blocks.

They are those that :mod:`memc.passes.prune` removes, seen from the values that carry them: a head is a slice of the
attention's result, a channel one of the inputs of the down projection, a block what it adds to the residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from memc.blocks import AttentionBlock, Block, FeedForwardBlock
from memc.errors import MemcError
from memc.pipeline import Rejection
from memc.program import Program
from memc.raising import find_blocks
from memc.raising.feed_forward import linear_input


@dataclass(frozen=True)
class BlockUnits:
    """The units of one block: ``count`` slices of the value of ``node`` along ``axis``, and the block's ``exit``.

    ``cost`` is the number of parameters of one unit's share of the block's projections.
    """

    block: Block
    node: Node
    axis: int
    count: int
    exit: Node
    cost: float

    def shaped(self, gates: Tensor) -> Tensor:
        """Give gates ``[count]`` the shape in which they broadcast to the value of ``node``."""
        after = len(self.node.meta["val"].shape) - 1 - self.axis
        return gates.reshape(-1, *[1] * after)

    @property
    def kv_heads(self) -> int:
        """Key-value heads of an attention, 0 of a feed-forward network."""
        return self.block.num_kv_heads if isinstance(self.block, AttentionBlock) else 0


def units_of(program: Program, *, kinds: Sequence[str] = ("attention", "feed_forward")) -> list[BlockUnits]:
    """Return the units of every block of some kinds that has any; see :func:`refusals` for the others.

    Raises ``MemcError`` E208 for a program that is no decoder or fetches anything, E307 where no block has units.
    """
    if not program.model.decoder:
        raise MemcError("E208", "an encoder predicts no next token: there is nothing to analyse", program.model.source)
    if program.fetched:
        raise MemcError("E208", "what the model fetches hides what its blocks do", program.model.source)
    found = [
        units
        for block in find_blocks(program)
        if block.kind in kinds
        for units in [_units(block)]
        if isinstance(units, BlockUnits)
    ]
    if not found:
        reason = f"no block of kind {' or '.join(kinds)} has units that can be told apart"
        raise MemcError("E307", reason, program.model.source, "see memc inspect --why")
    return found


def refusals(program: Program, kinds: Sequence[str] = ("attention", "feed_forward")) -> list[Rejection]:
    """Say of every block without units why it was left out; of feed-forward networks where ``kinds`` has them."""
    found = []
    for block in find_blocks(program):
        refusal = _units(block)
        asked = isinstance(block, AttentionBlock) or "feed_forward" in kinds
        if asked and isinstance(refusal, tuple):
            found.append(Rejection(block.layer, block.path, block.kind, *refusal))
    return found


def _units(block: Block) -> BlockUnits | tuple[str, str]:
    """Return the units of a block, or code and reason where it has none."""
    if isinstance(block, FeedForwardBlock):
        if block.kind == "moe" or block.down is None:
            return "moe", "a mixture of experts: which channels a token uses is chosen as it runs"
        linears = [node for node in (block.up, block.gate, block.down) if node is not None]
        node = linear_input(block.down)
        axis, count = len(node.meta["val"].shape) - 1, block.hidden
        return BlockUnits(block, node, axis, count, block.output, _weights(linears) / count)
    if block.kind == "cross_attention":
        return "cross_attention", "keys and values come from another sequence"
    if block.attention.target is not torch.ops.memc.attention.default:
        return "not_streamable", "the block is no attention of a decoder that reads its tokens one by one"
    if "output" not in block.projections:
        return "no_exit", "the attention has no output projection"
    linears = list(dict.fromkeys(projection.node for projection in block.projections.values()))
    exit_, count = block.projections["output"].node, block.num_heads
    return BlockUnits(block, block.output, 1, count, exit_, _weights(linears) / count)


def _weights(linears: Sequence[Node]) -> int:
    """Count the elements of the weights of some linear ops."""
    sizes = {}
    for node in linears:
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                sizes[source.target] = source.meta["val"].numel()
    return int(sum(sizes.values()))
