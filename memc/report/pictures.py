"""Pages of what is not one artifact's report: timings, and several artifacts beside each other."""

from __future__ import annotations

from collections.abc import Iterable

from memc.report import charts
from memc.report import models as m
from memc.report.compare import SIZES, describe
from memc.report.page import page, table
from memc.report.text import escaped, number, size
from memc.report.tools import CompareDocument, CompareRow

STYLE = charts.STYLE + charts.SIDE_BY_SIDE


def bench_page(document: m.BenchDocument) -> str:
    """Render timings as one page: curves over the contexts, and every figure in a table."""
    names = {name: f"{name}: {source}" for name, source in document.sides.items()}
    pictures = [
        charts.line_chart(title, _curves(document, names, field, unit), "context", doubling=True)
        for title, field, unit in (
            ("Milliseconds a token, median", "decode_ms_median", 1.0),
            ("Prompt, tokens a second", "prefill_tokens_per_s", 1.0),
            ("State, MiB", "state_bytes", 2.0**20),
        )
    ]
    rows = [
        (
            str(row.context),
            names.get(row.side, row.side),
            number(row.prefill_tokens_per_s),
            number(row.decode_tokens_per_s),
            *(number(value) for value in (row.decode_ms_median, row.decode_ms_p90, row.cpu_ms_median)),
            size(row.state_bytes),
            size(row.rss_bytes),
        )
        for row in document.rows
    ]
    columns = [">context", "side", ">prompt/s", ">tokens/s", ">ms", ">p90", ">CPU ms", ">state", ">process"]
    where = f"{document.machine}, {document.threads} threads" if document.machine else f"{document.threads} threads"
    body = f"<h1>Timings</h1>\n<p>{escaped(where)}; the sides took turns.</p>\n{_beside(pictures)}"
    return page("memc bench", body + table("Measured", columns, rows) + _told(document.warnings), STYLE)


def _curves(document: m.BenchDocument, names: dict[str, str], field: str, unit: float) -> list[charts.Line]:
    return [
        charts.Line(
            told,
            [(row.context, getattr(row, field) / unit) for row in document.rows if row.side == name],
            dots=True,
        )
        for name, told in names.items()
    ]


def compare_page(document: CompareDocument) -> str:
    """Render several artifacts as one page: what is small against what is good, and every figure in a table."""
    at = f" at {document.context:,} tokens" if document.context is not None else ""
    pictures = [
        charts.scatter(
            f"KL to the original, nats a token, by {told}{at}",
            [
                charts.Point(str(index), getattr(row, field), row.kl_mean, field in row.fronts)
                for index, row in enumerate(document.rows, 1)
                if getattr(row, field) is not None and row.kl_mean is not None
            ],
        )
        for field, told in SIZES.items()
    ]
    rows = [
        (
            str(index),
            row.out,
            describe(row),
            size(row.state_bytes),
            size(row.bytes_read_per_token),
            *(number(value) for value in (row.decode_ms, row.perplexity_ratio, row.kl_mean)),
            _outcome(row),
        )
        for index, row in enumerate(document.rows, 1)
    ]
    columns = [">", "artifact", "what", ">state", ">read", ">ms", ">perplexity", ">KL", ""]
    body = f"<h1>{len(document.rows)} artifacts</h1>\n{_beside(pictures)}{table(f'Figures{at}', columns, rows)}"
    said = "Filled: no other is as small and as near to its original. Sizes and times are predicted."
    return page("memc report compare", f"{body}<p>{said}</p>\n{_told(document.warnings)}", STYLE)


def _outcome(row: CompareRow) -> str:
    if row.finished:
        return "verified" if row.verified else "not verified"
    return row.stopped or "unfinished"


def _beside(pictures: Iterable[str]) -> str:
    return f'<div class="charts">{"".join(pictures)}</div>\n'


def _told(warnings: Iterable[str]) -> str:
    return "".join(f"<p>{escaped(warning)}</p>\n" for warning in warnings)
