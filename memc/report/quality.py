"""What an evaluation found, as HTML: tables, perplexity by position and recall by length and depth as pictures."""

from __future__ import annotations

from collections.abc import Iterator

from memc.report import charts
from memc.report import models as m
from memc.report.page import page, table
from memc.report.text import escaped, number


def eval_page(document: m.EvalDocument) -> str:
    """Render an evaluation as one page."""
    of = " against ".join(side.source or name for name, side in document.sides.items())
    body = f"<h1>{escaped(of)}</h1>\n{section(document, f'Measured on {document.text}')}"
    return page("memc eval", body, charts.STYLE + charts.SIDE_BY_SIDE)


def section(document: m.EvalDocument, title: str) -> str:
    """Show how far two sides are apart, or what one is like, by window, by position and by task."""
    parts = [_windows(document, title), _positions(document)]
    if (free := document.free_running) is not None:
        said = f"{free.prompts} prompts of {free.prompt_tokens} tokens, {free.new_tokens} new ones"
        rows = [("equal before the first difference", number(free.equal_before)), ("equal in all", number(free.equal))]
        parts.append(table(f"Free-running: {said}", ["", ">share"], rows))
    parts += [_tasks(document), *(f"<p>{escaped(warning)}</p>\n" for warning in document.warnings)]
    return "".join(parts)


def _windows(document: m.EvalDocument, title: str) -> str:
    sides = document.sides.values()
    by_window = [{row.context: row.perplexity for row in side.by_context} for side in sides]
    apart = {row.context: row for row in document.by_context}
    windows = sorted({context for side in by_window for context in side} | set(apart))
    if not windows:
        return ""
    rows = []
    for context in windows:
        cells = [str(context), *(number(side.get(context)) for side in by_window)]
        if (row := apart.get(context)) is not None:
            cells += [number(value) for value in (row.ratio, row.kl_mean, row.kl_p99, row.top1_agreement)]
        rows.append(cells + [""] * (1 + len(by_window) + (4 if apart else 0) - len(cells)))
    columns = [">window", *(f">perplexity {side.source}" for side in sides)]
    columns += [">ratio", ">KL mean", ">KL p99", ">same top"] if apart else []
    return table(title, columns, rows)


def _positions(document: m.EvalDocument) -> str:
    """Draw perplexity over the position in the window, each bucket at its last token."""
    lines = [
        charts.Line(f"{name}: {side.source}", [(b.end, b.perplexity) for b in side.by_position if b.perplexity], True)
        for name, side in document.sides.items()
    ]
    window = f", windows of {document.window}" if document.window else ""
    return charts.line_chart(f"Perplexity by position{window}", lines, "position", doubling=True)


def _tasks(document: m.EvalDocument) -> str:
    sides = document.sides
    tasks = list(dict.fromkeys(task for side in sides.values() for task in side.tasks))
    if not tasks:
        return ""
    rows = [(task, *(number(side.tasks.get(task)) for side in sides.values())) for task in tasks]
    made = table("Recall, share of right answers", ["task", *(f">{side.source}" for side in sides.values())], rows)
    return made + f'<div class="charts">{"".join(_maps(document, tasks))}</div>\n'


def _maps(document: m.EvalDocument, tasks: list[str]) -> Iterator[str]:
    """Draw recall by length, and depth where a task has one, a map for each task and side."""
    for task in tasks:
        for name, side in document.sides.items():
            cells = {(cell.length, cell.depth): cell.accuracy for cell in side.cells if cell.task == task}
            depths = sorted({depth for _, depth in cells if depth is not None})
            if not depths:
                continue
            rows = [
                charts.Heads(f"{length}", [cells.get((length, depth)) for depth in depths])
                for length in sorted({length for length, _ in cells})
            ]
            title = f"{task}, {name}: {side.source}; right by tokens (down) and depth in % (across)"
            yield charts.head_map(title, rows, [f"{100 * depth:.3g}" for depth in depths], "depth")
