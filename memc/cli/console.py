"""The console: results to stdout, everything else to stderr; tables and progress where there is a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from memc.progress import Advance, unseen
from memc.report.text import plain

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.console import RenderableType

    from memc.report.facts import Document


LINE_SECONDS = 30.0
"""Time between two lines about a long step."""


class Console:
    """Where one command speaks. It is the ``Progress`` of everything that the command calls."""

    def __init__(self, *, json: bool = False, color: bool = True, quiet: bool = False) -> None:
        """Take the options that every command has."""
        self.json = json
        self.quiet = quiet
        self._no_color = True if not color else None
        self._open_line = False

    def rich(self, *, stderr: bool = False) -> RichConsole:
        """Make a rich console; markup and highlighting are off, so that no name of a model can style anything."""
        from rich.console import Console as RichConsole

        return RichConsole(stderr=stderr, no_color=self._no_color, highlight=False, markup=False, emoji=False)

    def show(self, document: Document, view: Callable[[], RenderableType]) -> None:
        """Print a result: the document with ``--json``, else its view."""
        if self.json:
            self.text(document.to_json() + "\n")
            return
        console = self.rich()
        with console.capture() as shown:  # rich would end the process where nobody reads it
            console.print(view())
        self.text(shown.get())

    def text(self, piece: str) -> None:
        """Write a piece of a result's text at once, as it is."""
        sys.stdout.write(piece)
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """Say something on stderr, unless quiet."""
        if not self.quiet:
            self._line(plain(text))

    def warn(self, text: str) -> None:
        """Say something on stderr that matters even when quiet."""
        self._line(f"warning: {plain(text)}")

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Advance]:
        """Show a step: a bar on a terminal, else one line with its seconds."""
        if self.quiet:
            yield unseen
        elif sys.stderr.isatty():
            with self._bar(title, total) as advance:
                yield advance
        else:
            with self._timed(title):
                yield self._lines(total) if total else unseen

    @contextmanager
    def _bar(self, title: str, total: int | None) -> Iterator[Advance]:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = [SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()]
        if total:
            columns += [TimeRemainingColumn(), TextColumn("{task.fields[text]}", markup=False)]
        began = time.perf_counter()
        with Progress(*columns, console=self.rich(stderr=True), transient=True) as bar:
            task = bar.add_task(plain(title), total=total, text="")

            def advance(count: int, text: str = "") -> None:
                bar.update(task, advance=count, text=plain(text))

            yield advance
        if (seconds := time.perf_counter() - began) >= 1:
            self._line(f"{plain(title)}: {seconds:.1f} s")

    def _lines(self, total: int) -> Advance:
        """Return what tells of a long step now and then, where there is no terminal for a bar."""
        began = told = time.perf_counter()
        done = 0

        def advance(count: int, text: str = "") -> None:
            nonlocal told, done
            done, now = done + count, time.perf_counter()
            if text and now - told >= LINE_SECONDS and done < total:
                told = now
                self._line(f"  {done} of {total}, {(now - began) / done * (total - done):.0f} s to go: {plain(text)}")

        return advance

    @contextmanager
    def _timed(self, title: str) -> Iterator[None]:
        if self._open_line:  # a step inside a step
            sys.stderr.write("\n")
        sys.stderr.write(f"{plain(title)} ... ")
        sys.stderr.flush()
        self._open_line, began = True, time.perf_counter()
        try:
            yield
        except BaseException:
            self._close_line()
            raise
        seconds = time.perf_counter() - began
        sys.stderr.write(f"{seconds:.1f} s\n" if self._open_line else f"{plain(title)}: {seconds:.1f} s\n")
        self._open_line = False

    def _close_line(self) -> None:
        if self._open_line:
            sys.stderr.write("\n")
            self._open_line = False

    def _line(self, text: str) -> None:
        self._close_line()
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
