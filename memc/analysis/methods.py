"""The analyses that ``memc analyse`` offers, with their options, and the document that each makes of a program."""

from __future__ import annotations

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from memc.analysis.bigram import bigram_table, learn_mask, measure_mask, split_rows
from memc.analysis.mediation import PASSAGE, LayerEffects, make_prompts, mediation
from memc.analysis.units import BlockUnits, refusals, units_of
from memc.conversion.facts import model_facts
from memc.errors import MemcError
from memc.machine import peak_rss_bytes
from memc.options import Configurable, option, split_spec
from memc.plugins import did_you_mean
from memc.program import Program
from memc.progress import Progress
from memc.report.facts import SkippedFacts, Timing
from memc.report.models import AnalysisDocument, BigramFacts, MediationFacts, UnitFacts
from memc.verify.text import sample_text

BLOCKS = ("attention", "feed_forward")
"""Kinds of blocks that have units."""

DIGITS = 5
"""Digits after the point that scores are written with."""


@dataclass(frozen=True)
class Analysis(Configurable, ABC):
    """One analysis: a frozen dataclass whose fields are its options."""

    noun: ClassVar[str] = "analysis"

    @property
    @abstractmethod
    def text(self) -> tuple[int, int]:
        """Most sequences of data that it looks at, and their tokens."""

    @abstractmethod
    def run(self, program: Program, data: Tensor | None, progress: Progress) -> AnalysisDocument:
        """Analyse a raised program with weights on ``data [N,T]``, or on text of its own.

        Raises ``MemcError``: E208 for a model that it says nothing of, E307 where no block has units, E207 for too
        little text, E403 for values that are not finite.
        """


@dataclass(frozen=True)
class Bigram(Analysis):
    """Find the subnetwork that predicts by the current token alone (:mod:`memc.analysis.bigram`)."""

    name: ClassVar[str] = "bigram"

    penalty: float = option(1.0, "nats a token that all units being open costs", unit="nats", min=0.0)
    steps: int = option(200, "steps of the mask", unit="steps", min=1)
    batch: int = option(4, "sequences of a step", unit="sequences", min=1)
    sequences: int = option(64, "most sequences, a quarter of them held out", unit="sequences", min=2)
    length: int = option(32, "tokens of a sequence", unit="tokens", min=2)

    @property
    def text(self) -> tuple[int, int]:
        """The options that say so."""
        return self.sequences, self.length

    def run(self, program: Program, data: Tensor | None, progress: Progress) -> AnalysisDocument:
        """Learn the mask and compare what it keeps with the model's bigram on held-out sequences."""
        began, units = time.perf_counter(), units_of(program)
        origin = "data"
        if data is None:
            with progress.step("sample text"):
                made = sample_text(program, seed=1, sequences=self.sequences, length=self.length)
            data, origin = made.tokens, made.origin
        table, rows = bigram_table(program, data)
        learned, held = split_rows(data)
        given = (program, units, data[learned], table, rows[learned])
        mask = learn_mask(*given, penalty=self.penalty, steps=self.steps, batch=self.batch, progress=progress)
        with progress.step("measure the subnetwork"):
            fit = measure_mask(program, mask, data[held], table, rows[held])
        measured = {f"kl_{name}": value for name, value in dataclasses.asdict(fit).items() if name not in _AS_THEY_ARE}
        facts = BigramFacts(
            tokens=fit.tokens,
            correlation=fit.correlation,
            share=mask.share,
            penalty=self.penalty,
            steps=self.steps,
            **measured,
        )
        kept = [_facts(one, scores, scores > 0) for one, scores in zip(units, mask.scores, strict=True)]
        return _document(program, BLOCKS, origin, kept, began, method="bigram", bigram=facts)


_AS_THEY_ARE = ("tokens", "correlation")
"""Fields of a fit that are no divergence."""


@dataclass(frozen=True)
class Heads(Analysis):
    """Tell heads that carry what was read from those that carry what was learned (:mod:`memc.analysis.mediation`)."""

    name: ClassVar[str] = "heads"

    favour: Literal["context", "memory"] = option(
        "context", "heads that are kept: those of the context, or of memory", choices=("context", "memory")
    )
    share: float = option(0.05, "share of all query heads that is kept at most", min=0.0, max=1.0)
    prompts: int = option(32, "prompts", unit="prompts", min=2)

    @property
    def text(self) -> tuple[int, int]:
        """Passages of data, of which those are used that the model is surest to go on from."""
        return 8 * self.prompts, PASSAGE

    def run(self, program: Program, data: Tensor | None, progress: Progress) -> AnalysisDocument:
        """Patch the paths of all heads on prompts that contradict what the model would say."""
        began, units = time.perf_counter(), units_of(program, kinds=BLOCKS[:1])
        with progress.step("make prompts"):
            prompts = make_prompts(program, self.prompts, data)
        found = mediation(program, units, prompts, progress)
        origin = "passages sampled from the model" if data is None else "passages of data"
        facts = MediationFacts(
            prompts=found.prompts,
            favour=self.favour,
            share=self.share,
            answered_context=found.answered_context,
            answered_memory=found.answered_memory,
        )
        kept = found.best(self.favour, self.share)
        heads = [_head_facts(one, chosen, self.favour) for one, chosen in zip(found.layers, kept, strict=True)]
        return _document(program, BLOCKS[:1], origin, heads, began, method="heads", mediation=facts)


METHODS: dict[str, type[Analysis]] = {method.name: method for method in (Bigram, Heads)}


def parse_analysis(spec: str) -> Analysis:
    """Build an analysis from ``name`` or ``name:option=value,...``. Raises ``MemcError`` E202 and E203."""
    name, options = split_spec(spec)
    if name not in METHODS:
        raise MemcError("E202", f"unknown analysis {name!r}", "--method", did_you_mean(name, METHODS))
    return METHODS[name].from_options(options)


def _document(
    program: Program, kinds: Sequence[str], text: str, units: list[UnitFacts], began: float, **own: Any
) -> AnalysisDocument:
    """Put together what every analysis says and its ``own`` fields."""
    return AnalysisDocument(
        model=model_facts(program),
        text=text,
        units=units,
        left_out=[SkippedFacts(**dataclasses.asdict(rejection)) for rejection in refusals(program, kinds)],
        timing=Timing(seconds=time.perf_counter() - began, peak_rss_bytes=peak_rss_bytes()),
        **own,
    )


def _facts(units: BlockUnits, scores: Tensor, kept: Tensor) -> UnitFacts:
    block = units.block
    return UnitFacts(
        layer=block.layer,
        path=block.path,
        kind="feed_forward" if block.kind == "feed_forward" else "attention",
        kv_heads=units.kv_heads,
        scores=_rounded(scores),
        kept=kept.nonzero()[:, 0].tolist(),
    )


def _head_facts(layer: LayerEffects, kept: Tensor, favour: str) -> UnitFacts:
    sign = 1.0 if favour == "context" else -1.0
    effects = {name: _rounded(getattr(layer, name)) for name in _EFFECTS}
    return _facts(layer.units, sign * layer.preference, kept).model_copy(update=effects)


def _rounded(values: Tensor) -> list[float]:
    return [round(value, DIGITS) for value in values.tolist()]


_EFFECTS = ("context", "memory", "context_error", "memory_error")
"""Fields of the effects of a layer's heads, in the document too."""
