"""The terminal view of an evaluation: perplexities, the distance of two sides, and what each recalls."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from rich.console import RenderableType

from memc.report import models as m
from memc.report.layout import lines, stack, table, titled
from memc.report.text import number


def eval_view(document: m.EvalDocument) -> RenderableType:
    """Show what was measured of each side, and how far a is from b."""
    sides = document.sides
    return stack(
        lines(f"{name}: {side.source}" for name, side in sides.items()),
        _perplexity(sides),
        _by_position(sides),
        _by_context(document),
        _distance(document),
        _free_running(document.free_running),
        _tasks(document),
        lines((f"warning: {warning}" for warning in document.warnings), "yellow"),
    )


def _perplexity(sides: dict[str, m.EvalSide]) -> RenderableType | None:
    rows = [
        (name, number(side.perplexity), str(side.tokens)) for name, side in sides.items() if side.perplexity is not None
    ]
    return table(["side", ">perplexity", ">tokens"], rows) if rows else None


def _by_position(sides: dict[str, m.EvalSide]) -> RenderableType | None:
    buckets = {(bucket.start, bucket.end) for side in sides.values() for bucket in side.by_position}
    rows = []
    for start, end in sorted(buckets):
        found = [
            next((number(b.perplexity) for b in side.by_position if (b.start, b.end) == (start, end)), "-")
            for side in sides.values()
        ]
        rows.append((f"{start}-{end - 1}", *found))
    return table(["position", *(f">{name}" for name in sides)], rows) if rows else None


def _by_context(document: m.EvalDocument) -> RenderableType | None:
    """Show the windows below each other where there are several."""
    contexts = sorted({row.context for side in document.sides.values() for row in side.by_context})
    if len(contexts) < 2:
        return None
    apart = {row.context: row for row in document.by_context}
    rows = []
    for context in contexts:
        cells = [
            next((number(row.perplexity) for row in side.by_context if row.context == context), "-")
            for side in document.sides.values()
        ]
        if row := apart.get(context):
            cells += [number(v) for v in (row.ratio, row.kl_mean, row.kl_p99, row.top1_agreement)]
        rows.append((str(context), *cells))
    columns = [">window", *(f">ppl {name}" for name in document.sides)]
    return table(columns + ([">a/b", ">KL mean", ">p99", ">same top"] if apart else []), rows)


def _distance(document: m.EvalDocument) -> RenderableType | None:
    rows = [
        (name, number(value))
        for name, value in (
            ("perplexity ratio, a over b", document.ratio),
            ("KL mean, nats a token", document.kl_mean),
            ("KL 99th percentile", document.kl_p99),
            ("same top token", document.top1_agreement),
        )
        if value is not None
    ]
    return table(["a against b", ">"], rows) if rows else None


def _free_running(facts: m.FreeRunningFacts | None) -> RenderableType | None:
    if facts is None:
        return None
    places = sorted(facts.first_difference)
    whole = sum(place == facts.new_tokens for place in places)
    rows = [
        ("equal before the first difference", number(facts.equal_before)),
        ("equal in all", number(facts.equal)),
        ("first difference at: least, median, most", _spread(places)),
        ("no difference at all", f"{whole} of {len(places)}"),
    ]
    title = f"free-running, {facts.prompts} prompts of {facts.prompt_tokens} tokens and {facts.new_tokens} new ones"
    return titled(title, table(["a against b", ">"], rows))


def _spread(places: list[int]) -> str:
    return f"{places[0]}, {statistics.median(places):g}, {places[-1]}"


def _tasks(document: m.EvalDocument) -> RenderableType | None:
    """Show each task and length in a row a side: the mean, its standard error, and the depths."""
    cells = [cell for side in document.sides.values() for cell in side.cells]
    if not cells:
        return None
    depths = sorted({cell.depth for cell in cells if cell.depth is not None})
    rows = []
    for task, length in dict.fromkeys((cell.task, cell.length) for cell in cells):
        for index, (name, side) in enumerate(document.sides.items()):
            found = [cell for cell in side.cells if (cell.task, cell.length) == (task, length)]
            by_depth = {cell.depth: _percent(cell.accuracy) for cell in found}
            labels = ("", "") if index else (task, str(length))
            rows.append((*labels, name, *_mean(found), *(by_depth.get(depth, "") for depth in depths)))
    columns = ["task", ">tokens", "side", ">right", ">+-", *(f">{_percent(depth)}" for depth in depths)]
    chance = {cell.task: _percent(cell.chance) for cell in cells if cell.chance is not None}
    title = f"right answers in %, {document.samples} samples a cell, seed {document.seed}"
    by_chance = ", ".join(f"{task} {share}" for task, share in chance.items())
    return stack(
        titled(title + "; last columns: by depth in %" * bool(depths), table(columns, rows)),
        lines([f"by chance, %: {by_chance}"] if chance else []),
    )


def _mean(cells: list[m.TaskCell]) -> tuple[str, str]:
    """Return the share of right answers over some cells, and its standard error: cells are independent samples."""
    questions = sum(cell.questions for cell in cells)
    if not questions:
        return "-", ""
    share = sum(cell.accuracy * cell.questions for cell in cells) / questions
    errors = [cell.stderr for cell in cells]
    return _percent(share), _error(errors, [cell.questions / questions for cell in cells])


def _error(errors: list[float | None], weights: Iterable[float]) -> str:
    known = [(error * weight) ** 2 for error, weight in zip(errors, weights, strict=True) if error is not None]
    return _percent(sum(known) ** 0.5) if len(known) == len(errors) else ""


def _percent(share: float) -> str:
    return f"{100 * share:.3g}"
