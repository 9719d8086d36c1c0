"""The check of what raising made of a model, before anything is rewritten: the same logits as the captured graph's."""

from __future__ import annotations

from dataclasses import replace

from memc.blocks import AttentionBlock, Chunked, SlidingWindow
from memc.program import Program
from memc.raising import find_blocks
from memc.relation import Close
from memc.verify import CheckResult, VerificationText, check_relation

TOLERANCE = 1e-4
"""Most that raising may change a logit, or ten times the noise floor where that is more."""

TOKENS = 33
"""Tokens of the longest sequence that is compared, and by how many it goes past a window."""

LONGEST = 512
"""The longest window that a sequence is to go past: beyond, the captured graph takes too long, and masks are only
classified, at lengths past any window that they name."""


def check_raising(raw: Program, raised: Program, text: VerificationText, floor: float) -> CheckResult:
    """Compare logits of the captured graph with those of the raised program; ``floor`` is the noise floor of these."""
    relation = Close(max(TOLERANCE, 10 * floor), tokens=compared_tokens(raised))
    return replace(check_relation(raw, raised, relation, text, floor=floor), name="raised_logits")


def compared_tokens(raised: Program) -> int:
    """Return the length of the longest sequence that is compared: past every window and chunk that is not too long."""
    masks = [block.mask for block in find_blocks(raised) if isinstance(block, AttentionBlock)]
    sizes = [mask.size for mask in masks if isinstance(mask, SlidingWindow | Chunked) and mask.size <= LONGEST]
    return max(sizes, default=0) + TOKENS
