"""Parts of the terminal view: text that is safe to print, tables, and parts below each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memc.report.text import plain

Cell = str | Text


def text(value: str, style: str = "") -> Text:
    """Make printable text of a foreign string."""
    return Text(plain(value), style)


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Table:
    """Make a plain table; a column whose title starts with ``>`` is right-aligned."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1), header_style="bold")
    for column in columns:
        right = column.startswith(">")
        made.add_column(
            text(column.removeprefix(">")), justify="right" if right else "left", no_wrap=right, overflow="fold"
        )
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else text(cell) for cell in row))
    return made


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
