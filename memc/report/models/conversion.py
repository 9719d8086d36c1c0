"""What converting, inspecting, lowering and exporting say."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from memc.report.facts import (
    BlockFacts,
    CheckFacts,
    Document,
    Facts,
    ModelFacts,
    NearMissFacts,
    RelationFacts,
    SiteFacts,
    SkippedFacts,
)
from memc.report.files import FitFacts, TrainingFacts


class ByContext(Facts):
    """What of a program's cost depends on the context, predicted.

    ``bytes_read_per_token`` counts weights and state; ``decode_ms``, of a token after so many, and ``prefill_ms``, of a
    prompt of so many, are the roofline: the slower of computing and reading, plus launches.
    """

    bytes_read_per_token: dict[int, float] = Field(default_factory=dict)
    decode_ms: dict[int, float] = Field(default_factory=dict)
    prefill_ms: dict[int, float] = Field(default_factory=dict)
    state_bytes: dict[int, int] = Field(default_factory=dict)


class Predicted(ByContext):
    """Cost of a program on a target, predicted. ``flops_per_token`` is at the shortest context.

    ``fetched_bytes`` are fetched for a conversation, once, and read for each of its tokens, among
    ``bytes_read_per_token``. ``seconds`` is the time of the conversion itself.
    """

    parameters: int
    flops_per_token: float
    flops_by_context: dict[int, float] = Field(default_factory=dict)
    weight_bytes: int = 0
    fetched_bytes: int = 0
    peak_rss_bytes: int | None = None
    disk_bytes: int | None = None
    seconds: float | None = None


class Measured(Facts):
    """What the conversion measured, which ended ``at`` that time (ISO 8601, UTC).

    ``decode_ms`` is of a token after random states, ``original_decode_ms`` of the original's, lowered alike, where that
    was timed in turns with it: with one thread time of the processor, else of the wall.
    ``steps`` has the seconds of capture, raise, each pass, lower and verify.
    """

    parameters: int | None = None
    decode_ms: dict[int, float] = Field(default_factory=dict)
    original_decode_ms: dict[int, float] = Field(default_factory=dict)
    state_bytes: dict[int, int] = Field(default_factory=dict)
    peak_rss_bytes: int | None = None
    disk_bytes: int | None = None
    seconds: float | None = None
    at: str = ""
    steps: dict[str, float] = Field(default_factory=dict)


class PassFacts(Facts):
    """One pass of a conversion. ``sites`` is how many blocks it rewrites; ``rewritten`` lists them.

    ``relation``, ``value`` and ``budget`` repeat the last of ``relations``, which is the one that bounds quality.
    ``trains`` are the stages of training that a conversion has in store for it; ``training`` is what came of them, None
    for what was not trained.
    """

    spec: str
    sites: int
    rewritten: list[SiteFacts] = Field(default_factory=list)
    skipped: list[SkippedFacts] = Field(default_factory=list)
    relation: str = ""
    value: float | None = None
    budget: float | None = None
    relations: list[RelationFacts] = Field(default_factory=list)
    new_parameters: int = 0
    untrained: bool = False
    trains: list[str] = Field(default_factory=list)
    training: TrainingFacts | None = None
    seconds: float | None = None
    resumed: bool = False


class InspectDocument(Document):
    """``memc inspect``."""

    schema_: Literal["memc.inspect/1"] = Field(default="memc.inspect/1", alias="schema")
    model: ModelFacts
    blocks: list[BlockFacts]
    near_misses: list[NearMissFacts] = Field(default_factory=list)
    state_bytes: dict[int, int] = Field(default_factory=dict)
    bytes_read_per_token: dict[int, float] = Field(default_factory=dict)
    flops_per_token: float = 0.0
    flops_by_context: dict[int, float] = Field(default_factory=dict)
    warnings: list[str] = Field(default_factory=list)


class ConvertDocument(Document):
    """``memc convert``; also written as ``report/convert.json`` of the artifact.

    ``original`` is the prediction for the unrewritten program on the same target; ``curves`` have both sides,
    ``original`` and ``converted``, at many contexts. ``untrained`` is true when a pass made parameters that nothing has
    trained, or another function that the model has not been trained for. ``fit`` tells how limits were kept, where they
    chose the passes. ``command`` makes the same again, ``next`` lists commands to type.
    """

    schema_: Literal["memc.convert/1"] = Field(default="memc.convert/1", alias="schema")
    out: str
    target: str
    backend: str
    weights: str = "fp32"
    context: int | None = None
    dry_run: bool = False
    model: ModelFacts | None = None
    passes: list[PassFacts] = Field(default_factory=list)
    fit: FitFacts | None = None
    original: Predicted | None = None
    predicted: Predicted
    curves: dict[str, ByContext] = Field(default_factory=dict)
    measured: Measured | None = None
    checks: list[CheckFacts] = Field(default_factory=list)
    verified: bool = False
    untrained: bool = False
    forms: dict[str, str] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    seed: int = 0
    threads: int | None = None
    machine: str = ""
    command: str = ""
    remote_code: bool = False
    warnings: list[str] = Field(default_factory=list)
    next: list[str] = Field(default_factory=list)

    @property
    def caveats(self) -> list[str]:
        """What to know before the result is used, though it is verified."""
        ran = any(check.name.startswith("lowered") for check in self.checks)
        unrun = self.verified and not self.dry_run and not ran
        found = ["what was lowered has not been run: this machine is no such hardware"] if unrun else []
        if self.untrained:
            functions = [item.spec for item in self.passes if item.untrained and not item.new_parameters]
            what = (
                f"{functions[0]} is another function, for which the model has" if functions else "new parameters have"
            )
            found.append(f"untrained: {what} not been trained")
        return found


class LowerDocument(Document):
    """``memc lower``; also written as ``report/lower.json``. ``forms`` tells what each dialect op was lowered to.

    ``checks`` compare with the artifact it was made from; they are empty where the target cannot run here.
    """

    schema_: Literal["memc.lower/1"] = Field(default="memc.lower/1", alias="schema")
    source: str
    out: str
    target: str
    backend: str
    weights: str
    capacity: int | None = None
    forms: dict[str, str] = Field(default_factory=dict)
    checks: list[CheckFacts] = Field(default_factory=list)
    disk_bytes: int
    seconds: float
    next: list[str] = Field(default_factory=list)


class ExportDocument(Document):
    """``memc export``. ``changed`` are the fields of the configuration that differ from the source's: old and new."""

    schema_: Literal["memc.export/1"] = Field(default="memc.export/1", alias="schema")
    source: str
    out: str
    changed: dict[str, list[Any]] = Field(default_factory=dict)
    parameters: int
    checks: list[CheckFacts] = Field(default_factory=list)
    disk_bytes: int
    seconds: float
    next: list[str] = Field(default_factory=list)
