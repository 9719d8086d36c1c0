"""The JSON documents of what works on artifacts and machines: targets, calibration, serving, completion, comparing."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from memc.report.facts import Document, Facts, Shown


class TargetRow(Facts):
    """One target. ``reason`` says why it is not ``available`` here."""

    name: str
    description: str
    kind: str
    backend: str
    instruction_set: str
    memory_bytes: int | None = None
    memory_bandwidth: float | None = None
    flops: dict[str, float] = Field(default_factory=dict)
    available: bool
    reason: str = ""


class TargetsDocument(Document):
    """``memc targets``."""

    schema_: Literal["memc.targets/1"] = Field(default="memc.targets/1", alias="schema")
    targets: list[TargetRow]


class TargetRates(Facts):
    """What predictions are made with, per core: bytes and operations per second, and seconds of a launch."""

    memory_bandwidth: float | None = None
    state_bandwidth: float | None = None
    disk_bandwidth: float | None = None
    flops: dict[str, float] = Field(default_factory=dict)
    prompt_flops: dict[str, float] = Field(default_factory=dict)
    prompt_ops: dict[str, float] = Field(default_factory=dict)
    launch_overhead: float = 0.0


class CalibrateDocument(Document):
    """``memc targets calibrate``: the rates of the target ``cpu`` as they were and as they are in ``path`` now."""

    schema_: Literal["memc.calibrate/1"] = Field(default="memc.calibrate/1", alias="schema")
    path: str
    machine: str
    threads: int
    seconds: float
    before: TargetRates
    after: TargetRates


class ServeDocument(Document):
    """``memc serve``, once it listens. ``url`` is what clients take for a base; ``model`` is its name there."""

    schema_: Literal["memc.serve/1"] = Field(default="memc.serve/1", alias="schema")
    artifact: str
    url: str
    model: str


class CompletionDocument(Document):
    """``memc completion``."""

    schema_: Literal["memc.completion/1"] = Field(default="memc.completion/1", alias="schema")
    shell: str
    script: str


class CompareRow(Facts):
    """One artifact beside others. Costs are predicted; ``perplexity_ratio`` and ``kl_mean`` are to its original.

    ``text`` is what they were measured on. ``fronts`` names the sizes for which no other is as small and as near.
    """

    out: str
    source: str = ""
    digest: str = ""
    passes: list[str] = Field(default_factory=list)
    weights: str = ""
    finished: bool = False
    stopped: str = ""
    verified: bool = False
    parameters: int | None = None
    state_bytes: int | None = None
    bytes_read_per_token: float | None = None
    decode_ms: float | None = None
    text: str = ""
    perplexity_ratio: float | None = None
    kl_mean: float | None = None
    fronts: list[str] = Field(default_factory=list)


class CompareDocument(Shown):
    """``memc report compare``: artifacts in the order they were given, at one ``context``."""

    schema_: Literal["memc.compare/1"] = Field(default="memc.compare/1", alias="schema")
    context: int | None
    rows: list[CompareRow]
    warnings: list[str] = Field(default_factory=list)

    def to_html(self) -> str:
        """Render the comparison as one page, which needs no network."""
        from memc.report.pictures import compare_page

        return compare_page(self)
