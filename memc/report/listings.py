"""The terminal view of what is listed, measured and generated: passes, recipes, targets, doctor, bench."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.text import Text

from memc.report import models as m
from memc.report.layout import lines, stack, table, text, titled
from memc.report.terminal import checks_table
from memc.report.text import amount, number, size
from memc.report.tools import CalibrateDocument, TargetsDocument


def passes_view(document: m.PassesDocument) -> RenderableType:
    """Show every pass with its options and what it does not handle."""
    return stack(*(_pass(row) for row in document.passes))


def _pass(row: m.PassRow) -> RenderableType:
    if not row.available:
        return Group(text(row.name, "bold"), text(f"cannot be used: {row.reason}", "yellow"))
    options = table(["option", "default", "values", "meaning"], [_option(option) for option in row.options])
    return stack(
        Group(text(row.name, "bold"), text(row.summary)),
        options if row.options else None,
        titled("does not handle", lines(f"  {item}" for item in row.does_not_handle)),
    )


def _option(option: m.OptionFacts) -> tuple[str, str, str, str]:
    default = str(option.default).lower() if isinstance(option.default, bool) else str(option.default)
    if option.choices:
        values = " | ".join(option.choices)
    else:
        low = f">= {option.min:g}" if option.min is not None else ""
        high = f"<= {option.max:g}" if option.max is not None else ""
        values = " ".join(part for part in (option.type, low, high, option.unit) if part)
    return option.name, default, values, option.help


def recipes_view(document: m.RecipesDocument) -> RenderableType:
    """Show every recipe that has a name."""
    rows = [(row.name, row.summary, "\n".join(row.passes) or "-") for row in document.recipes]
    return table(["recipe", "", "passes"], rows)


def targets_view(document: TargetsDocument) -> RenderableType:
    """Show every target, and why some cannot be used here."""
    rows = [
        (
            row.name,
            row.description,
            row.backend if row.available else f"({row.backend})",
            f"{amount(row.memory_bandwidth, 'B/s')}" if row.memory_bandwidth else "-",
        )
        for row in document.targets
    ]
    reasons = sorted({row.reason for row in document.targets if row.reason})
    return stack(
        table(["target", "", "backend", ">bandwidth"], rows),
        titled("in parentheses: not available here", lines(f"  {reason}" for reason in reasons)),
    )


def calibrate_view(document: CalibrateDocument) -> RenderableType:
    """Show the rates of this machine as they were taken for and as they were measured."""
    both = (document.before, document.after)
    rows = [
        ("weights read", *(amount(rates.memory_bandwidth, "B/s") for rates in both)),
        ("state read", *(amount(rates.state_bandwidth or rates.memory_bandwidth, "B/s") for rates in both)),
        *(
            (f"products, {weights}", *(amount(rates.flops.get(weights), "FLOP/s") for rates in both))
            for weights in document.after.flops
        ),
        *(
            (f"prompts, {weights}", *(amount(rates.prompt_flops.get(weights), "FLOP/s") for rates in both))
            for weights in document.after.prompt_flops
        ),
        *(
            (f"prompts, {name}", *(amount(rates.prompt_ops.get(name), "FLOP/s") for rates in both))
            for name in document.after.prompt_ops
        ),
        ("launch", *(f"{1e6 * rates.launch_overhead:.3g} us" for rates in both)),
        ("disk written", *(amount(rates.disk_bandwidth, "B/s") for rates in both)),
    ]
    return stack(
        text(document.machine),
        table(["per core", ">before", ">measured"], rows),
        text(f"wrote {document.path}"),
    )


def doctor_view(document: m.DoctorDocument) -> RenderableType:
    """Show versions, backends, kernels, and the coverage table where asked."""
    head = [f"memc {document.version}, Python {document.python}", document.machine]
    packages = ", ".join(f"{name} {found}" for name, found in document.packages.items() if found)
    absent = ", ".join(name for name, found in document.packages.items() if not found)
    backends = [
        (row.name, row.version or "-", "yes" if row.available else row.reason, ", ".join(row.weights))
        for row in document.backends
    ]
    kernels = [(name, ", ".join(kinds)) for name, kinds in document.kernels.items()]
    return stack(
        lines(head),
        lines([packages, *([f"not installed: {absent}"] if absent else [])]),
        table(["backend", "version", "available", "weights"], backends),
        lines(_lacking(document.backends)),
        table(["onnxruntime kernel on cpu", "types"], kernels) if kernels else None,
        coverage_table(document.coverage) if document.coverage is not None else None,
        lines((f"problem: {problem}" for problem in document.problems), "yellow"),
    )


def _lacking(backends: list[m.BackendRow]) -> Iterator[str]:
    """Say what is missing for targets that a backend lowers for, those that lack the same together."""
    for row in backends:
        lacks: dict[str, list[str]] = {}
        for target, what in row.lacks.items():
            lacks.setdefault(what, []).append(target)
        yield from (f"{row.name} for {', '.join(names)}: {what}" for what, names in lacks.items())


def coverage_table(rows: list[m.CoverageRow]) -> RenderableType:
    """Show how far each family comes."""
    cells = [
        (
            row.family,
            *("yes" if fact else "NO" for fact in (row.captured, row.attention, row.ffn, row.logits)),
            row.note,
        )
        for row in rows
    ]
    complete = sum(row.complete for row in rows)
    return Group(
        table(["family", "captured", "attention", "ffn", "logits", "note"], cells),
        Text(f"{complete} of {len(rows)} families complete"),
    )


def lower_view(document: m.LowerDocument) -> RenderableType:
    """Show what an artifact was lowered to."""
    how = f"for {document.target} through {document.backend}, weights {document.weights}, {size(document.disk_bytes)}"
    return stack(
        lines([f"{document.source} -> {document.out}", how]),
        table(["op", "lowered to"], sorted(document.forms.items())) if document.forms else None,
        titled("checks", checks_table(document.checks)),
        titled("next", lines(f"  {command}" for command in document.next)),
    )


def _worded(edit: m.EditFacts) -> str:
    return edit.prompt if edit.wordings == 1 else f"{edit.prompt} (of {edit.wordings} wordings)"


def edit_view(document: m.EditDocument) -> RenderableType:
    """Show which edits are followed, and what of unrelated text is kept."""
    rows = [
        (_worded(edit), edit.target.strip(), "yes" if edit.followed else "no", str(edit.steps), number(edit.difference))
        for edit in document.edits
    ]
    kept = f"{document.kept:.1%} of {document.sequences} unrelated sequences keep every bit"
    routed = f"threshold {number(document.threshold)}, unrelated text up to {number(document.unrelated)}"
    return stack(
        lines(
            [
                f"{document.source} -> {document.out}",
                f"{document.followed:.0%} of the edits are followed; {kept}",
                routed,
            ]
        ),
        titled("edits", table(["prompt", "target", "followed", ">steps", ">difference"], rows)),
        titled("checks", checks_table(document.checks)),
        lines((f"warning: {warning}" for warning in document.warnings), "yellow"),
        titled("next", lines(f"  {command}" for command in document.next)),
    )


def export_view(document: m.ExportDocument) -> RenderableType:
    """Show what a model was exported as."""
    how = f"a Hugging Face folder, {amount(document.parameters)} parameters, {size(document.disk_bytes)}"
    rows = [(name, str(old), str(new)) for name, (old, new) in sorted(document.changed.items())]
    return stack(
        lines([f"{document.source} -> {document.out}", how]),
        titled("configuration", table(["field", "source", "exported"], rows)) if rows else None,
        titled("checks", checks_table(document.checks)),
        titled("next", lines(f"  {command}" for command in document.next)),
    )


def bench_view(document: m.BenchDocument) -> RenderableType:
    """Show timings, the sides of one context below each other."""
    rows = [
        (
            str(row.context),
            row.side,
            number(row.prefill_tokens_per_s),
            number(row.decode_tokens_per_s),
            number(row.decode_ms_median),
            number(row.decode_ms_p90),
            number(row.cpu_ms_median),
            size(row.state_bytes),
        )
        for row in document.rows
    ]
    columns = [">context", "side", ">prefill/s", ">decode/s", ">ms", ">p90", ">cpu ms", ">state"]
    return stack(
        lines([f"{document.machine}, {document.threads} threads", *(f"{n}: {s}" for n, s in document.sides.items())]),
        table(columns, rows),
        lines((f"warning: {warning}" for warning in document.warnings), "yellow"),
    )
