"""What every page is made of: its head, its style, its tables. A page needs no network and escapes what it shows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from memc.report.text import escaped

STYLE = """
:root { color-scheme: light dark; --line: #8886; --good: #1a7f37; --bad: #c8102e; }
@media (prefers-color-scheme: dark) { :root { --good: #56d364; --bad: #ff7b72; } }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
section { margin: 1.25rem 0; }
div.wide { overflow-x: auto; } table { border-collapse: collapse; } caption { text-align: left; font-weight: 600; }
dt { font-weight: 600; } dd { margin-left: 1rem; }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line); }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; } td.n { white-space: nowrap; }
td:not(.n) { min-width: 6.5rem; } h1, h2, code, td { overflow-wrap: anywhere; } h2 { font-size: 1.2rem; }
@media (max-width: 30rem) {
  h1 { font-size: 1.5rem; } table { font-size: .85rem; }
  th, td { padding-right: .4rem; } td:not(.n) { min-width: 5rem; }
}
@media print {
  body { margin: 0; max-width: none; font-size: .8rem; } div.wide { overflow-x: visible; }
  figure, tr, li { break-inside: avoid; } caption, thead, h2 { break-after: avoid; }
}
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
"""

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Content security policy of a page without scripts: nothing but its own style."""


def page(title: str, body: str, style: str = "", policy: str = POLICY) -> str:
    """Put a page together; ``body`` and ``style`` go in as they are."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{escaped(title)}</title><style>{STYLE}{style}</style></head>\n"
        f"<body><main>\n{body}</main></body></html>\n"
    )


def embedded(page: str) -> str:
    """Put a whole page into a frame of its own, as a notebook shows it inline: its style stays within."""
    return (
        f'<iframe srcdoc="{escape(page)}" sandbox="allow-scripts" width="100%" height="600" style="border:0"></iframe>'
    )


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Make a table of cells that are text; a column whose name starts with ``>`` is of numbers."""
    kinds = [' class="n"' if column.startswith(">") else "" for column in columns]
    named = zip((escaped(column.removeprefix(">")) for column in columns), kinds, strict=True)
    top = "".join(f'<th scope="col"{kind}>{name}</th>' for name, kind in named)
    body = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{_breakable(cell)}</td>" for cell, kind in zip(row, kinds, strict=True))
        + "</tr>\n"
        for row in rows
    )
    return (
        f'<section><div class="wide" tabindex="0"><table><caption>{escaped(title)}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div></section>\n"
    )


def _breakable(cell: str) -> str:
    """Escape a cell's text, and let names and lists of options break behind their parts before anywhere else."""
    return re.sub(r"([_,])(?=\S)", r"\1<wbr>", escaped(cell))
