"""What can go and how much of it: everything about pruning a program that needs no weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from memc import sites
from memc.blocks import AttentionBlock, Block, FeedForwardBlock
from memc.errors import MemcError
from memc.passes.prune.analysed import Analysed
from memc.passes.prune.choice import Task, legal, most, spread, unit_cost
from memc.passes.prune.groups import Branch, Group, Groups, Kind
from memc.passes.prune.removal import Removal, runs
from memc.passes.prune.walk import BlockedError
from memc.pipeline import Rejection
from memc.program import Program
from memc.raising import block_parameters

HEADS_FROM = 1 / 3
"""The share of block parameters from which ``unit=auto`` takes key-value heads too: on SmolLM2-135M they did no good at
a quarter and did at a half."""

HEADS_SHARE = 1 / 3
"""The share of the key-value heads that it takes then."""

BLOCKS: dict[str, type[Block]] = {"attention_blocks": AttentionBlock, "ffn_blocks": FeedForwardBlock}
"""Units that are single blocks."""

REMOVED = (*BLOCKS, "layers")
"""Units that are taken out of the residual stream whole."""

Found = TypeVar("Found")


@dataclass(frozen=True)
class Draft:
    """Units to remove from groups, and ``count`` of some ``removals``; ``parameters`` are those of all blocks."""

    groups: Groups
    tasks: tuple[Task, ...]
    removals: tuple[Removal, ...]
    count: int
    rejections: tuple[Rejection, ...]
    parameters: int


@dataclass(kw_only=True)
class Drafter:
    """Makes the draft of one program, with a uniform spread; ``spec`` is the pass's spec string, for messages.

    Where the shares are ``free``, settled later without limits, groups that a uniform spread leaves alone are there.
    """

    program: Program
    spec: str
    amount: float
    unit: str
    score: str
    multiple: int
    protect: str
    protect_heads: str
    alike: bool
    of: str
    free: bool
    analysis: str

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
        attention = [block for block in self.groups.blocks if isinstance(block, AttentionBlock)]
        self._kept = sites.kept_groups(self.protect_heads, attention, self.open, "protect_heads")
        read, scores = (self.analysis, self.groups.blocks), self.score == "analysis"
        self._analysed = Analysed.read(*read, scores=scores) if self.analysis != "none" else None

    def draft(self) -> Draft:
        """Settle how much goes where. Raises ``MemcError`` E203 where the amount leaves no legal shape."""
        total = block_parameters(self.program, self.groups.blocks)
        open_ = tuple(block for block in self.groups.blocks if block.layer not in self._protected)
        base = total if self.of == "model" else block_parameters(self.program, open_)
        wanted = self.amount * base
        tasks, removals, count = list[Task](), list[Removal](), 0
        if self.unit == "key_channels":
            groups = self._each(AttentionBlock, self._keys)
            if self.of == "units":
                base = sum(group.units * unit_cost(group) for group in groups)
            tasks = self._checked([], groups, 0, self.amount * base, base)
        elif self.unit in REMOVED:
            removals = self._layers() if self.unit == "layers" else self._blocks(BLOCKS[self.unit])
            count = self._count(removals, wanted, base)
        elif self.unit == "auto" and self.score == "2ssp":
            removals = self._blocks(AttentionBlock)
            count = self._attention_blocks(removals, wanted)
            gone = sum(removal.cost for removal in spaced(removals, count))
            tasks = self._checked([], self._each(FeedForwardBlock, self._channels), gone, wanted, base)
        else:
            tasks = self._tasks(wanted, base)
        if self.amount and tasks and not count and not any(task.count for task in tasks):
            reason = f"amount={self.amount} is less than half of a step: it would remove nothing"
            raise MemcError("E203", reason, self.spec, "a larger amount, or a smaller round")
        return Draft(self.groups, tuple(tasks), tuple(removals), count, tuple(self.rejections), total)

    def _tasks(self, wanted: float, total: int) -> list[Task]:
        """Spread what is wanted over groups, after a fixed share of the heads where ``auto`` takes them."""
        if self.unit == "heads":
            return self._checked([], self._each(AttentionBlock, self._heads), 0, wanted, total)
        heads = list[Task]()
        if self.unit == "auto" and (self.amount >= HEADS_FROM or self.free):
            found = [group for group in self._each(AttentionBlock, self._heads) if group.kind == "kv_groups"]
            share = HEADS_SHARE if self.amount >= HEADS_FROM else 0
            heads = [Task(group, min(_some(share * group.units), legal(group, self.multiple)[-1])) for group in found]
        channels = self._each(FeedForwardBlock, self._channels)
        return self._checked(heads, channels, sum(task.cost for task in heads), wanted, total)

    @property
    def takes_heads(self) -> bool:
        """Whether heads may go, in whatever unit."""
        return self.unit not in ("ffn", "ffn_blocks") and (
            self.unit != "auto" or self.free or self.score == "2ssp" or self.amount >= HEADS_FROM
        )

    @property
    def open(self) -> list[AttentionBlock]:
        """The attention blocks whose heads may go, or be protected by what they do."""
        return [
            block
            for block in self.groups.blocks
            if isinstance(block, AttentionBlock)
            and self.takes_heads
            and block.layer not in self._protected
            and block.attention.target is torch.ops.memc.attention.default
        ]

    def _checked(self, before: list[Task], groups: Sequence[Group], gone: int, wanted: float, total: int) -> list[Task]:
        """Add to tasks that some groups give what else than ``gone`` is wanted."""
        if not groups and not before:
            return []
        self._require(wanted, groups, gone, total)
        tasks = before + spread(groups, max(0.0, wanted - gone), self.multiple, alike=self.alike)
        for kind in dict.fromkeys(task.group.kind for task in tasks) if self.alike else ():
            left = sorted({task.group.units - task.count for task in tasks if task.group.kind == kind})
            if len(left) > 1:
                sizes = " and ".join(map(str, left))
                reason = f"alike=true, and layers that differ already are left with {sizes} {kind.replace('_', ' ')}"
                raise MemcError("E203", reason, self.spec, "leave out alike=true: the result has a size for each layer")
        return tasks

    def _attention_blocks(self, removals: Sequence[Removal], wanted: float) -> int:
        """Return how many attention blocks go: round(B s^((P_ffn / P_attention) / 1.5)) of B (2SSP, section 3.3).

        At most as many as what is wanted pays for: the formula is for models of more feed-forward parameters.
        """
        kinds = [[block for block in self.groups.blocks if isinstance(block, kind)] for kind in BLOCKS.values()]
        attention, feed_forward = (block_parameters(self.program, tuple(blocks)) for blocks in kinds)
        share = float(self.amount ** (feed_forward / max(attention, 1) / 1.5))
        most = wanted * len(removals) / max(sum(removal.cost for removal in removals), 1)
        return min(round(share * len(kinds[0])), len(removals), int(most))

    def _require(self, wanted: float, groups: Sequence[Group], gone: int, total: int) -> None:
        """Refuse an amount that no legal shape gives; the last step of rounding is not held against it."""
        can = gone + most(groups, self.multiple)
        if self.amount and groups and (wanted > can or all(len(legal(group, self.multiple)) == 1 for group in groups)):
            what = "key channels" if self.of == "units" else "block parameters"
            reason = f"amount={self.amount} leaves no legal shape: at most {can / total:.3f} of {what} can go"
            fitting = math.floor(100 * can / total) / 100
            hint = f"amount={fitting:.2f} or less, a smaller round, protect=none, or another unit"
            raise MemcError("E203", reason, self.spec, hint)

    def _layers(self) -> list[Removal]:
        found: dict[int, list[Branch]] = {}
        for kind in BLOCKS.values():
            for branch in self._each(kind, self._branch):
                found.setdefault(branch.block.layer, []).append(branch)
        whole = {number: {b.path for b in self.groups.blocks if b.layer == number} for number in found}
        return [
            self._removal(*branches)
            for _, branches in sorted(found.items())
            if {branch.block.path for branch in branches} == whole[branches[0].block.layer]
        ]

    def _blocks(self, kind: type[Block]) -> list[Removal]:
        return [self._removal(branch) for branch in self._each(kind, self._branch)]

    def _removal(self, *branches: Branch) -> Removal:
        cost = block_parameters(self.program, tuple(branch.block for branch in branches))
        return Removal(branches[0].block.layer, branches, cost)

    def _count(self, removals: Sequence[Removal], wanted: float, total: int) -> int:
        if not removals or not self.amount:
            return 0
        mean = sum(removal.cost for removal in removals) / len(removals)
        count = round(wanted / mean)
        if not 1 <= count <= len(removals):
            what = self.unit.replace("_", " ")
            reason = f"amount={self.amount} is {wanted / mean:.2f} of {len(removals)} {what} that can go"
            hint = f"an amount from {mean / total:.3f} to {mean * len(removals) / total:.3f}, or to protect less"
            raise MemcError("E203", reason, self.spec, hint)
        if self.score == "similarity" and not runs(removals, count):
            reason = f"no {count} layers that can go lie next to one another"
            raise MemcError("E203", reason, self.spec, "a smaller amount, protect=none, or score=influence")
        return count

    def _channels(self, block: Block) -> Group:
        return self._applied(self.groups.of(block, "ffn_channels"))

    def _applied(self, group: Group) -> Group:
        """Return a group as an analysis has it, where one is given."""
        found = group if self._analysed is None else self._analysed.applied(group)
        if len(found.fixed) == found.units:
            raise BlockedError("protected", "all of its units are to stay")
        return found

    def _heads(self, block: Block) -> Group:
        assert isinstance(block, AttentionBlock)
        kind: Kind = "kv_groups" if block.num_kv_heads > 1 else "query_heads"
        if block.num_heads == 1:
            raise BlockedError("single", "the block has one head")
        group, fixed = self.groups.of(block, kind), tuple(sorted(g for layer, g in self._kept if layer == block.layer))
        if len(fixed) == block.num_kv_heads:
            raise BlockedError("protected", "protect_heads leaves every head of it as it is")
        return self._applied(replace(group, fixed=fixed))

    def _keys(self, block: Block) -> Group:
        self._require_no_kept(block)
        return self.groups.of(block, "key_channels")

    def _branch(self, block: Block) -> Branch:
        self._require_no_kept(block)
        return self.groups.branch(block)

    def _require_no_kept(self, block: Block) -> None:
        """Refuse what would change a block as a whole that has units which are to stay."""
        if isinstance(block, AttentionBlock) and any(layer == block.layer for layer, _ in self._kept):
            raise BlockedError("protected", "it has heads that protect_heads leaves as they are")
        if self._analysed is not None and self._analysed.keeps(block):
            raise BlockedError("protected", f"it has units that {self.analysis} keeps")

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


def _some(count: float) -> int:
    """Round a number of units, up to one where it is not none."""
    return max(1, round(count)) if count else 0


def spaced(items: Sequence[Removal], count: int) -> list[Removal]:
    """Return so many removals, evenly spread."""
    return [items[(2 * index + 1) * len(items) // (2 * count)] for index in range(count)]
