"""What can be removed from a model: groups of coupled dimensions, and residual branches, derived from its graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from memc.blocks import AttentionBlock, Block, FeedForwardBlock
from memc.dialect import arguments, op_spec
from memc.passes.prune.moves import ELEMENTWISE, MOVES, SPLITS
from memc.passes.prune.walk import BlockedError, Labels, Walk
from memc.program import Program, get_tensor
from memc.raising import find_blocks
from memc.raising.evaluate import content_nodes, hints, shape
from memc.raising.feed_forward import linear_input, linear_parts
from memc.rewrite import owns_its_states, result_of

aten = torch.ops.aten

Kind = Literal["ffn_channels", "kv_groups", "query_heads", "key_channels"]


@dataclass(frozen=True)
class Group:
    """Dimensions of one block that only get smaller together, in ``units`` that can be removed one by one.

    ``ffn_channels`` are channels of a feed-forward network; ``kv_groups`` are key-value heads, each with the query
    heads that read it; ``query_heads`` are single query heads, of which every key-value head has to lose as many;
    ``key_channels`` are channels of every query and key of the block, in pairs where any are rotated.
    ``labels`` has for every node with such a dimension its axis and the unit of each position. ``exit`` is the linear
    op that the dimension ends in: without the unit's columns of its input, it computes what it would if they were 0.
    Key channels end in the scores: there it is the output projection, all of whose inputs stay. Units in ``fixed`` stay
    whatever their scores; ``given`` are scores of all units that come from elsewhere.
    """

    kind: Kind
    block: Block
    units: int
    labels: dict[Node, Labels] = field(repr=False)
    exit: Node
    module: GraphModule = field(repr=False)
    fixed: tuple[int, ...] = ()
    given: tuple[float, ...] = ()

    @property
    def columns(self) -> Tensor:
        """The unit of each input channel of ``exit``, -1 where it stays whatever goes."""
        entry = linear_input(self.exit)
        if self.kind == "key_channels":
            return torch.full((hints(entry)[-1],), -1)
        return self.labels[entry].units

    @property
    def keys(self) -> Tensor:
        """Of ``key_channels``, the unit of each channel of a query and a key, -1 where it stays."""
        assert isinstance(self.block, AttentionBlock)
        return self.labels[self.block.query].units

    @property
    def channels(self) -> int:
        """Of ``key_channels``, the channels of a unit: two where any are rotated."""
        return int((self.keys == 0).sum())

    @property
    def parameters(self) -> dict[str, Labels]:
        """Labels of every parameter and buffer, tied ones under each of their names."""
        return {str(node.target): labels for node, labels in self.labels.items() if node.op == "get_attr"}

    @property
    def cost(self) -> Tensor:
        """The parameters that go with each unit, ``[units]`` int64."""
        total = torch.zeros(self.units, dtype=torch.int64)
        known: set[int] = set()
        for name, labels in self.parameters.items():
            value = get_tensor(self.module, name)
            if id(value) not in known and isinstance(value, torch.nn.Parameter):
                known.add(id(value))
                taken = labels.units[labels.units >= 0]
                total += torch.bincount(taken, minlength=self.units) * (value.numel() // len(labels.units))
        return total

    def describe(self) -> str:
        """Name the parameters and their axes, as a report prints them."""
        parts = [f"{name}[{labels.axis}]" for name, labels in sorted(self.parameters.items())]
        return f"{self.units} {self.kind}: {', '.join(parts)}"


@dataclass(frozen=True)
class Branch:
    """A block's path back to the residual stream, from the output ``start`` of its last projection.

    ``add`` sums the stream and ``addend``, which comes from ``start`` alone.
    """

    block: Block
    start: Node
    add: Node
    addend: Node


class Groups:
    """The groups and branches of a program's blocks."""

    def __init__(self, program: Program) -> None:
        """Find the blocks, and who reads which parameter."""
        self.program = program
        self.blocks = find_blocks(program)
        self._readers: dict[int, list[Node]] = {}
        for node in program.module.graph.find_nodes(op="get_attr"):
            self._readers.setdefault(id(get_tensor(program.module, str(node.target))), []).append(node)
        self._content = content_nodes(program.module, program.placeholders())

    def of(self, block: Block, kind: Kind) -> Group:
        """Return a group of a block; raises :class:`BlockedError` with the reason where it has none."""
        if isinstance(block, FeedForwardBlock):
            if block.kind == "moe":
                raise BlockedError("moe", "a mixture of experts: which channels a token uses is chosen as it runs")
            return self._channels(block)
        return self._keys(block) if kind == "key_channels" else self._heads(block, kind)

    def branch(self, block: Block) -> Branch:
        """Return a block's residual branch; raises :class:`BlockedError` where it has none of its own."""
        if isinstance(block, FeedForwardBlock):
            if block.kind == "moe":
                raise BlockedError("moe", "a mixture of experts: its output has no one place")
            node = block.output
        else:
            if self._stateful(block) and not owns_its_states(self.program, block.attention):
                raise BlockedError("shared", "keys and values are shared with another layer, which reads them")
            if "output" not in block.projections:
                raise BlockedError("no_exit", "the attention has no output projection")
            node = block.projections["output"].node
        return Branch(block, node, *residual(node, self._content))

    def stream_of(self, branches: Sequence[Branch]) -> tuple[Node, Node]:
        """Return the residual stream before and after some branches, which lie in one layer."""
        adds = {branch.add for branch in branches}
        while True:
            last = max(adds)
            before = {source for add in adds for source in add.args[:2]} - adds - self._addends
            if before:
                (stream,) = before
                assert isinstance(stream, Node)
                return stream, last
            adds.add(residual(last, self._content)[0])  # branches side by side are summed first

    @cached_property
    def _addends(self) -> set[Node]:
        """What any block adds to the residual stream."""
        found = set[Node]()
        for block in self.blocks:
            with suppress(BlockedError):
                found.add(self.branch(block).addend)
        return found

    def _channels(self, block: FeedForwardBlock) -> Group:
        assert block.down is not None
        entry = linear_input(block.down)
        units = torch.arange(hints(entry)[-1])
        walk = Walk(self.program.module, None, self._readers)
        walk.run({entry: Labels(len(hints(entry)) - 1, units)})
        return self._group("ffn_channels", block, len(units), walk)

    def _heads(self, block: AttentionBlock, kind: Kind) -> Group:
        heads, groups = block.num_heads, block.num_kv_heads
        size, node, bound = heads // groups, block.attention, arguments(block.attention)
        query = torch.arange(heads) if kind == "query_heads" else torch.arange(heads) // size
        seeds = {bound["query"]: Labels(1, query), block.output: Labels(1, query)}
        for name in ("slopes", "sink_logits"):
            if bound.get(name) is not None:
                seeds[bound[name]] = Labels(0, query)
        bias = bound.get("bias")
        if bias is not None and len(hints(bias)) > 2 and hints(bias)[-3] == heads > 1:
            seeds[bias] = Labels(len(hints(bias)) - 3, query)
        if kind == "kv_groups":
            if self._stateful(block) and not owns_its_states(self.program, node):
                raise BlockedError("shared", "keys and values are shared with another layer, which reads them")
            key = torch.arange(groups)
            held = list(self._held(node)) if self._stateful(block) else []
            seeds |= {item: Labels(1, key) for item in (bound["key"], bound["value"], *held)}
        walk = Walk(self.program.module, node, self._readers)
        walk.run(seeds)
        return self._group(kind, block, heads if kind == "query_heads" else groups, walk)

    def _keys(self, block: AttentionBlock) -> Group:
        """Return the group of key channels: the same ones of every head, since one table of frequencies rotates all.

        Where each key-value head of SmolLM2-135M loses a quarter of its own choice, perplexity grows by half as much.
        """
        units, bound = key_units(block), arguments(block.attention)
        if int(units.max()) < 1:
            raise BlockedError("single", "a key has no two channels, or pairs of them, of which one could go")
        seeds = {bound["query"]: Labels(3, units), bound["key"]: Labels(3, units)}
        if self._stateful(block):
            if not owns_its_states(self.program, block.attention):
                raise BlockedError("shared", "keys are shared with another layer, which reads them")
            after = result_of(block.attention, _states(block.attention)["past_key"])
            seeds |= {node: Labels(3, units) for node in (bound["past_key"], after) if node is not None}
        walk = Walk(self.program.module, block.attention, self._readers)
        try:
            walk.run(seeds)
        except BlockedError as blocked:
            if blocked.code != "conflict":
                raise
            reason = "channels of queries or keys lie on one axis with those of values, in a fused projection"
            raise BlockedError("conflict", reason) from blocked
        if walk.exits:
            raise BlockedError("shared", f"the dimension is no block's own: {walk.exits[0].name} reads it")
        if "output" not in block.projections:
            raise BlockedError("no_exit", "the attention has no output projection")
        exit_ = block.projections["output"].node
        return self._ending("key_channels", block, int(units.max()) + 1, walk, exit_)

    def _group(self, kind: Kind, block: Block, units: int, walk: Walk) -> Group:
        if len(walk.exits) != 1:
            reason = f"it ends in {len(walk.exits)} projections" if walk.exits else "no projection ends it"
            raise BlockedError("shared" if walk.exits else "no_exit", f"the dimension is no block's own: {reason}")
        return self._ending(kind, block, units, walk, walk.exits[0])

    def _ending(self, kind: Kind, block: Block, units: int, walk: Walk, exit_: Node) -> Group:
        weight, bias, _, _ = linear_parts(exit_)
        if weight.op != "get_attr" or (bias is not None and bias.op != "get_attr"):
            raise BlockedError("no_exit", f"the weight of {exit_.name} is computed")
        return Group(kind, block, units, walk.found, exit_, self.program.module)

    def _stateful(self, block: AttentionBlock) -> bool:
        return block.attention.target == torch.ops.memc.attention.default

    def _held(self, node: Node) -> Iterator[Node]:
        """Yield the states of keys and values, and their next values."""
        bound = arguments(node)
        for name, index in _states(node).items():
            if name != "past_positions":
                after = result_of(node, index)
                yield from (bound[name], *([after] if after is not None else []))


def key_units(block: AttentionBlock) -> Tensor:
    """Return the unit of each channel of a block's queries and keys ``[D]``: the same number for what goes together.

    Where none are rotated every channel is a unit. Where any are, units are pairs, all of one cost: the two that are
    rotated together, and neighbours of those that pass through; an odd one of those stays (-1).
    """
    if block.rotary is None:
        return torch.arange(block.head_dim)
    size = block.rotary.size
    pairs = torch.arange(size // 2)
    rotated = pairs.repeat_interleave(2) if block.rotary.interleaved else pairs.repeat(2)
    rest = size // 2 + torch.arange(block.head_dim - size) // 2
    if len(rest) % 2:
        rest[-1] = -1
    return torch.cat([rotated, rest])


def _states(attention: Node) -> Mapping[str, int]:
    row = op_spec(attention.target)
    assert row is not None
    return row.states


def residual(node: Node, content: set[Node]) -> tuple[Node, Node]:
    """Follow a block's output to the sum with the residual stream; returns the sum and the addend.

    ``content`` are the nodes that depend on a model's inputs. Raises :class:`BlockedError` where the output is read in
    several places, or changed by anything else of the model on its way.
    """
    while True:
        readers = [user for user in node.users if user.target != aten.type_as.default or user.args[0] is node]
        if len(readers) != 1:
            raise BlockedError("no_residual", f"{node.name} is read in {len(readers)} places")
        (user,) = readers
        read = user.args[:1] if user.target == aten.type_as.default else user.all_input_nodes
        others = [source for source in read if isinstance(source, Node) and source is not node and source in content]
        alike = len(others) == 1 and list(map(str, shape(others[0]))) == list(map(str, shape(node)))
        if user.target == aten.add.Tensor and alike and not user.kwargs:
            return user, node
        # Sizes depend on the inputs too, and change nothing.
        if any(shape(other) for other in others) or user.target not in _CHAIN:
            raise BlockedError("no_residual", f"{user.name} does not add the block's output to what it read")
        node = user


_CHAIN = ELEMENTWISE | (MOVES - SPLITS) | {torch.ops.memc.norm.default, aten.type_as.default}
"""What a block's output may go through on its way to the residual stream."""
