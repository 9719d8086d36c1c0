"""The pass itself: its options, what it takes, and what it leaves alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from memc import sites
from memc.analysis.heads import head_roles
from memc.errors import MemcError
from memc.passes.prune import measure
from memc.passes.prune import removal as removing
from memc.passes.prune.allocate import allocate
from memc.passes.prune.details import Done
from memc.passes.prune.draft import REMOVED, Draft, Drafter, spaced
from memc.passes.prune.removal import Removal
from memc.passes.prune.rewrite import Cut, Pruner
from memc.pipeline import Calibration, Pass, PassReport, Plan, Site, option
from memc.program import Program
from memc.relation import Bounded, Exact, Relation
from memc.sites import listed
from memc.target import Target

OF_UNITS = ("obs", "wanda", "flap", "activation", "magnitude", "taylor", "2ssp", "analysis")
OF_KEYS = ("think", "magnitude", "taylor")
OF_BLOCKS = ("influence", "similarity", "position", "2ssp")

_LAYERS = re.compile(r"\[\s*([0-9]+\s*(,\s*[0-9]+\s*)*)?\]")


@dataclass(frozen=True)
class Prune(Pass):
    """Remove feed-forward or key channels, heads or layers, and refit what is left, without training.

    What goes is a group of dimensions that the graph couples: the rows, columns, biases, norms, slopes, sink logits and
    states that only get smaller together. The result is a program of smaller dense shapes that computes what the
    original would with those channels or heads at zero. ``score`` says which. ``obs`` takes out step by step what a fit
    of the rest misses least (ZipLM, :mod:`memc.passes.prune.eliminate`). The others take the lowest of ``wanda`` (|W|
    times the input's norm), ``flap`` (fluctuation, with a bias for the mean of what goes), ``activation`` (Minitron),
    ``magnitude``, ``taylor`` or ``2ssp``, by the formulas of :mod:`memc.passes.prune.scores`, or by those of a file.

    ``analysis`` names a file of ``memc analyse``: the units that it keeps stay, and the blocks that they are in. With
    ``score=analysis`` they are chosen by its scores instead, the lowest first.

    With ``refit`` the output and down projections get new weights and a bias by least squares over the calibration
    text, block after block: on what the model as far as it is pruned gives them, to what brings the residual stream
    back to that of the original. So each block makes up for those before it. Blocks that lose nothing stay as they are.

    ``unit=auto`` removes channels; from a third of the block parameters on, a third of the key-value heads too.
    ``unit=heads`` removes key-value heads with their query heads, or query heads where there is one key-value head.
    ``unit=key_channels`` removes channels of queries and keys, the same ones of every head of a block: pairs where a
    rotary embedding turns them together, single ones where none does. The scale of the scores stays, and so do values;
    the state of keys gets narrower. The lowest go of ``think`` (query-driven, ThinK), ``magnitude`` or ``taylor``.
    ``refit`` fits the output projection to the attention that is left; nothing makes up for the scores themselves.

    ``unit=layers`` takes whole layers out of the residual stream, ``attention_blocks`` and ``ffn_blocks`` single
    blocks. Those go that turn it least (``influence``, ShortGPT), or the layers in a row over which it turns least
    (``similarity``), those without which predictions move least, early ones counting more (``position``,
    HierarchicalPrune), or one after the other those without which perplexity stays least (``2ssp``): see
    :mod:`memc.passes.prune.removal`. What is left keeps its weights. ``unit=auto,score=2ssp`` takes channels and then
    attention blocks, as 2SSP shares them out.

    Calibration text is that of the conversion: its data, or text sampled from the original. Without it, as in planning,
    as much is removed, evenly spaced. Every block gives the same share, but for rounding: what one gives too little the
    next gives more, or with ``alike`` none does, and the sum is less exact. Block parameters are the
    weights and biases of the projections of attention and feed-forward blocks; ``of=layers`` counts those alone of
    layers that are not protected, so that several such passes can give each layer an amount of its own; ``of=units``
    counts key channels alone, of the blocks that can lose any.

    With ``allocate=search`` each block gives what the model misses least by dynamic programming over the sizes that it
    can have, up to ``most`` times the uniform share: :mod:`memc.passes.prune.curves` tells what each size is expected
    to lose. The result has no more parameters, FLOPs and bytes to read for a token (after ``length``) than a uniform
    spread, which is what planning without calibration text shows. What a block loses is measured on text, which seldom
    asks for what stood earlier: the further blocks are from a uniform share, the more of recall is lost, most of all
    where key-value heads go, which with ``unit=auto`` and less than a third to remove is with ``most=0`` alone.

    What is lost can be recovered: a conversion with data trains adapters on the projections that are left.

    Identity setting: ``amount=0``, bit for bit. Beyond, the perplexity ratio is measured and nothing is promised.

    Does not handle:

    - ``encoder``: models that are no decoders.
    - ``fetched``: models with inputs that are fetched (``memory_bank``), made for the blocks as they are.
    - ``moe``: mixtures of experts, whose channels are chosen as they run.
    - ``protected``: the first and the last layer, or those that the option ``protect`` names, and heads that
      ``protect_heads`` names or finds, with the attention block and the layer that they are in; units that a file of
      ``analysis`` keeps, with their block where blocks or key channels go.
    - ``norm``: heads or channels under a norm that runs over all of them; key channels under one that runs over a
      head's, which would divide what is left by another mean.
    - ``shared``: dimensions, weights or states that another block reads too.
    - ``mixed``, ``conflict``, ``size``: dimensions that are laid out among others, twice, or computed with; key
      channels of a fused projection that lie on one axis with those of values.
    - ``unknown_op``: dimensions that reach an op which may mix them.
    - ``no_exit``, ``no_residual``: dimensions that no projection ends, blocks that are not added to a residual stream.
    - ``single``: attention with a single head, where heads are asked for, or a single key channel or pair.
    """

    name: ClassVar[str] = "prune"

    amount: float = option(0.25, "share to remove, of what the option of says", min=0.0, max=0.95)
    unit: str = option("auto", "what is removed", choices=("auto", "ffn", "heads", "key_channels", *REMOVED))
    score: str = option(
        "auto",
        f"what is chosen by: {', '.join(OF_UNITS)} of channels and heads; {', '.join(OF_KEYS)} of key channels;"
        f" {', '.join(OF_BLOCKS)} of blocks and layers",
        choices=tuple(dict.fromkeys(("auto", *OF_UNITS, *OF_KEYS, *OF_BLOCKS))),
    )
    refit: bool = option(
        True,
        "fit the projections behind what was removed, by least squares; of key channels the output projection alone,"
        " as no fit makes up for scores",
    )
    bias: bool = option(
        True,
        "projections whose inputs go get a bias where they have none, by the refit or score=flap; false where the model"
        " is to be exported and its configuration has no field for one",
    )
    round: int = option(
        64, "channels stay in multiples of this, key channels of 8 where it is more", unit="channels", min=1
    )
    alike: bool = option(False, "every layer loses as much, to the nearest round, so that it can be exported")
    of: str = option(
        "auto",
        "what amount is a share of: the block parameters of the model, those of the layers that are not protected, or"
        " of key channels the units themselves; auto: units of key channels, else model",
        choices=("auto", "model", "layers", "units"),
    )
    allocate: str = option(
        "uniform", "each block gives the same share, or what a search finds best", choices=("uniform", "search")
    )
    most: float = option(
        1.5,
        "times the uniform share that a block gives at most with allocate=search, 1 or more; 0 for no limit, and"
        " key-value heads with unit=auto: less perplexity is lost, and more of recall",
        min=0.0,
    )
    protect: str = option("ends", "layers that stay as they are: ends (first and last), none, or a list [0,28,29]")
    protect_heads: str = option(
        "heads:5%",
        "key-value heads that stay, and the blocks that they are in: heads:P%, the P percent whose query heads look up"
        " earlier tokens most, heads:[3.0,3.2] as LAYER.HEAD, or none",
    )
    analysis: str = option(
        "none", "file of memc analyse whose kept units stay, or by whose scores units go with score=analysis"
    )
    sequences: int = option(128, "most calibration sequences", unit="sequences", min=1)
    length: int = option(512, "tokens of a calibration sequence", unit="tokens", min=2)

    def __post_init__(self) -> None:
        """Check every option."""
        super().__post_init__()
        if self.protect not in ("ends", "none") and not _LAYERS.fullmatch(self.protect):
            where, hint = f"{self.name}:protect={self.protect}", f"write {self.name}:protect=[0,28,29]"
            raise MemcError("E203", "option 'protect' is ends, none or a list of layers", where, hint)
        if self.protect_heads != "none" and not sites.check_heads(self.name, self.protect_heads, "protect_heads"):
            where, hint = f"{self.name}:protect_heads={self.protect_heads}", f"write {self.name}:protect_heads=heads:5%"
            raise MemcError("E203", "option 'protect_heads' is none, heads:P% or a list of heads", where, hint)
        self._require_score()
        if self.of == "units" and self.unit != "key_channels":
            raise MemcError("E203", f"of=units counts key channels, not unit={self.unit}", self.spec, "of=model")
        if self.allocate == "search":
            self._require_searchable()

    def _require_score(self) -> None:
        """Refuse a score that does not tell the units of this kind apart."""
        known = OF_BLOCKS if self.unit in REMOVED else OF_KEYS if self.unit == "key_channels" else OF_UNITS
        what = f"unit={self.unit}"
        if self.score != "auto" and self.score not in known:
            reason = f"score={self.score} says nothing of {what}"
            raise MemcError("E203", reason, self.spec, f"{what} takes score={', '.join(('auto', *known))}")
        if self.score == "analysis" and self.analysis == "none":
            raise MemcError("E203", "score=analysis goes by a file, which is not given", self.spec, "add analysis=FILE")
        if self.score == "similarity" and self.unit != "layers":
            raise MemcError("E203", "score=similarity is of whole layers in a row", self.spec, "write unit=layers")
        if self.score == "2ssp" and self.unit == "heads":
            reason = "score=2ssp is of channels and of blocks, not of heads"
            raise MemcError("E203", reason, self.spec, "unit=auto does both of its stages")

    def _require_searchable(self) -> None:
        """Refuse what a search has no curves for, and a limit under what a uniform spread takes."""
        if 0 < self.most < 1:
            raise MemcError("E203", "under its uniform share no block can give", self.spec, "most=1 or more, or most=0")
        for name, value, clashes in (
            ("unit", self.unit, self.unit in (*REMOVED, "key_channels")),
            ("score", self.score, self.score == "2ssp"),
            ("refit", "false", not self.refit),
            ("alike", "true", self.alike),
        ):
            if clashes:
                reason = f"allocate=search weighs what refitted groups of any size lose, and {name}={value}"
                raise MemcError("E203", reason, self.spec, f"leave out allocate=search or {name}={value}")

    def calibrates(self) -> tuple[int, int] | None:
        """Ask for sequences where the score or the refit looks at what the model does."""
        unseen = self._score in measure.WITHOUT_TEXT and not self.refit
        return None if unseen or not self.amount else (self.sequences, self.length)

    def quickens(self) -> bool:
        """Promise that a token takes no more time, where anything is removed."""
        return self.amount > 0

    def offers(self) -> tuple[Prune, ...]:
        """Offer to remove from single layers key-value heads, or channels: so much of the layer's block parameters.

        Heads come first, as their number is then that of the layer as it was.
        """
        setting = replace(self, of="layers", alike=True, protect="none", sequences=12)
        heads = replace(setting, unit="heads", amount=0.08, protect_heads="none")
        return heads, *(replace(setting, unit="ffn", amount=amount) for amount in (0.1, 0.25))

    def keeps_form(self) -> bool:
        """Say so where a block is only made smaller."""
        return self.unit not in REMOVED

    def only(self, layers: Collection[int], present: Collection[int]) -> Prune:
        """Return the pass protecting every other layer."""
        return replace(self, protect=listed(set(present) - set(layers)) if set(present) - set(layers) else "none")

    def one_by_one(self, program: Program, plan: Plan) -> Iterator[tuple[int, Program]]:
        """Cut each layer alone, fitted to what it did itself: the others stay, so that there is nothing to make up for.

        Raises ``MemcError`` E207 as :meth:`apply`, and ``TypeError`` where layers are weighed against each other.
        """
        if self.unit in REMOVED or self.allocate == "search":
            raise TypeError(f"unit={self.unit}, allocate={self.allocate} weigh layers against each other")
        draft, wanted = self.draft(program), {site.layer for site in plan.sites}
        tasks = [task for task in draft.tasks if task.group.block.layer in wanted]
        cuts = dict[int, list[Cut]]()
        if plan.calibration is not None:
            measure.require_usable(plan.calibration, tasks, refits=self.refit)
        given = (tasks, plan.calibration, self._score)
        for cut in measure.choose_apart(program, *given, refits=self.refit, biases=self.bias):
            cuts.setdefault(cut.group.block.layer, []).append(cut)
            layer = cut.group.block.layer
            if len(cuts[layer]) == sum(task.group.block.layer == layer for task in tasks):
                yield layer, Pruner(program).run(cuts.pop(layer))

    def plan(self, program: Program, target: Target) -> Plan:
        """Settle how much of which block goes."""
        draft = self.draft(program)
        relations: tuple[Relation, ...] = (Bounded("perplexity_ratio", None),) if self.amount else (Exact(),)
        return Plan(self.spec, _sites(draft, spaced(draft.removals, draft.count)), draft.rejections, relations)

    def apply(self, program: Program, plan: Plan) -> tuple[Program, PassReport]:
        """Choose what goes and remove it."""
        draft, allocation = self.draft(program), None
        if plan.calibration is not None:
            measure.require_usable(plan.calibration, draft.tasks, refits=self.refit)
            if self.allocate == "search" and self.amount:
                given = (plan.calibration, self._score, self.round, self.length)
                (allocation,) = allocate(program, [draft.tasks], *given, most=self.most, biases=self.bias)
                draft = replace(draft, tasks=allocation.tasks)
        cuts = self._cuts(program, draft, plan.calibration)
        removals, scores = self._removals(program, draft, plan.calibration, cuts)
        result = Pruner(program).run(cuts, [branch for one in removals for branch in one.branches])
        done = Done(draft, cuts, removals, scores, self._score, allocation)
        details = done.details(self._chosen_by(plan.calibration), plan.calibration)
        sites, recovers = _sites(draft, removals), self.amount > 0
        report = PassReport(plan.spec, sites, plan.rejections, plan.relations, details=details, recovers=recovers)
        return result, report

    def resolve(self, program: Program, target: Target) -> tuple[Prune, dict[str, Any]]:
        """Name the heads that ``protect_heads=heads:P%`` protects, by their scores on repeated random tokens."""
        share = sites.heads_share(self.protect_heads)
        if share is None or program.is_fake or not self.amount or not program.model.decoder:
            return self, {}
        blocks = self._drafter(program).open
        if not blocks:
            return self, {}
        roles = head_roles(program)
        kept = roles.best(share, [(block.layer, block.path) for block in blocks])
        return replace(self, protect_heads=sites.listed_groups(kept)), {"heads": roles.to_json(kept)}

    def draft(self, program: Program) -> Draft:
        """Settle how much goes where; needs no weights."""
        return self._drafter(program).draft()

    def _drafter(self, program: Program) -> Drafter:
        return Drafter(
            program=program,
            spec=self.spec,
            amount=self.amount,
            unit=self.unit,
            score=self._score,
            multiple=self.round,
            protect=self.protect,
            protect_heads=self.protect_heads,
            alike=self.alike,
            of=self._of,
            free=self.allocate == "search" and not self.most,
            analysis=self.analysis,
        )

    @property
    def _score(self) -> str:
        """What ``score=auto`` stands for."""
        if self.score != "auto":
            return self.score
        return "influence" if self.unit in REMOVED else "think" if self.unit == "key_channels" else "obs"

    @property
    def _of(self) -> str:
        """What ``of=auto`` stands for."""
        if self.of != "auto":
            return self.of
        return "units" if self.unit == "key_channels" else "model"

    def _removals(
        self, program: Program, draft: Draft, calibration: Calibration | None, cuts: Sequence[Cut]
    ) -> tuple[list[Removal], list[tuple[Removal, float]]]:
        """Return what is taken out whole, and the score of everything that could be (of runs, under their first)."""
        if not draft.count or calibration is None:
            return spaced(draft.removals, draft.count), []
        given = (program, draft.groups, draft.removals, draft.count, self._score, calibration, cuts)
        chosen, values = removing.choose(*given)
        scored = draft.removals
        if self._score == "similarity":
            scored = tuple(draft.removals[run[0]] for run in removing.runs(draft.removals, draft.count))
        return [draft.removals[index] for index in chosen], list(zip(scored, values, strict=True))

    def _cuts(self, program: Program, draft: Draft, calibration: Calibration | None) -> list[Cut]:
        by_weights = self.calibrates() is None and not program.is_fake
        if not self.amount or (calibration is None and not by_weights):
            return measure.choose_evenly(draft.tasks, biased=self.bias and (self.refit or self._score == "flap"))
        given = (draft.tasks, calibration, self._score)
        return measure.choose(program, *given, refits=self.refit, biases=self.bias)

    def _chosen_by(self, calibration: Calibration | None) -> str:
        if calibration is None and self.calibrates() is not None:
            return "even spacing, for want of calibration text"
        return self._score


def _sites(draft: Draft, removals: Sequence[Removal]) -> tuple[Site, ...]:
    """Return the blocks that get smaller or go; at amount 0, where nothing does, those that could."""
    idle = not any(task.count for task in draft.tasks) and not draft.count
    blocks = [task.group.block for task in draft.tasks if task.count or idle]
    blocks += [block for removal in (draft.removals if idle else removals) for block in removal.blocks]
    return tuple(Site(block.layer, block.path, block.kind) for block in blocks)
