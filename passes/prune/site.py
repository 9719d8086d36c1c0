"""The pass itself: its options, what it takes, and what it leaves alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from memc.errors import MemcError
from memc.passes.prune import measure
from memc.passes.prune.allocate import allocate
from memc.passes.prune.details import Done
from memc.passes.prune.draft import Draft, Drafter, Layer, spaced
from memc.passes.prune.rewrite import Cut, Pruner
from memc.pipeline import Calibration, Pass, PassReport, Plan, Site, option
from memc.program import Program
from memc.relation import Bounded, Exact, Relation
from memc.target import Target

_LAYERS = re.compile(r"\[\s*([0-9]+\s*(,\s*[0-9]+\s*)*)?\]")


@dataclass(frozen=True)
class Prune(Pass):
    """Remove feed-forward channels, key-value heads or layers, and refit what is left, without training.

    What goes is a group of dimensions that the graph couples: the rows, columns, biases, norms, slopes, sink logits and
    states that only get smaller together. The result is a program of smaller dense shapes that computes what the
    original would with those channels or heads at zero. ``score`` says which. ``obs`` takes out step by step what a fit
    of the rest misses least (ZipLM, :mod:`memc.passes.prune.eliminate`). The others take the lowest of ``wanda`` (|W|
    times the input's norm), ``flap`` (fluctuation, with a bias for the mean of what goes), ``activation`` (Minitron),
    ``magnitude`` or ``taylor``, by the formulas of :mod:`memc.passes.prune.scores`.

    With ``refit`` the output and down projections get new weights and a bias by least squares over the calibration
    text, block after block: on what the model as far as it is pruned gives them, to what brings the residual stream
    back to that of the original. So each block makes up for those before it. Blocks that lose nothing stay as they are.

    ``unit=auto`` removes channels; from a third of the block parameters on, a third of the key-value heads too.
    ``unit=heads`` removes key-value heads with their query heads, or query heads where there is one key-value head.
    ``unit=layers`` takes whole layers out of the residual stream, those that turn it least (block influence, ShortGPT).

    Calibration text is that of the conversion: its data, or text sampled from the original. Without it, as in planning,
    as much is removed, evenly spaced. Every block gives the same share, but for rounding: what one gives too little the
    next gives more, or with ``alike`` none does, and the sum is less exact. Block parameters are the
    weights and biases of the projections of attention and feed-forward blocks.

    With ``allocate=search`` each block gives what the model misses least by dynamic programming over the sizes that it
    can have, of channels and, with ``unit=auto``, key-value heads: :mod:`memc.passes.prune.curves` tells what each size
    is expected to lose. The result has no more parameters, FLOPs and bytes to read for a token (after ``length``) than
    a uniform spread, which is what planning without calibration text shows.

    What is lost can be recovered: a conversion with data trains adapters on the projections that are left.

    Identity setting: ``amount=0``, bit for bit. Beyond, the perplexity ratio is measured and nothing is promised.

    Does not handle:

    - ``encoder``: models that are no decoders.
    - ``fetched``: models with inputs that are fetched (``memory_bank``), made for the blocks as they are.
    - ``moe``: mixtures of experts, whose channels are chosen as they run.
    - ``protected``: the first and the last layer, or those that the option ``protect`` names.
    - ``norm``: heads under a norm that runs over all of them.
    - ``shared``: dimensions, weights or states that another block reads too.
    - ``mixed``, ``conflict``, ``size``: dimensions that are laid out among others, twice, or computed with.
    - ``unknown_op``: dimensions that reach an op which may mix them.
    - ``no_exit``, ``no_residual``: dimensions that no projection ends, blocks that are not added to a residual stream.
    - ``single``: attention with a single head, where heads are asked for.
    """

    name: ClassVar[str] = "prune"

    amount: float = option(0.25, "share of the block parameters to remove", min=0.0, max=0.95)
    unit: str = option("auto", "what is removed", choices=("auto", "ffn", "heads", "layers"))
    score: str = option(
        "obs",
        "what channels and heads are chosen by",
        choices=("obs", "wanda", "flap", "activation", "magnitude", "taylor"),
    )
    refit: bool = option(True, "fit the projections behind what was removed, by least squares")
    round: int = option(64, "channels stay in multiples of this", unit="channels", min=1)
    alike: bool = option(False, "every layer loses as much, to the nearest round, so that it can be exported")
    allocate: str = option(
        "uniform", "each block gives the same share, or what a search finds best", choices=("uniform", "search")
    )
    protect: str = option("ends", "layers that stay as they are: ends (first and last), none, or a list [0,28,29]")
    sequences: int = option(128, "most calibration sequences", unit="sequences", min=1)
    length: int = option(512, "tokens of a calibration sequence", unit="tokens", min=2)

    def __post_init__(self) -> None:
        """Check every option."""
        super().__post_init__()
        if self.protect not in ("ends", "none") and not _LAYERS.fullmatch(self.protect):
            where, hint = f"{self.name}:protect={self.protect}", f"write {self.name}:protect=[0,28,29]"
            raise MemcError("E203", "option 'protect' is ends, none or a list of layers", where, hint)
        if self.allocate == "search":
            for option_, value, clashes in (
                ("unit", self.unit, self.unit == "layers"),
                ("refit", "false", not self.refit),
                ("alike", "true", self.alike),
            ):
                if clashes:
                    reason = f"allocate=search weighs what refitted blocks of any size lose, and {option_}={value}"
                    raise MemcError("E203", reason, self.spec, f"leave out allocate=search or {option_}={value}")

    def calibrates(self) -> tuple[int, int] | None:
        """Ask for sequences where the score or the refit looks at what the model does."""
        unseen = self.score == "magnitude" and not self.refit and self.unit != "layers"
        return None if unseen or not self.amount else (self.sequences, self.length)

    def quickens(self) -> bool:
        """Promise that a token takes no more time, where anything is removed."""
        return self.amount > 0

    def plan(self, program: Program, target: Target) -> Plan:
        """Settle how much of which block goes."""
        draft = self.draft(program)
        relations: tuple[Relation, ...] = (Bounded("perplexity_ratio", None),) if self.amount else (Exact(),)
        return Plan(self.spec, _sites(draft, spaced(draft.layers, draft.count)), draft.rejections, relations)

    def apply(self, program: Program, plan: Plan) -> tuple[Program, PassReport]:
        """Choose what goes and remove it."""
        draft, allocation = self.draft(program), None
        if plan.calibration is not None:
            measure.require_usable(plan.calibration, draft.tasks, refits=self.refit)
            if self.allocate == "search" and self.amount:
                allocation = allocate(program, draft.tasks, plan.calibration, self.score, self.round, self.length)
                draft = replace(draft, tasks=allocation.tasks)
        layers, influence = self._layers(program, draft, plan.calibration)
        cuts = self._cuts(program, draft, plan.calibration)
        result = Pruner(program).run(cuts, [branch for layer in layers for branch in layer.branches])
        done = Done(draft, cuts, layers, influence, allocation)
        details = done.details(self._chosen_by(plan.calibration), plan.calibration)
        sites, recovers = _sites(draft, layers), self.amount > 0
        report = PassReport(plan.spec, sites, plan.rejections, plan.relations, details=details, recovers=recovers)
        return result, report

    def draft(self, program: Program) -> Draft:
        """Settle how much goes where; needs no weights."""
        searches = self.allocate == "search"
        return Drafter(
            program, self.spec, self.amount, self.unit, self.round, self.protect, self.alike, searches
        ).draft()

    def _layers(
        self, program: Program, draft: Draft, calibration: Calibration | None
    ) -> tuple[list[Layer], dict[int, float]]:
        """Return the layers to remove, and the influence of every layer that could be."""
        if not draft.count or calibration is None:
            return spaced(draft.layers, draft.count), {}
        branches = [layer.branches for layer in draft.layers]
        found = measure.influence(program, draft.groups, branches, calibration).tolist()
        order = sorted(range(len(found)), key=found.__getitem__)[: draft.count]
        values = {layer.number: value for layer, value in zip(draft.layers, found, strict=True)}
        return [draft.layers[index] for index in sorted(order)], values

    def _cuts(self, program: Program, draft: Draft, calibration: Calibration | None) -> list[Cut]:
        by_weights = self.calibrates() is None and not program.is_fake
        if not self.amount or (calibration is None and not by_weights):
            return measure.choose_evenly(draft.tasks, biased=self.refit or self.score == "flap")
        return measure.choose(program, draft.tasks, calibration, self.score, refits=self.refit)

    def _chosen_by(self, calibration: Calibration | None) -> str:
        if calibration is None and self.calibrates() is not None:
            return "even spacing, for want of calibration text"
        return "block influence" if self.unit == "layers" else self.score


def _sites(draft: Draft, layers: Sequence[Layer]) -> tuple[Site, ...]:
    """Return the blocks that get smaller or go; at amount 0, where nothing does, those that could."""
    idle = not any(task.count for task in draft.tasks)
    blocks = [task.group.block for task in draft.tasks if task.count or idle]
    chosen = layers if draft.count else draft.layers
    blocks += [branch.block for layer in chosen for branch in layer.branches]
    return tuple(Site(block.layer, block.path, block.kind) for block in blocks)
