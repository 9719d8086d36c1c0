"""Parts of the terminal view: text that is safe to print, tables, and parts below each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from memc.report.text import plain

Cell = str | Text


def text(value: str, style: str = "") -> Text:
    """Make printable text of a foreign string."""
    return Text(plain(value), style)


FOLDED = 10
"""Characters down to which a column of words may be narrowed: longer words are folded there."""

GAP = 3
"""Characters between two columns of a table."""


@dataclass(frozen=True)
class Columns:
    """A table; where the terminal is too narrow for it, each row by itself, a line to a column."""

    titles: tuple[str, ...]
    rows: tuple[tuple[Text, ...], ...]
    least: Mapping[int, int]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the form that shows every figure whole: Rich would cut them without a word."""
        if self._narrowest() <= options.max_width:
            yield self._table()
            return
        for row in self.rows:
            for number, (title, cell) in enumerate(zip(self.titles, row, strict=True)):
                if cell.plain:
                    title = title.removeprefix(">")
                    told = Text.assemble(text(f"{title}: " if title and number else ""), cell, overflow="fold")
                    yield Padding(told, (0, 0, 0, 2 if number else 0))

    def _narrowest(self) -> int:
        """Return the fewest characters in which no figure is cut and no short word folded."""
        widths = (self._least(number) for number in range(len(self.titles)))
        return sum(widths) + GAP * (len(self.titles) - 1)

    def _least(self, number: int) -> int:
        """Return the fewest characters of a column: of figures all, and of words the longest, or what is folded."""
        if number in self.least:
            return self.least[number]
        shown = [self.titles[number].removeprefix(">"), *(row[number].plain for row in self.rows)]
        if self.titles[number].startswith(">"):
            return max(map(cell_len, shown))
        return min(FOLDED, max((cell_len(word) for piece in shown for word in piece.split()), default=0))

    def _table(self) -> Table:
        made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1), header_style="bold")
        for number, title in enumerate(self.titles):
            right, least = title.startswith(">"), self.least.get(number)
            whole = right if least is None else all(cell_len(row[number].plain) <= least for row in self.rows)
            made.add_column(
                text(title.removeprefix(">")),
                justify="right" if right else "left",
                no_wrap=whole,
                min_width=least,
                overflow="fold",
            )
        for row in self.rows:
            made.add_row(*row)
        return made


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]], *, least: Mapping[int, int] | None = None) -> Columns:
    """Make a plain table; a column whose title starts with ``>`` is right-aligned, and not folded.

    ``least`` are the columns, by number, that are folded down to so many characters, however they are aligned.
    """
    cells = (tuple(cell if isinstance(cell, Text) else text(cell) for cell in row) for row in rows)
    return Columns(tuple(columns), tuple(cells), least or {})


def stack(*parts: RenderableType | None) -> Group:
    """Put parts below each other with a blank line between, leaving out those that are None."""
    shown: list[RenderableType] = []
    for part in parts:
        if part is not None:
            shown += [Text(""), part] if shown else [part]
    return Group(*shown)


def titled(title: str, part: RenderableType | None) -> Group | None:
    """Put a title above a part; None without one."""
    return None if part is None else Group(Text(title, "bold"), part)


def lines(items: Iterable[str], style: str = "") -> Group | None:
    """Put strings below each other; None when there are none."""
    found = [text(item, style) for item in items]
    return Group(*found) if found else None
