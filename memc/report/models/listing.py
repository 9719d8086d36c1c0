"""What there is here: passes, recipes, backends, and whether they work."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from memc.report.facts import Document, Facts


class OptionFacts(Facts):
    """One option of a pass."""

    name: str
    type: str
    default: Any = None
    help: str = ""
    unit: str = ""
    min: float | None = None
    max: float | None = None
    choices: list[str] = Field(default_factory=list)


class PassRow(Facts):
    """One registered pass. ``does_not_handle`` is that list of its docstring."""

    name: str
    summary: str = ""
    options: list[OptionFacts] = Field(default_factory=list)
    does_not_handle: list[str] = Field(default_factory=list)
    available: bool = True
    reason: str = ""


class PassesDocument(Document):
    """``memc passes``."""

    schema_: Literal["memc.passes/1"] = Field(default="memc.passes/1", alias="schema")
    passes: list[PassRow]


class RecipeRow(Facts):
    """One recipe."""

    name: str
    summary: str
    passes: list[str]
    path: str


class RecipesDocument(Document):
    """``memc recipes``."""

    schema_: Literal["memc.recipes/1"] = Field(default="memc.recipes/1", alias="schema")
    recipes: list[RecipeRow]


class BackendRow(Facts):
    """One registered backend. ``lacks`` maps targets that it lowers for elsewhere to what this machine has not."""

    name: str
    available: bool
    reason: str = ""
    version: str = ""
    weights: list[str] = Field(default_factory=list)
    lacks: dict[str, str] = Field(default_factory=dict)


class CoverageRow(Facts):
    """How far one model family comes: tried on a tiny random model."""

    family: str
    captured: bool
    attention: bool
    ffn: bool
    logits: bool
    note: str = ""

    @property
    def complete(self) -> bool:
        """Whether every column is a yes."""
        return self.captured and self.attention and self.ffn and self.logits


class DoctorDocument(Document):
    """``memc doctor``. ``kernels`` maps a runtime's op to the types it has kernels for; ``coverage`` only if asked."""

    schema_: Literal["memc.doctor/1"] = Field(default="memc.doctor/1", alias="schema")
    version: str
    python: str
    machine: str
    threads: int
    packages: dict[str, str | None]
    backends: list[BackendRow]
    kernels: dict[str, list[str]] = Field(default_factory=dict)
    coverage: list[CoverageRow] | None = None
    problems: list[str] = Field(default_factory=list)
