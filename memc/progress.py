"""Progress: how long-running work tells whoever watches what it is doing. Core code knows only this protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]
"""Tells that so many units of the step's total are done."""


class Progress(Protocol):
    """Somebody who watches."""

    def step(self, title: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """Enter a step; ``total`` units of work are in it, None when that is not known."""

    def note(self, text: str) -> None:
        """Say something in passing."""


class Silent:
    """Nobody watches."""

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Advance]:
        """Enter a step without a word."""
        yield lambda count: None

    def note(self, text: str) -> None:
        """Say nothing."""
