"""What editing says."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from memc.report.facts import CheckFacts, Document, Facts


class EditFacts(Facts):
    """One edit, of one prompt or of several ``wordings``, the first of which is ``prompt``.

    ``followed``: whether its target is the likeliest after each of them; ``steps`` it took to learn. ``difference`` is
    the least activation difference of their last tokens, which the threshold is below where the edit is routed.
    """

    prompt: str
    target: str
    wordings: int = 1
    followed: bool
    steps: int
    difference: float


class EditDocument(Document):
    """``memc edit``; also written as ``report/edit.json``.

    ``kept`` is the share of ``sequences`` of unrelated text, not shown while editing, whose logits are the same bits
    as before; ``unrelated`` is the largest activation difference of those shown, ``threshold`` the one that routes.
    """

    schema_: Literal["memc.edit/1"] = Field(default="memc.edit/1", alias="schema")
    source: str
    out: str
    target: str
    backend: str
    weights: str
    edits: list[EditFacts]
    sequences: int
    kept: float
    threshold: float
    unrelated: float
    checks: list[CheckFacts] = Field(default_factory=list)
    disk_bytes: int
    seconds: float
    warnings: list[str] = Field(default_factory=list)
    next: list[str] = Field(default_factory=list)

    @property
    def followed(self) -> float:
        """Share of the edits that are followed."""
        return sum(edit.followed for edit in self.edits) / len(self.edits)
