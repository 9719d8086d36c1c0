"""Progress: how long-running work tells whoever watches what it is doing. Core code knows only this protocol."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Advance(Protocol):
    """Tells how a step goes on."""

    def __call__(self, count: int, text: str = "") -> None:
        """Say that ``count`` more units of the step's total are done, and in ``text`` how it looks."""


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
        yield unseen

    def note(self, text: str) -> None:
        """Say nothing."""


def unseen(count: int, text: str = "") -> None:
    """Advance a step that nobody watches."""
