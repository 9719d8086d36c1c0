"""What an analysis found, for the terminal and as a page: how well it fits, and what of each block it keeps."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType

from memc.report import charts
from memc.report import models as m
from memc.report.layout import lines, stack, titled
from memc.report.layout import table as rich_table
from memc.report.page import page, table
from memc.report.text import escaped, number

SHOWN = 8
"""Heads that the terminal lists."""


def analysis_view(document: m.AnalysisDocument) -> RenderableType:
    """Show how well what was found does what it was found for, and how much of each block it is."""
    return stack(
        lines([f"{document.model.source}: {_title(document)}", f"text: {document.text}"]),
        rich_table(["", ">"], list(_facts(document))),
        titled("strongest heads", rich_table(_HEADS, rows)) if (rows := _strongest(document)[:SHOWN]) else None,
        titled("kept of each block, none of the others", rich_table(_KEPT, rows))
        if (rows := [row for row in _kept(document) if row[2] != "0"])
        else None,
        titled("left out", lines(_left_out(document))),
    )


def analysis_page(document: m.AnalysisDocument) -> str:
    """Render an analysis as one page."""
    parts = [
        f"<h1>{escaped(document.model.source)}</h1>\n",
        f"<p>{escaped(_title(document))}; text: {escaped(document.text)}</p>\n",
        table("What was found", ["", ">value"], _facts(document)),
        table("Kept of each block", _KEPT, _kept(document)),
        *_pictures(document),
    ]
    if rows := _strongest(document):
        parts.append(table("Heads, strongest first", _HEADS, rows))
    if left := list(_left_out(document)):
        parts.append(f"<p>{'<br>'.join(map(escaped, left))}</p>\n")
    return page("memc analyse", "".join(parts), charts.STYLE + charts.SIDE_BY_SIDE)


_HEADS = (">layer", ">head", ">context", ">+-", ">memory", ">+-", "kept")
_KEPT = (">layer", "kind", ">kept", ">of")


def _title(document: m.AnalysisDocument) -> str:
    if document.mediation is not None:
        return f"heads that carry the {document.mediation.favour} to the prediction"
    return "the subnetwork that predicts by the current token alone"


def _facts(document: m.AnalysisDocument) -> Iterator[tuple[str, str]]:
    """Yield what was measured, and its value."""
    if (found := document.bigram) is not None:
        yield "share of the block parameters that is kept", number(found.share)
        yield "KL to the model's bigram: the subnetwork", number(found.kl_kept)
        yield "the whole model", number(found.kl_whole)
        yield "no unit at all", number(found.kl_none)
        yield "as many random units of each block", number(found.kl_random)
        yield "correlation of surprisals with the bigram's", number(found.correlation)
        yield "KL to the model as it is: without the subnetwork", number(found.kl_without)
        yield "without as many random units", number(found.kl_without_random)
        yield "held-out tokens", str(found.tokens)
    if (answers := document.mediation) is not None:
        yield "prompts", str(answers.prompts)
        yield "answered from the context", number(answers.answered_context)
        yield "answered from memory", number(answers.answered_memory)
        yield "heads kept", str(sum(len(units.kept) for units in document.units))


def _kept(document: m.AnalysisDocument) -> Iterator[tuple[str, str, str, str]]:
    """Yield how many units of each block are kept."""
    for units in document.units:
        kind = "heads" if units.kind == "attention" else "channels"
        yield str(units.layer), kind, str(len(units.kept)), str(len(units.scores))


def _strongest(document: m.AnalysisDocument) -> list[tuple[str, ...]]:
    """Return every head with its effects, that of the highest score first."""
    heads = [(units, head) for units in document.units if units.context for head in range(len(units.scores))]
    heads.sort(key=lambda pair: -pair[0].scores[pair[1]])
    return [
        (
            str(units.layer),
            str(head),
            *(number(getattr(units, name)[head]) for name in ("context", "context_error", "memory", "memory_error")),
            "kept" if head in units.kept else "",
        )
        for units, head in heads
    ]


def _pictures(document: m.AnalysisDocument) -> Iterator[str]:
    """Draw the heads by layer, and the share that is kept of every block."""
    attention = [units for units in document.units if units.kind == "attention"]
    yield '<div class="charts">'
    for name in ("context", "memory") if document.mediation is not None else ():
        most = max((value for units in attention for value in getattr(units, name)), default=0.0) or 1.0
        rows = [
            charts.Heads(f"layer {u.layer}", [max(0.0, v / most) for v in getattr(u, name)], u.kept) for u in attention
        ]
        yield charts.head_map(f"Effect on the {name} answer, of the largest, {number(most)} nats (framed: kept)", rows)
    if document.bigram is not None:
        rows = [charts.Heads(f"layer {u.layer}", [float(h in u.kept) for h in range(len(u.scores))]) for u in attention]
        yield charts.head_map("Heads of the subnetwork", rows)
        bars = [
            charts.Bar(f"layer {units.layer}", 100 * len(units.kept) / len(units.scores))
            for units in document.units
            if units.kind == "feed_forward"
        ]
        yield charts.bar_chart("Percent of the channels that the subnetwork keeps", bars)
    yield "</div>\n"


def _left_out(document: m.AnalysisDocument) -> Iterator[str]:
    for one in document.left_out:
        yield f"layer {one.layer} {one.kind}: {one.code}: {one.reason}"
