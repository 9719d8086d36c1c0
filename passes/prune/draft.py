"""What can go and how much of it: everything about pruning a program that needs no weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from memc.blocks import AttentionBlock, Block, FeedForwardBlock
from memc.errors import MemcError
from memc.passes.prune.choice import Task, legal, most, spread
from memc.passes.prune.groups import Branch, Group, Groups, Kind, block_parameters
from memc.passes.prune.walk import BlockedError
from memc.pipeline import Rejection
from memc.program import Program

HEADS_FROM = 1 / 3
"""The share of block parameters from which ``unit=auto`` takes key-value heads too: on SmolLM2-135M they did no good at
a quarter and did at a half."""

HEADS_SHARE = 1 / 3
"""The share of the key-value heads that it takes then."""

Found = TypeVar("Found")


@dataclass(frozen=True)
class Layer:
    """A layer that can be taken out of the residual stream, and how many parameters its projections have."""

    number: int
    branches: tuple[Branch, ...]
    cost: int


@dataclass(frozen=True)
class Draft:
    """Units to remove from groups, or ``count`` of some ``layers``; ``parameters`` are those of all blocks."""

    groups: Groups
    tasks: tuple[Task, ...]
    layers: tuple[Layer, ...]
    count: int
    rejections: tuple[Rejection, ...]
    parameters: int


@dataclass
class Drafter:
    """Makes the draft of one program, with a uniform spread; ``spec`` is the pass's spec string, for messages.

    Where the pass ``searches`` for another spread, groups that a uniform one leaves alone are there too.
    """

    program: Program
    spec: str
    amount: float
    unit: str
    multiple: int
    protect: str
    alike: bool
    searches: bool

    def __post_init__(self) -> None:
        """Find the blocks and what is protected."""
        self.groups = Groups(self.program)
        self.rejections: list[Rejection] = []
        numbers = sorted({block.layer for block in self.groups.blocks})
        named = {int(number) for number in re.findall("[0-9]+", self.protect)}
        if missing := sorted(named - set(numbers)):
            reason = f"option 'protect' names layer {missing[0]}"
            have = f"layers {numbers[0]} to {numbers[-1]}" if numbers else "no layer"
            raise MemcError("E203", reason, f"protect={self.protect}", f"the model has {have}")
        self._protected = {*numbers[:1], *numbers[-1:]} if self.protect == "ends" else named

    def draft(self) -> Draft:
        """Settle how much goes where. Raises ``MemcError`` E203 where the amount leaves no legal shape."""
        total = block_parameters(self.program, self.groups.blocks)
        wanted = self.amount * total
        tasks: list[Task] = []
        layers: list[Layer] = []
        if self.unit == "layers":
            layers = self._layers()
        else:
            tasks = self._tasks(wanted, total)
        count = self._count(layers, wanted, total)
        return Draft(self.groups, tuple(tasks), tuple(layers), count, tuple(self.rejections), total)

    def _tasks(self, wanted: float, total: int) -> list[Task]:
        heads, channels = list[Task](), list[Group]()
        if self.unit != "heads":
            channels = self._each(FeedForwardBlock, self._channels)
        if self.unit == "heads":
            found = self._each(AttentionBlock, self._heads)
            self._require(wanted, found, 0, total)
            heads = spread(found, wanted, self.multiple, alike=self.alike)
        elif self.unit == "auto" and (self.amount >= HEADS_FROM or self.searches):
            found = [group for group in self._each(AttentionBlock, self._heads) if group.kind == "kv_groups"]
            share = HEADS_SHARE if self.amount >= HEADS_FROM else 0
            heads = [Task(group, max(1, round(share * group.units)) if share else 0) for group in found]
        gone = sum(task.cost for task in heads)
        if self.unit != "heads" and (channels or heads):
            self._require(wanted, channels, gone, total)
            heads += spread(channels, max(0.0, wanted - gone), self.multiple, alike=self.alike)
        if self.amount and heads and not any(task.count for task in heads):
            reason = f"amount={self.amount} is less than half of a step: it would remove nothing"
            raise MemcError("E203", reason, self.spec, "a larger amount, or a smaller round")
        return heads

    def _require(self, wanted: float, groups: Sequence[Group], gone: int, total: int) -> None:
        """Refuse an amount that no legal shape gives; the last step of rounding is not held against it."""
        can = gone + most(groups, self.multiple)
        if self.amount and groups and (wanted > can or all(len(legal(group, self.multiple)) == 1 for group in groups)):
            reason = f"amount={self.amount} leaves no legal shape: at most {can / total:.3f} of block parameters can go"
            hint = f"amount={can / total:.2f} or less, a smaller round, protect=none, or another unit"
            raise MemcError("E203", reason, self.spec, hint)

    def _layers(self) -> list[Layer]:
        found: dict[int, list[Branch]] = {}
        for kind in (AttentionBlock, FeedForwardBlock):
            for branch in self._each(kind, self.groups.branch):
                found.setdefault(branch.block.layer, []).append(branch)
        whole = {number: {b.path for b in self.groups.blocks if b.layer == number} for number in found}
        return [
            Layer(number, tuple(branches), block_parameters(self.program, tuple(b.block for b in branches)))
            for number, branches in sorted(found.items())
            if {branch.block.path for branch in branches} == whole[number]
        ]

    def _count(self, layers: Sequence[Layer], wanted: float, total: int) -> int:
        if not layers or not self.amount:
            return 0
        mean = sum(layer.cost for layer in layers) / len(layers)
        count = round(wanted / mean)
        if not 1 <= count <= len(layers):
            reason = f"amount={self.amount} is {wanted / mean:.2f} of {len(layers)} layers that can go"
            hint = f"an amount from {mean / total:.3f} to {mean * len(layers) / total:.3f}, or protect=none"
            raise MemcError("E203", reason, self.spec, hint)
        return count

    def _channels(self, block: Block) -> Group:
        return self.groups.of(block, "ffn_channels")

    def _heads(self, block: Block) -> Group:
        assert isinstance(block, AttentionBlock)
        kind: Kind = "kv_groups" if block.num_kv_heads > 1 else "query_heads"
        if block.num_heads == 1:
            raise BlockedError("single", "the block has one head")
        return self.groups.of(block, kind)

    def _each(self, kind: type[Block], find: Callable[[Block], Found]) -> list[Found]:
        """Find something for every block of a kind, and note why not where there is none."""
        found = []
        for block in self.groups.blocks:
            if isinstance(block, kind):
                try:
                    found.append(self._unprotected(block, find))
                except BlockedError as blocked:
                    at = (block.layer, block.path, block.kind)
                    self.rejections.append(Rejection(*at, blocked.code, blocked.reason))
        return found

    def _unprotected(self, block: Block, find: Callable[[Block], Found]) -> Found:
        if not self.program.model.decoder:
            raise BlockedError("encoder", "the model is no decoder")
        if self.program.fetched:
            raise BlockedError("fetched", "what the model fetches was made for its blocks as they are: prune it first")
        if block.layer in self._protected:
            raise BlockedError("protected", f"the option protect={self.protect} leaves this layer as it is")
        return find(block)


def spaced(items: Sequence[Layer], count: int) -> list[Layer]:
    """Return so many layers, evenly spread."""
    return [items[(2 * index + 1) * len(items) // (2 * count)] for index in range(count)]
