"""What pruning a program did, as its report says it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memc.passes.prune.allocate import Allocation
from memc.passes.prune.draft import Draft
from memc.passes.prune.removal import Removal
from memc.passes.prune.rewrite import Cut
from memc.pipeline import Calibration


@dataclass(frozen=True)
class Done:
    """The cuts and the blocks that went; ``scores`` of every removal that could have, and the search if there was."""

    draft: Draft
    cuts: Sequence[Cut]
    removals: Sequence[Removal]
    scores: Sequence[tuple[Removal, float]]
    score: str
    allocation: Allocation | None

    def details(self, chosen_by: str, calibration: Calibration | None) -> dict[str, Any]:
        """Render the totals, and the facts of each layer under its number."""
        removed = sum(cut.parameters for cut in self.cuts) + sum(removal.cost for removal in self.removals)
        total: dict[str, Any] = {
            "block_parameters": self.draft.parameters,
            "removed_parameters": removed,
            "removed_share": removed / max(self.draft.parameters, 1),
            "new_bias_parameters": sum(cut.new_bias for cut in self.cuts),
            "chosen_by": chosen_by,
        }
        if calibration is not None:
            total["calibration"] = f"{calibration.tokens.numel()} tokens: {calibration.origin}"
        details: dict[str, Any] = {"total": total}
        for cut in self.cuts:
            group = cut.group
            facts = details.setdefault(str(group.block.layer), {})
            facts[group.kind] = "{} -> {}".format(*cut.sizes)
            facts[f"{group.kind}_group"] = group.describe()
            facts[f"{group.kind}_removed"] = cut.places
            if group.fixed:
                what = "channels" if group.kind == "ffn_channels" else "heads"
                facts[f"protected_{what}"] = list(group.fixed)
        for removal in self.removals:
            details.setdefault(str(removal.number), {})[_what(removal)] = "removed"
        for removal, value in self.scores:
            details.setdefault(str(removal.number), {})[f"{_what(removal)}_{self.score}"] = value
        if self.allocation is not None:
            total["expected_kl"] = self.allocation.expected(self.allocation.tasks)
            total["expected_kl_uniform"] = self.allocation.expected(self.allocation.uniform)
            for curve, task in zip(self.allocation.curves, self.allocation.tasks, strict=True):
                details[str(task.group.block.layer)][f"{task.group.kind}_expected_kl"] = curve.nats(task.count)
        return details


def _what(removal: Removal) -> str:
    return "layer" if len(removal.branches) > 1 else removal.blocks[0].kind
