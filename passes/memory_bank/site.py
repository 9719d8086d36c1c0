"""The pass itself: its options, what it takes, and what it leaves alone."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from memc.blocks import FeedForwardBlock
from memc.errors import MemcError
from memc.pipeline import Pass, PassReport, Plan, Rejection, Site, option
from memc.program import Program
from memc.raising import find_blocks
from memc.raising.evaluate import shape
from memc.relation import Exact
from memc.rewrite import Editor
from memc.target import Target

_RANKS = re.compile(r"[0-9]+(:[0-9]+)*")
_LISTED = re.compile(r"\[\s*[0-9]+\s*(,\s*[0-9]+\s*)*\]")

PLAIN = "silu"
"""Activation of a bank's block beside a feed-forward block that has no gate, and so no activation of a gate."""


@dataclass(frozen=True)
class MemoryBank(Pass):
    """Add parameters that are fetched for each sequence to the feed-forward blocks (arXiv 2510.02375).

    Every site gets an input ``bank_LAYER [B, 3, R, C]``: for each sequence the gate, up and down projections of R
    hidden units of a gated feed-forward network of the model's width C, whose result is added to that of the block
    (``memc::bank_ffn``). R is the sum of ``ranks``: the units that a bank holds for a cluster of each level of its
    tree, the coarsest first. The activation is that of the block's own gate, ``silu`` where it has none.

    The blocks are no parameters of the program: whoever runs it gives them, and they stay with a conversation. A
    sequence that nothing is fetched for has zeros.

    Identity setting: blocks of zeros, or of down projections that are zero. What is added is a zero then, so that every
    output is that of the original, bit for bit, in any precision; the conversion checks it.

    Does not handle:

    - ``encoder``: models that are no decoders: there is no conversation to hold what is fetched.
    - ``moe``: mixtures of experts, in which every token goes its own way already.
    - ``several``: layers with more than one feed-forward block, whose input would not say which one it is for.
    - ``shape``: blocks whose input and output are not a vector of one width for each token.
    - ``banked``: layers that have a bank's block already.
    - ``kept``: layers that the option ``layers`` does not name.
    """

    name: ClassVar[str] = "memory_bank"

    kind: str = option("ffn", "what is fetched: hidden units of a gated feed-forward network", choices=("ffn",))
    ranks: str = option("256:64:16", "hidden units of each level of the bank, coarsest first; one number for one level")
    layers: str = option("all", "layers that get a block: all, or a list [0,5,7]")

    def __post_init__(self) -> None:
        """Check every option."""
        super().__post_init__()
        if not _RANKS.fullmatch(self.ranks) or not self.units:
            where, hint = f"{self.name}:ranks={self.ranks}", f"write {self.name}:ranks=256:64:16"
            raise MemcError("E203", "option 'ranks' is numbers joined by colons, not all 0", where, hint)
        if self.layers != "all" and not _LISTED.fullmatch(self.layers):
            where, hint = f"{self.name}:layers={self.layers}", f"write {self.name}:layers=[0,5,7]"
            raise MemcError("E203", "option 'layers' is all or a list of layers", where, hint)

    @property
    def levels(self) -> tuple[int, ...]:
        """Hidden units of each level."""
        return tuple(map(int, self.ranks.split(":")))

    @property
    def units(self) -> int:
        """Hidden units of a block: those of all levels."""
        return sum(self.levels)

    def plan(self, program: Program, target: Target) -> Plan:
        """Choose every feed-forward block of the layers that ``layers`` names."""
        blocks = _feed_forward(program)
        named = self._named({block.layer for block in blocks})
        counts = Counter(block.layer for block in blocks)
        sites: list[Site] = []
        rejections: list[Rejection] = []
        for block in blocks:
            refusal = _refuse(program, block, counts[block.layer])
            if refusal is None and block.layer not in named:
                refusal = ("kept", f"the option layers={self.layers} leaves this layer as it is")
            if refusal is None:
                sites.append(Site(block.layer, block.path, block.kind))
            else:
                rejections.append(Rejection(block.layer, block.path, block.kind, *refusal))
        return Plan(self.spec, tuple(sites), tuple(rejections), (Exact(),))

    def apply(self, program: Program, plan: Plan) -> tuple[Program, PassReport]:
        """Rewrite the plan's sites."""
        editor = Editor(program)
        planned = {(site.layer, site.path) for site in plan.sites}
        blocks = [block for block in _feed_forward(editor.program) if (block.layer, block.path) in planned]
        details: dict[str, Any] = {str(block.layer): self._rewrite(editor, block) for block in blocks}
        result = editor.finish()
        details["total"] = {"levels": list(self.levels), "fetched_bytes": result.fetched_bytes}
        return result, PassReport(plan.spec, plan.sites, plan.rejections, plan.relations, details=details)

    def _named(self, known: set[int]) -> set[int]:
        """Return the layers that ``layers`` names. Raises ``MemcError`` E203 for one that the model does not have."""
        if self.layers == "all":
            return known
        named = {int(number) for number in re.findall("[0-9]+", self.layers)}
        if missing := sorted(named - known):
            have = f"layers {min(known)} to {max(known)}" if known else "no feed-forward block"
            message = f"option 'layers' names layer {missing[0]}"
            raise MemcError("E203", message, f"{self.name}:layers={self.layers}", f"the model has {have}")
        return named

    def _rewrite(self, editor: Editor, block: FeedForwardBlock) -> dict[str, Any]:
        activation = block.activation if block.gate is not None else PLAIN
        fetched = editor.add_fetched(_input_name(block.layer), ("B", 3, self.units, block.width))
        flat = len(shape(block.output)) == 2

        def added(t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            x, output = t["x"], t["output"]
            rows = x.unflatten(0, (t["block"].shape[0], -1)) if flat else x
            made = torch.ops.memc.bank_ffn.default(rows, t["block"], activation)
            made = made.flatten(0, 1) if flat else made
            return (output + (made if made.dtype == output.dtype else made.to(output.dtype)),)

        inputs = {"x": block.input, "block": fetched, "output": block.output}
        (total,) = editor.insert(added, inputs, block.output.next, block.path, ("bank", activation))
        block.output.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
        size = math.prod(fetched.meta["val"].shape[1:]) * fetched.meta["val"].dtype.itemsize
        return {
            "input": _input_name(block.layer),
            "units": self.units,
            "activation": activation,
            "activation_of": "the block's gate" if block.gate is not None else "the bank, since the block has no gate",
            "fetched_bytes": size,
        }


def _input_name(layer: int) -> str:
    return f"bank_{layer}"


def _feed_forward(program: Program) -> list[FeedForwardBlock]:
    return [block for block in find_blocks(program) if isinstance(block, FeedForwardBlock)]


def _refuse(program: Program, block: FeedForwardBlock, in_layer: int) -> tuple[str, str] | None:
    if not program.model.decoder:
        return "encoder", "the model is no decoder: there is no conversation that what is fetched stays with"
    if block.kind == "moe":
        return "moe", "a mixture of experts, in which every token goes its own way already"
    if in_layer > 1:
        return "several", f"the layer has {in_layer} feed-forward blocks, and a bank one block a layer"
    if any(spec.name == _input_name(block.layer) for spec in program.inputs):
        return "banked", "the layer has a bank's block already"
    tokens, width = program.placeholders()[0].meta["val"].shape, block.width
    forms = [list(map(str, form)) for form in ((*tokens, width), (math.prod(tokens), width))]
    sizes = [list(map(str, shape(node))) for node in (block.input, block.output)]
    if sizes[0] != sizes[1] or sizes[0] not in forms:
        return "shape", f"it maps {sizes[0]} to {sizes[1]}, not a vector of {width} for each token to another"
    return None
