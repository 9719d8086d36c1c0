"""The terminal view of conversions and reports, as rich renderables that fit 80 columns or what there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memc.report import branches, files, fit, heads, provenance, training
from memc.report import facts as f
from memc.report import models as m
from memc.report.evaluation import eval_view
from memc.report.inspection import blocks_table, model_line, past_training_note, work_label
from memc.report.layout import Cell, lines, stack, table, text, titled
from memc.report.text import FETCHED, amount, brief, duration, layers, number, plain, ratio, size


def convert_view(document: m.ConvertDocument) -> RenderableType:
    """Show a conversion or the plan of one: passes, what they leave alone, costs, checks, what to type next."""
    return stack(
        _convert_head(document),
        fit_view(document.fit),
        passes_table(document.passes),
        titled("left alone", skipped_table(document.passes)),
        *(training_view(item.spec, item.training) for item in document.passes),
        costs_table(document),
        titled("checks", checks_table(document.checks)),
        verdict(document),
        lines((f"warning: {warning}" for warning in document.warnings), "yellow"),
        titled("next", lines(f"  {command}" for command in document.next)),
    )


def _convert_head(document: m.ConvertDocument) -> RenderableType:
    what = "plan, nothing written" if document.dry_run else document.out
    how = f"for {document.target} through {document.backend}, weights {document.weights}"
    return Group(*([model_line(document.model)] if document.model else []), text(f"-> {what}", "bold"), text(how))


def fit_view(facts: files.FitFacts | None) -> RenderableType | None:
    """Show how limits were kept and by what; None where none chose the passes."""
    if facts is None:
        return None
    limits, chosen = table(fit.LIMITS, fit.limit_rows(facts)), table(fit.CHOSEN, fit.chosen_rows(facts))
    told = text(fit.summary(facts)), text(fit.given_up(facts))
    return Group(text("fit to limits", "bold"), limits, text(""), chosen, text(""), *told)


def passes_table(passes: Sequence[m.PassFacts]) -> RenderableType:
    """Show each pass with its relations: measured value beside the budget."""
    if not passes:
        return text("no pass: the model as it is")
    rows: list[list[str]] = []
    for item in passes:
        head = [item.spec, str(item.sites), str(len(item.skipped))]
        relations: Sequence[f.RelationFacts | None] = item.relations or [None]
        for index, relation in enumerate(relations):
            rows.append([*(head if index == 0 else ["", "", ""]), *_relation_cells(relation)])
    return table(["pass", ">sites", ">skipped", "relation", ">value", ">budget"], rows)


def _relation_cells(relation: f.RelationFacts | None) -> list[str]:
    if relation is None:
        return ["", "", ""]
    label = relation.relation if relation.relation != "bounded" else relation.metric.replace("_", " ")
    if relation.tokens is not None:
        label += f" to {relation.tokens} tokens"
    return [label, number(relation.value), number(relation.budget)]


def skipped_table(passes: Sequence[m.PassFacts]) -> RenderableType | None:
    """Show the blocks that passes left alone, those with one reason in one row."""
    folded: dict[tuple[str, str, str, str], list[int]] = {}
    for item in passes:
        for skipped in item.skipped:
            key = (item.spec.partition(":")[0], skipped.kind, skipped.code, skipped.reason)
            folded.setdefault(key, []).append(skipped.layer)
    rows = [(name, layers(where), kind, f"{code} {reason}") for (name, kind, code, reason), where in folded.items()]
    return table(["pass", "layers", "block", "reason"], rows) if rows else None


def training_view(spec: str, facts: files.TrainingFacts | None) -> RenderableType | None:
    """Show what training a pass was like; None for what was not trained."""
    if facts is None:
        return None
    stages = table(training.STAGES, training.stage_rows(facts))
    shown = Group(text(f"training of {spec}", "bold"), stages, text(""), _pairs(training.fact_rows(facts)))
    return stack(shown, _ablation(facts))


def _ablation(facts: files.TrainingFacts) -> RenderableType | None:
    found = facts.branches.ablation if facts.branches else None
    if found is None:
        return None
    made = table(branches.ABLATION, branches.ablation_rows(found))
    title = f"branches, {found.tokens} held-out tokens past what is exact"
    return titled(title, Group(made, text(branches.ABLATION_NOTE)))


def _pairs(rows: Sequence[tuple[str, str]]) -> Table:
    """Put what is said of things beside their names."""
    made = Table.grid("", "", padding=(0, 3, 0, 0))
    for name, said in rows:
        made.add_row(text(name), text(said))
    return made


def costs_table(document: m.ConvertDocument) -> RenderableType:
    """Show what the result costs beside the original, predicted, with what was measured where it was."""
    before, after, done = document.original, document.predicted, document.measured or m.Measured()
    rows: list[tuple[str, str, str, str]] = [
        ("parameters", amount(before.parameters if before else None), amount(after.parameters), "")
    ]
    for context in sorted(after.state_bytes):
        old = before.state_bytes.get(context) if before else None
        new = after.state_bytes[context]
        rows.append((f"state at {context}", size(old), size(new), ratio(new, old)))
    if after.fetched_bytes:
        rows.append((FETCHED, size(before.fetched_bytes if before else None), size(after.fetched_bytes), ""))
    for context in sorted(after.bytes_read_per_token):
        was = before.bytes_read_per_token.get(context) if before else None
        now = after.bytes_read_per_token[context]
        rows.append((f"read for a token at {context}", size(was), size(now), ratio(now, was)))
    for context in sorted(after.decode_ms):
        old_ms = before.decode_ms.get(context) if before else None
        new_ms = after.decode_ms[context]
        old_text = f"{old_ms:.3g}" if old_ms is not None else "-"
        rows.append((f"ms a token at {context}", old_text, f"{new_ms:.3g}", ratio(new_ms, old_ms)))
    for context, taken in sorted(done.decode_ms.items()):
        old_ms = done.original_decode_ms.get(context)
        old_text = f"{old_ms:.3g}" if old_ms is not None else "-"
        rows.append((f"ms measured at {context}", old_text, f"{taken:.3g}", ratio(taken, old_ms)))
    for context, new_ms in sorted(after.prefill_ms.items()):
        old_ms = before.prefill_ms.get(context) if before else None
        old_text = f"{old_ms / 1000:.3g}" if old_ms is not None else "-"
        rows.append((f"seconds a prompt of {context}", old_text, f"{new_ms / 1000:.3g}", ratio(new_ms, old_ms)))
    rows.append((work_label(document.model), amount(before.flops_per_token if before else None, "FLOP"),
                 amount(after.flops_per_token, "FLOP"), ""))  # fmt: skip
    shown: list[list[str]] = [list(row) for row in rows]
    for name, predicted, measured in (
        ("disk", size(after.disk_bytes), size(done.disk_bytes)),
        ("peak memory of converting", size(after.peak_rss_bytes), size(done.peak_rss_bytes)),
        ("time of converting", duration(after.seconds), duration(done.seconds)),
    ):
        shown.append([name, "", measured if measured != "-" else f"about {predicted}", ""])
    made = table(["cost", ">original", ">converted", ">"], shown)
    contexts = {*after.state_bytes, *after.decode_ms, *done.decode_ms, *after.prefill_ms}
    return Group(made, *past_training_note(contexts, document.model))


def checks_table(checks: Sequence[f.CheckFacts]) -> RenderableType | None:
    """Show every check with its value, budget and noise floor."""
    if not checks:
        return None
    rows: list[Sequence[Cell]] = [
        (
            check.name,
            number(check.value),
            number(check.budget),
            number(check.noise_floor),
            _outcome(check),
            check.detail,
        )
        for check in checks
    ]
    return table(["check", ">value", ">budget", ">noise", "", "detail"], rows)


def _outcome(check: f.CheckFacts) -> Text:
    return Text(check.outcome, {"FAILED": "bold red", "passed": "green"}.get(check.outcome, ""))


def verdict(document: m.ConvertDocument) -> Text:
    """Say in one line whether the result may be used."""
    if document.dry_run:
        said = Text("dry run: nothing was written", "bold")
        for facts in document.passes:
            if facts.trains:
                said.append(f"\n{facts.spec} would be trained: {', '.join(facts.trains)}", "not bold")
        return said
    said = Text("verified", "bold green") if document.verified else Text("NOT verified", "bold red")
    for caveat in document.caveats:
        said.append(f"; {caveat}", "yellow")
    return said


def report_view(document: m.ReportDocument) -> RenderableType:
    """Show a whole report: the conversion, or how far it came and why it stopped."""
    if document.convert is not None and document.error is None:
        state = None if document.finished else text("unfinished: run the same memc convert again, it resumes", "yellow")
        blocks = document.raising.blocks if document.raising else []
        made = [pass_facts(item) for item in document.passes]
        convert = document.convert.model_copy(update={"passes": made + document.convert.passes[len(made) :]})
        return stack(
            state,
            convert_view(convert),
            titled("measured on held-out text", eval_view(document.quality)) if document.quality else None,
            titled("blocks", blocks_table(blocks)) if blocks else None,
            titled("where it comes from", lines(f"{name}: {value}" for name, value in provenance.facts(convert))),
        )
    facts = document.convert.model if document.convert else document.capture.model if document.capture else None
    error = document.error
    stopped = f"{error.code} {error.message}" if error else "the conversion has not finished"
    done = [f"{index:>2}. {name}" for index, name in enumerate(steps_done(document), 1)]
    return stack(
        model_line(facts) if facts else None,
        titled(f"{plain(document.out)}: how far it came", lines(done) or text("nothing was finished")),
        text(stopped, "bold red"),
        titled("passes", passes_table([pass_facts(item) for item in document.passes])) if document.passes else None,
        *(training_view(item.spec, item.training) for item in document.passes),
        titled("checks", checks_table(document.verify.checks)) if document.verify else None,
        text(f"next: {error.next}") if error and error.next else None,
    )


def steps_done(document: m.ReportDocument) -> list[str]:
    """Name the steps of which a report file exists, with their seconds."""
    done: list[tuple[str, float]] = []
    if document.capture:
        done.append(("capture", document.capture.timing.seconds))
    if document.raising:
        done.append(("raise", document.raising.timing.seconds))
    done += [(item.spec, item.timing.seconds) for item in document.passes]
    if document.verify:
        done.append(("verify", document.verify.timing.seconds))
    return [f"{name} ({duration(seconds)})" for name, seconds in done]


def pass_facts(item: files.PassReportFile) -> m.PassFacts:
    """Turn the report file of a pass into what the table of passes shows."""
    return m.PassFacts(
        spec=item.spec,
        sites=len(item.sites),
        rewritten=item.sites,
        skipped=item.skipped,
        relations=item.relations,
        new_parameters=item.new_parameters,
        untrained=item.untrained,
        training=item.training,
        seconds=item.timing.seconds,
    )


def pass_view(item: files.PassReportFile, *, layer: int | None = None, why: bool = False) -> RenderableType:
    """Show one pass, for one layer or all: what was rewritten, facts about it, and with ``why`` what was not."""
    sites = [site for site in item.sites if layer is None or site.layer == layer]
    skipped = [one for one in item.skipped if layer is None or one.layer == layer]
    details = {key: value for key, value in item.details.items() if key != "heads"}
    facts = details if layer is None else item.of_layer(layer)
    left = table(["layer", "block", "reason"], [(str(s.layer), s.kind, f"{s.code} {s.reason}") for s in skipped])
    made = table(["layer", "block", "path"], [(str(s.layer), s.kind, s.path) for s in sites])
    summary = f"{len(item.sites)} sites, {len(item.skipped)} skipped, {amount(item.new_parameters)} new parameters"
    return stack(
        Group(text(item.spec, "bold"), text(summary + (", untrained" if item.untrained else ""))),
        passes_table([pass_facts(item)]),
        training_view(item.spec, item.training) if layer is None else None,
        titled("training by layer", _trained_layers(item, layer)),
        titled("share of the mass by layer", _shares(item, layer)),
        text(training.why_layer(item, layer) or "") if why and layer is not None and item.training else None,
        titled("rewritten", made) if sites else None,
        titled("facts", _facts_table(facts)),
        titled("heads", _heads(item, layer)),
        titled("left alone", left) if skipped and (why or layer is not None) else None,
        text("nothing here") if not sites and not skipped else None,
    )


def _trained_layers(item: files.PassReportFile, layer: int | None) -> RenderableType | None:
    rows = training.layer_rows(item, layer)
    return Group(table(training.LAYERS, rows), text(training.LAYERS_NOTE)) if rows else None


def _shares(item: files.PassReportFile, layer: int | None) -> RenderableType | None:
    found = item.training.branches if item.training else None
    rows = list(branches.share_rows(found, layer)) if found else []
    return Group(text(branches.legend(found)), table(branches.columns(found), rows)) if found and rows else None


def _heads(item: files.PassReportFile, layer: int | None) -> RenderableType | None:
    found = heads.of_pass(item)
    return (
        Group(*map(text, heads.legend(found)), table(heads.columns(found), heads.rows(found, layer))) if found else None
    )


def _facts_table(details: Mapping[str, object]) -> RenderableType | None:
    rows: list[tuple[str, str]] = []
    for key, value in details.items():
        if isinstance(value, Mapping):
            rows += [(f"{key} {name}", brief(fact)) for name, fact in value.items()]
        elif value is not None:
            rows.append((key, brief(value)))
    return table(["layer and fact", "value"], rows) if rows else None
