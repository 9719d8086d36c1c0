"""What an analysis of a model says of its units, and what ``prune`` reads of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from memc.report.facts import Facts, ModelFacts, Shown, SkippedFacts, Timing


class UnitFacts(Facts):
    """The units of one block: query heads of an attention, channels of a feed-forward network.

    ``scores`` has one of each unit, the higher the more it is what the analysis looked for; ``kept`` are the indices of
    those that make it up. ``kv_heads`` is 0 of a feed-forward network. ``context`` and ``memory`` are the effects of
    query heads in nats, with standard errors.
    """

    layer: int
    path: str
    kind: Literal["attention", "feed_forward"]
    kv_heads: int = 0
    scores: list[float]
    kept: list[int]
    context: list[float] = Field(default_factory=list)
    memory: list[float] = Field(default_factory=list)
    context_error: list[float] = Field(default_factory=list)
    memory_error: list[float] = Field(default_factory=list)


class BigramFacts(Facts):
    """How near predictions are to the model's bigram on held-out text, in nats a token.

    ``kl_whole`` is of the model as it is, ``kl_kept`` of the subnetwork alone, ``kl_none`` of none of the units,
    ``kl_random`` of as many random units of each block. ``correlation`` is Pearson's r of the surprisals of the text,
    subnetwork against bigram. ``kl_without`` is of the model without the subnetwork to itself as it is, and
    ``kl_without_random`` of the model without as many random units.
    """

    tokens: int
    share: float
    penalty: float
    steps: int
    kl_whole: float
    kl_kept: float
    kl_none: float
    kl_random: float
    correlation: float
    kl_without: float
    kl_without_random: float


class MediationFacts(Facts):
    """How the prompts were answered: share in which either answer was the likeliest token."""

    prompts: int
    favour: Literal["context", "memory"]
    share: float
    answered_context: float
    answered_memory: float


class AnalysisDocument(Shown):
    """``memc analyse``: the units of a model that make something up, for a report and for ``prune:analysis=FILE``."""

    schema_: Literal["memc.analysis/1"] = Field(default="memc.analysis/1", alias="schema")
    method: Literal["bigram", "heads"]
    model: ModelFacts
    text: str
    units: list[UnitFacts]
    left_out: list[SkippedFacts] = Field(default_factory=list)
    bigram: BigramFacts | None = None
    mediation: MediationFacts | None = None
    timing: Timing = Field(default_factory=Timing)

    def to_html(self) -> str:
        """Render the document as a page."""
        from memc.report.analysis import analysis_page

        return analysis_page(self)
