"""The pass itself: its options, what it takes, and what it leaves alone."""

from __future__ import annotations

import dataclasses
import math
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any, ClassVar

from torch.fx import Node

from memc.arguments import LARGEST
from memc.blocks import FeedForwardBlock
from memc.errors import MemcError
from memc.passes.memory_bank.beside import ROOT, Inserted
from memc.passes.memory_bank.engram import Engram
from memc.passes.memory_bank.fetched import fetched_name, insert_fetched
from memc.passes.memory_bank.head import Head
from memc.passes.memory_bank.product_keys import ProductKeys
from memc.passes.memory_bank.side import Side
from memc.pipeline import Pass, PassReport, Plan, Rejection, Site, option
from memc.program import Program, named_tensors
from memc.raising import find_blocks
from memc.raising.evaluate import shape
from memc.relation import Bounded, Exact, Relation
from memc.rewrite import Editor
from memc.target import Target

_RANKS = re.compile(r"[0-9]+(:[0-9]+)*")
_LISTED = re.compile(r"\[\s*[0-9]+\s*(,\s*[0-9]+\s*)*\]")
_ONE = re.compile(r"\[\s*[0-9]+\s*\]")

KINDS: dict[str, tuple[str, ...]] = {
    "ffn": ("ranks",),
    "pkm": ("slots", "freed", "heads", "row", "top"),
    "engram": ("slots", "freed", "heads", "row", "ngram"),
    "side": (),
    "head": ("depth", "mix"),
}
"""The options that each kind has beside ``layers``."""


@dataclass(frozen=True)
class MemoryBank(Pass):
    """Add memories to the feed-forward blocks: parameters of which a token, or a sequence, reads a small part.

    ``kind=ffn`` (arXiv 2510.02375): every site gets an input ``bank_LAYER [B, 3, R, C]``: for each sequence the gate,
    up and down projections of R hidden units of a gated feed-forward network of the model's width C, whose result is
    added to that of the block (``memc::bank_ffn``). R is the sum of ``ranks``: the units that a bank holds for a
    cluster of each level of its tree, the coarsest first. The activation is that of the block's own gate, ``silu``
    where it has none. The blocks are no parameters of the program: whoever runs it gives them, and they stay with a
    conversation. A sequence that nothing is fetched for has zeros.

    ``kind=pkm``: a table of ``slots`` rows of ``row`` channels, shared by all sites, of which each of ``heads`` queries
    reads the ``top`` best by product keys (Lample et al. 2019); gated and projected as in Memory+ (arXiv 2412.09764).

    ``kind=engram``: a table for each length of n-gram up to ``ngram`` and each of ``heads`` hashes, each of ``slots``
    rows of ``row`` channels, read at a hash of the last tokens (arXiv 2601.07372). The state carries those tokens.

    ``kind=side``: a side copy of the down projection of one block (``auto``: five sixths of the way up), which a
    sequence is routed to from the token on at which the copy gives something that differs by more than a threshold
    (WISE, arXiv 2405.14768). Editing gives it its values, not training; the state carries whether one is routed.

    ``kind=head``: a stack of ``depth`` gated blocks without attention on what the block of one layer (``auto``: seven
    tenths of the way up) is given, whose distribution over the vocabulary is mixed with the model's, ``mix`` of it
    (MLP Memory, arXiv 2508.01832). Its logits come on top of the model's.

    With ``freed`` a table is as large as the model was before other passes (``prune``) made it smaller: the most
    ``slots`` with which it has no more parameters than the original. The report says how many were freed and spent.

    The parameters of the last four are new and float32, called ``memc.memory_bank.*``; training teaches the tables and
    the stack the text, all else frozen. Where a sequence is cut into calls changes nothing.

    Identity setting: blocks of zeros, or of down projections that are zero; output projections that are zero, as they
    are before training; a copy that has not been edited. What is added is a zero then, or nothing, so that every output
    is that of the original, bit for bit, in any precision; the conversion checks it.

    Does not handle:

    - ``encoder``: models that are no decoders: there is no conversation to hold what is fetched.
    - ``moe``: mixtures of experts, in which every token goes its own way already.
    - ``several``: layers with more than one feed-forward block, whose input would not say which one it is for.
    - ``shape``: blocks whose input and output are not a vector of one width for each token.
    - ``banked``: layers that have a bank's block already, or models that have a memory of another kind.
    - ``kept``: layers that the option ``layers`` does not name.
    """

    name: ClassVar[str] = "memory_bank"

    kind: str = option("ffn", "what stands beside a block; pkm and engram are trained", choices=tuple(KINDS))
    ranks: str = option("256:64:16", "ffn: hidden units of each level of the bank, coarsest first, as 256:64:16 or 64")
    slots: int = option(65536, "pkm: rows, a square; engram: rows of each table, about", unit="rows", min=4)
    freed: bool = option(False, "pkm, engram: as many slots as fit into the parameters that earlier passes took out")
    heads: int = option(4, "pkm: queries of a token; engram: hashes of an n-gram", min=1, max=64)
    row: int = option(32, "pkm, engram: size of a row", unit="channels", min=1)
    top: int = option(32, "pkm: rows that a query reads", unit="rows", min=1)
    ngram: int = option(3, "engram: tokens of the longest n-gram", unit="tokens", min=2, max=8)
    depth: int = option(4, "head: blocks of the stack", unit="blocks", min=1, max=64)
    mix: float = option(0.3, "head: weight of the memory's distribution beside the model's", min=0.0, max=0.99)
    layers: str = option("auto", "all, a list [0,5,7], or auto: what is usual for the kind, all of them for ffn")

    def __post_init__(self) -> None:
        """Check every option, and those that go together."""
        super().__post_init__()
        if not _RANKS.fullmatch(self.ranks) or not self.units:
            where, hint = f"{self.name}:ranks={self.ranks}", f"write {self.name}:ranks=256:64:16"
            raise MemcError("E203", "option 'ranks' is numbers joined by colons, not all 0", where, hint)
        if self.units > LARGEST:
            where = f"{self.name}:ranks={self.ranks}"
            raise MemcError("E203", f"option 'ranks' adds up to at most {LARGEST}", where, "give fewer units")
        if self.layers not in ("all", "auto") and not _LISTED.fullmatch(self.layers):
            where, hint = f"{self.name}:layers={self.layers}", f"write {self.name}:layers=[0,5,7]"
            raise MemcError("E203", "option 'layers' is all, auto or a list of layers", where, hint)
        for spec in dataclasses.fields(self):
            own = spec.name in ("kind", "layers", *KINDS[self.kind])
            if not own and (value := getattr(self, spec.name)) != spec.default:
                where = f"{self.name}:{spec.name}={value}"
                raise MemcError("E203", f"kind={self.kind} has no {spec.name}", where, f"leave {spec.name} out")
        if self.kind in ("side", "head") and self.layers != "auto" and not _ONE.fullmatch(self.layers):
            hint = "write layers=[25]"
            raise MemcError("E203", f"kind={self.kind} takes one layer", f"{self.name}:layers={self.layers}", hint)
        if self.kind == "pkm" and (isqrt(self.slots) ** 2 != self.slots or self.top > isqrt(self.slots)):
            reason = "the rows of product keys are a square, and a query reads at most its root of them"
            raise MemcError("E203", reason, f"{self.name}:slots={self.slots},top={self.top}", "slots=65536,top=32")
        if self.freed and self.slots != type(self).slots:
            raise MemcError("E203", "freed=true says how many slots there are", self.spec, "leave out one of the two")

    @property
    def levels(self) -> tuple[int, ...]:
        """Hidden units of each level."""
        return tuple(map(int, self.ranks.split(":")))

    @property
    def units(self) -> int:
        """Hidden units of a block: those of all levels."""
        return sum(self.levels)

    def plan(self, program: Program, target: Target) -> Plan:
        """Choose the feed-forward blocks of the layers that ``layers`` names."""
        blocks = _feed_forward(program)
        counts = Counter(block.layer for block in blocks)
        refused = {block: _refuse(program, block, counts[block.layer]) for block in blocks}
        named = self._named([block.layer for block in blocks], [b.layer for b in blocks if refused[b] is None])
        sites: list[Site] = []
        rejections: list[Rejection] = []
        for block, refusal in refused.items():
            if refusal is None and block.layer not in named:
                refusal = ("kept", f"the option layers={self.layers} leaves this layer as it is")
            if refusal is None:
                sites.append(Site(block.layer, block.path, block.kind))
            else:
                rejections.append(Rejection(block.layer, block.path, block.kind, *refusal))
        return Plan(self.spec, tuple(sites), tuple(rejections), (Exact(),))

    def trained_relations(self, plan: Plan) -> tuple[Relation, ...]:
        """Say how far what the memory learned moves the model, beside that it moved nothing when it came."""
        return *plan.relations, Bounded("perplexity_ratio", None), Bounded("kl_mean", None)

    def apply(self, program: Program, plan: Plan) -> tuple[Program, PassReport]:
        """Rewrite the plan's sites."""
        editor = Editor(program)
        planned = {(site.layer, site.path) for site in plan.sites}
        blocks = [block for block in _feed_forward(editor.program) if (block.layer, block.path) in planned]
        sized = self._sized(program, [block.width for block in blocks])
        made = sized._insert(editor, blocks)
        result = editor.finish()
        details: dict[str, Any] = {str(b.layer): one.facts for b, one in zip(blocks, made, strict=True)}
        if self.kind == "ffn":
            details["total"] = {"levels": list(self.levels), "fetched_bytes": result.fetched_bytes}
        learned = tuple(dict.fromkeys(name for one in made for name in one.parameters.values()))
        count = sum(one.facts.get("new_parameters", 0) for one in made)
        if self.freed:
            details["total"] = {"freed_parameters": _freed(program), "spent_parameters": count, "slots": sized.slots}
        report = PassReport(plan.spec, plan.sites, plan.rejections, plan.relations, count, bool(learned), details)
        return result, dataclasses.replace(report, learns=learned)

    def _sized(self, program: Program, widths: Sequence[int]) -> MemoryBank:
        """Return the pass with the ``slots`` that what was freed pays for, beside blocks of such widths.

        Raises ``MemcError`` E203 where that is not enough for any.
        """
        if not self.freed:
            return self
        freed, pkm = _freed(program), self.kind == "pkm"

        def having(size: int) -> MemoryBank:
            return dataclasses.replace(self, freed=False, slots=size**2 if pkm else size)

        least = max(self.top, 2) if pkm else 4
        sizes = range(least, max(least, isqrt(freed) if pkm else freed) + 1)
        place = bisect_left(sizes, True, key=lambda size: having(size)._table().count(widths) > freed)
        if not place:
            reason = f"earlier passes freed {freed} parameters, and the smallest memory of this kind has"
            reason += f" {having(least)._table().count(widths)}"
            raise MemcError("E203", reason, self.spec, "prune more before it, or give it fewer layers or heads")
        return having(sizes[place - 1])

    def _table(self) -> ProductKeys | Engram:
        if self.kind == "pkm":
            return ProductKeys(self.slots, self.heads, self.top, self.row)
        return Engram(self.slots, self.heads, self.ngram, self.row)

    def _insert(self, editor: Editor, blocks: Sequence[FeedForwardBlock]) -> list[Inserted]:
        match self.kind:
            case "pkm":
                keys, values, made = ProductKeys(self.slots, self.heads, self.top, self.row), None, []
                for block in blocks:
                    one, values = keys.insert(editor, block, values)
                    made.append(one)
                return made
            case "engram":
                engram = Engram(self.slots, self.heads, self.ngram, self.row)
                recent: list[Node] = [engram.recent(editor, blocks[0])]
                return [engram.insert(editor, block, index, recent[0]) for index, block in enumerate(blocks)]
            case "head":
                return [Head(self.depth, self.mix).insert(editor, block) for block in blocks]
            case "side":
                return [Side().insert(editor, block) for block in blocks]
            case _:
                return [insert_fetched(editor, block, self.units) for block in blocks]

    def _named(self, known: Sequence[int], able: Sequence[int]) -> set[int]:
        """Return the layers that ``layers`` names of those ``known``; ``auto`` counts those ``able`` to be rewritten.

        Raises ``MemcError`` E203 for one that the model does not have.
        """
        if self.layers == "all" or (self.layers == "auto" and self.kind == "ffn"):
            return set(known)
        if self.layers == "auto":  # 1 and 15 of 30, and 4, 12 and 20 of 24, are those of the papers
            count, first = len(able), 0 if len(able) < 2 else 1
            usual = {"engram": (first, count // 2), "side": (5 * count // 6,), "head": (7 * count // 10,)}
            places = usual.get(self.kind, (count // 6, count // 2, 5 * count // 6))
            return {sorted(able)[place] for place in places} if able else set()
        named = {int(number) for number in re.findall("[0-9]+", self.layers)}
        if missing := sorted(named - set(known)):
            have = f"layers {min(known)} to {max(known)}" if known else "no feed-forward block"
            message = f"option 'layers' names layer {missing[0]}"
            raise MemcError("E203", message, f"{self.name}:layers={self.layers}", f"the model has {have}")
        return named


def _freed(program: Program) -> int:
    """Return how many parameters fewer a program has than its model had, 0 where it has no fewer."""
    return max(0, (program.model.parameters or 0) - program.parameter_count)


def _feed_forward(program: Program) -> list[FeedForwardBlock]:
    return [block for block in find_blocks(program) if isinstance(block, FeedForwardBlock)]


def _refuse(program: Program, block: FeedForwardBlock, in_layer: int) -> tuple[str, str] | None:
    if not program.model.decoder:
        return "encoder", "the model is no decoder: there is no conversation that what is fetched stays with"
    if block.kind == "moe":
        return "moe", "a mixture of experts, in which every token goes its own way already"
    if in_layer > 1:
        return "several", f"the layer has {in_layer} feed-forward blocks, and a bank one block a layer"
    if any(spec.name == fetched_name(block.layer) for spec in program.inputs):
        return "banked", "the layer has a bank's block already"
    if any(name.startswith(ROOT) for name, _ in named_tensors(program.module)):
        return "banked", "the model has a memory already"
    tokens, width = program.placeholders()[0].meta["val"].shape, block.width
    forms = [list(map(str, form)) for form in ((*tokens, width), (math.prod(tokens), width))]
    if any(list(map(str, shape(node))) not in forms for node in (block.input, block.output)):
        return "shape", f"it maps no vector of {width} for each token to another"
    return None
