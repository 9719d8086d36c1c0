"""Comparing several artifacts at once: what each costs, how far each is from its original, and which to choose from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType

from memc.report import models as m
from memc.report.layout import lines, stack, table
from memc.report.slider import SHOWN
from memc.report.text import number, size
from memc.report.tools import CompareDocument, CompareRow

SIZES = {"state_bytes": "state of a sequence", "bytes_read_per_token": "read for a token"}
"""What a choice is between, beside quality: fields of a row, and what they are called."""


def compare(reports: Sequence[m.ReportDocument]) -> CompareDocument:
    """Put several reports beside each other, at the longest context up to ``SHOWN`` that all were planned for.

    A row is on the front of a size when no other is as small and as near to its original (KL), and better in one of the
    two (Pareto). What did not finish, or whose distance was not measured, is on none.
    """
    planned = [set(report.convert.predicted.state_bytes) for report in reports if report.convert is not None]
    shared = set.intersection(*planned) if planned else set()
    context = max((one for one in shared if one <= SHOWN), default=min(shared, default=None))
    rows = [_row(report, context) for report in reports]
    for size_of in SIZES:
        for row in rows:
            if _choice(row, size_of) is not None and not any(_beats(other, row, size_of) for other in rows):
                row.fronts.append(size_of)
    return CompareDocument(context=context, rows=rows, warnings=list(_warnings(rows, reports)))


def _row(report: m.ReportDocument, context: int | None) -> CompareRow:
    done = report.convert
    model = done.model if done else report.capture.model if report.capture else None
    row = CompareRow(
        out=report.out,
        source=model.source if model else "",
        digest=model.digest if model else "",
        passes=[item.spec for item in report.passes],
        stopped=f"{report.error.code} {report.error.message}" if report.error else "",
        finished=report.finished,
    )
    if done is not None:
        row.weights, row.verified = done.weights, done.verified
        row.parameters = done.predicted.parameters
    if done is not None and context is not None:
        row.state_bytes = done.predicted.state_bytes.get(context)
        row.bytes_read_per_token = done.predicted.bytes_read_per_token.get(context)
        row.decode_ms = done.predicted.decode_ms.get(context)
    if report.finished:
        _quality(row, report)
    return row


def _quality(row: CompareRow, report: m.ReportDocument) -> None:
    """Take what was measured on held-out text, else what the checks of the conversion say."""
    if report.quality is not None and report.quality.by_context:
        last = report.quality.by_context[-1]
        row.text, row.perplexity_ratio, row.kl_mean = report.quality.text or "held-out text", last.ratio, last.kl_mean
        return
    found = {check.name: check.value for check in (report.verify.checks if report.verify else ())}
    # Nothing is checked where there is nothing that could change it: no pass, or float32 weights.
    exact, same = row.weights == "fp32", not row.passes
    rewritten = found.get("perplexity_ratio", 1.0 if same else None)
    weights = found.get("weights_perplexity_ratio", 1.0 if exact else None)
    if rewritten is not None and weights is not None:
        row.perplexity_ratio = rewritten * weights
    row.kl_mean = found.get("kl_mean", 0.0 if same else None) if exact else None  # it is of the program, in float32
    row.text = report.verify.text if report.verify else ""


def _beats(one: CompareRow, other: CompareRow, size_of: str) -> bool:
    left, right = _choice(one, size_of), _choice(other, size_of)
    if left is None or right is None:
        return False
    return left != right and left[0] <= right[0] and left[1] <= right[1]


def _choice(row: CompareRow, size_of: str) -> tuple[float, float] | None:
    """Return a size and the distance from the original, None where either is not known."""
    found = getattr(row, size_of)
    return None if found is None or row.kl_mean is None else (found, row.kl_mean)


def _warnings(rows: Sequence[CompareRow], reports: Sequence[m.ReportDocument]) -> Iterator[str]:
    for row in rows:
        if not row.finished:
            yield f"{row.out} did not finish: {row.stopped or 'the conversion was interrupted'}"
        elif row.kl_mean is None:
            yield f"{row.out}: the KL with {row.weights} weights is not in its report; memc eval OUT --against finds it"
    if len({row.digest for row in rows if row.digest}) > 1:
        yield "the artifacts are of different models: quality is against each one's own original"
    if len({(row.text, bool(report.quality)) for row, report in zip(rows, reports, strict=True) if row.finished}) > 1:
        yield "quality was measured on different texts"


def compare_view(document: CompareDocument) -> RenderableType:
    """Show the artifacts, one a line, by numbers that are explained above."""
    rows = [
        (
            str(index),
            size(row.state_bytes),
            size(row.bytes_read_per_token),
            number(row.decode_ms),
            number(row.perplexity_ratio),
            number(row.kl_mean),
            ", ".join("state" if name == "state_bytes" else "read" for name in row.fronts),
        )
        for index, row in enumerate(document.rows, 1)
    ]
    said = [f"{index}: {row.out}: {describe(row)}" for index, row in enumerate(document.rows, 1)]
    at = f"at {document.context} tokens" if document.context is not None else "no context in common"
    columns = [">", ">state", ">read", ">ms", ">perplexity ratio", ">KL", "best of its"]
    return stack(
        lines([*said, at]), table(columns, rows), lines((f"warning: {text}" for text in document.warnings), "yellow")
    )


def describe(row: CompareRow) -> str:
    """Say in a few words what an artifact is."""
    what = ", ".join(row.passes) or "as it is"
    return f"{what}, {row.weights}" if row.weights else what
