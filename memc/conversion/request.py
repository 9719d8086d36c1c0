"""What is asked of a conversion, and the steps that it takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from memc import machine
from memc.backend import Backend
from memc.program import Program
from memc.progress import Progress
from memc.recipe import Recipe
from memc.report.facts import CONTEXTS, Timing
from memc.target import Target


@dataclass(frozen=True)
class Request:
    """Everything that was asked of a conversion. ``recipe`` is resolved: what the command line adds is in it."""

    model: str | Path | Program
    out: Path
    recipe: Recipe
    target: Target
    backend: Backend
    dry_run: bool = False
    fresh: bool = False
    force: bool = False
    threads: int | None = None
    remote_code: bool = False
    contexts: tuple[int, ...] = CONTEXTS
    tune: int = 0

    @property
    def weights(self) -> str:
        """Type of the lowered weights."""
        return self.recipe.weights or "fp32"


@dataclass
class Steps:
    """The steps of a conversion: who watches, and how long each took."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    start: float = field(default_factory=time.perf_counter)

    @contextmanager
    def step(self, name: str, title: str) -> Iterator[None]:
        """Time one step and show it."""
        begun = time.perf_counter()
        with self.progress.step(title):
            yield
        self.seconds[name] = time.perf_counter() - begun

    def timing(self, name: str) -> Timing:
        """Return what a step took, and the peak of memory so far."""
        return Timing(seconds=self.seconds.get(name, 0.0), peak_rss_bytes=machine.peak_rss_bytes())


def source_name(model: str | Path | Program) -> str:
    """Return what a model is called in messages and reports."""
    return model.model.source if isinstance(model, Program) else str(model)
