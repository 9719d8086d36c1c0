"""The HTML view: one page, escaped, that needs no network; light and dark by the reader's preference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from memc.report import branches, charts, column, files, fit, heads, provenance, quality, slider, training
from memc.report import facts as f
from memc.report import models as m
from memc.report.page import page, table
from memc.report.terminal import steps_done
from memc.report.text import FETCHED, amount, duration, escaped, layers, number, past_training, ratio, size

MOVED = ("perplexity_ratio", "kl_mean")
"""Checks that say how far the outputs moved."""


def render(report: m.ReportDocument) -> str:
    """Render a report as one HTML page; every string of the report is escaped."""
    title = f"memc report: {report.out}"
    body = "".join(_sections(report))
    style = charts.STYLE + charts.SIDE_BY_SIDE + slider.STYLE + column.STYLE
    return page(title, body, style, slider.policy())


def _sections(report: m.ReportDocument) -> Iterable[str]:
    done = report.convert
    model = done.model if done else report.capture.model if report.capture else None
    yield f"<h1>{escaped(model.source if model else report.out)}</h1>\n"
    yield f"<p>{_verdict(report)}</p>\n"
    if report.error is not None or done is None:
        yield _reached(report)
    yield _answers(report)
    if model is not None:
        facts = f"{escaped(model.family)}, {amount(model.parameters)} parameters"
        yield f"<p>{facts}, digest <code>{escaped(model.digest or '-')}</code></p>\n"
    if done is not None:
        how = f"through {escaped(done.backend)}, weights {escaped(done.weights)}"
        yield f"<p>For <b>{escaped(done.target)}</b> {how}.</p>\n"
        yield slider.section(done.curves, done.measured)
        yield _costs(done)
        yield _fit(done.fit) if done.fit is not None else ""
    yield _passes(report.passes)
    if report.quality is not None:
        yield quality.section(report.quality, "Measured on held-out text")
    yield from (_training(item, item.training) for item in report.passes if item.training is not None)
    yield from (_heads(item.spec, found) for item in report.passes if (found := heads.of_pass(item)) is not None)
    if report.verify is not None:
        yield _checks(report.verify.checks)
    if report.raising is not None:
        gates = report.verify.gates if report.verify is not None else []
        yield column.section(report.raising.blocks, report.passes, gates)
    if done is not None and (known := provenance.facts(done)):
        yield table("Where it comes from", ["", ""], known)
    yield _timing(report)


def _verdict(report: m.ReportDocument) -> str:
    if report.error is not None:
        return f'<span class="bad">stopped: {escaped(report.error.code)} {escaped(report.error.message)}</span>'
    if not report.finished or report.convert is None:
        return '<span class="bad">unfinished</span>'
    word, kind = ("verified", "good") if report.convert.verified else ("not verified", "bad")
    caveats = "".join(f"; {caveat}" for caveat in report.convert.caveats)
    return f'<span class="{kind}">{word}</span>{caveats}'


def _reached(report: m.ReportDocument) -> str:
    """Say how far a conversion came that did not come to its end, and what to type next."""
    told = f"<p>How far it came: {escaped('; '.join(steps_done(report)) or 'nothing was finished')}.</p>\n"
    following = report.error.next if report.error is not None else ""
    return told + (f"<p>Next: <code>{escaped(following)}</code></p>\n" if following else "")


def _answers(report: m.ReportDocument) -> str:
    """Say what changed and how far the outputs moved, in a line each."""
    passes = [f"{item.spec}, {len(item.sites)} blocks" for item in report.passes] or ["nothing: the model as it is"]
    checks = report.verify.checks if report.verify is not None else []
    moved = [f"{check.name.replace('_', ' ')} {number(check.value)}" for check in checks if check.name in MOVED]
    if report.quality is not None and report.quality.by_context:
        last = report.quality.by_context[-1]
        moved = [f"perplexity {number(last.ratio)} times the original's on held-out text, windows of {last.context}"]
        moved += [f"KL {number(last.kl_mean)} nats a token"] if last.kl_mean is not None else []
    lines = {"Changed": "; ".join(passes), "Moved": ", ".join(moved) or "not measured"}
    told = "".join(f"<dt>{name}</dt><dd>{escaped(said)}</dd>" for name, said in lines.items())
    return f"<dl>{told}</dl>\n"


def _costs(done: m.ConvertDocument) -> str:
    before, after = done.original or m.Predicted(parameters=0, flops_per_token=0), done.predicted
    rows = [("parameters", amount(before.parameters or None), amount(after.parameters), "")]
    for context, new in sorted(after.state_bytes.items()):
        old = before.state_bytes.get(context)
        rows.append((f"state at {context} tokens", size(old), size(new), ratio(new, old)))
    if after.fetched_bytes:
        rows.append((FETCHED, size(before.fetched_bytes), size(after.fetched_bytes), ""))
    for context, read in sorted(after.bytes_read_per_token.items()):
        before_read = before.bytes_read_per_token.get(context)
        rows.append((f"read for a token at {context} tokens", size(before_read), size(read), ratio(read, before_read)))
    for context, ms in sorted(after.decode_ms.items()):
        was = before.decode_ms.get(context)
        rows.append((f"milliseconds a token at {context}, predicted", number(was), number(ms), ratio(ms, was)))
    for context, ms in sorted(after.prefill_ms.items()):
        was = before.prefill_ms.get(context)
        told = number(was / 1000) if was is not None else "-"
        rows.append((f"seconds a prompt of {context}, predicted", told, number(ms / 1000), ratio(ms, was)))
    if done.measured is not None:
        rows.append(("disk", "", size(done.measured.disk_bytes), ""))
        rows.append(("peak memory of the conversion", "", size(done.measured.peak_rss_bytes), ""))
    limit = done.model.max_positions if done.model is not None else None
    past = past_training({*after.state_bytes, *after.decode_ms, *after.prefill_ms}, limit)
    return table("Cost", ["", ">original", ">converted", ">ratio"], rows) + (
        f"<p>{escaped(past)}.</p>\n" if past else ""
    )


def _fit(facts: files.FitFacts) -> str:
    """Show how limits were kept, by what, and what every layer would lose by each setting."""
    told = f"<p>{escaped(fit.summary(facts))}.</p>\n<p>{escaped(fit.given_up(facts))}.</p>\n"
    parts = [table("Fit to limits", fit.LIMITS, fit.limit_rows(facts)), told]
    parts.append(table("Chosen", fit.CHOSEN, fit.chosen_rows(facts)))
    for kind, name in fit.KINDS.items():
        blocks = [one for one in facts.layers if one.kind == kind]
        settings = list(dict.fromkeys(spec for one in blocks for spec in one.kl))
        rows = [
            (str(one.layer), one.spec or "as it is", *(number(one.kl.get(spec)) for spec in settings)) for one in blocks
        ]
        columns = [">layer", "chosen", *(f">{spec.replace(',', ', ')}" for spec in settings)]
        parts.append(table(f"KL of each {name} block alone, nats a token", columns, rows) if rows else "")
    return "".join(parts)


def _passes(passes: Sequence[files.PassReportFile]) -> str:
    rows, left = [], []
    for item in passes:
        relations: Sequence[f.RelationFacts | None] = item.relations or [None]
        for relation in relations:
            label = f"{relation.relation} {relation.metric.replace('_', ' ')}" if relation else ""
            value, budget = (number(relation.value), number(relation.budget)) if relation else ("", "")
            where = layers(site.layer for site in item.sites)
            rows.append((item.spec, where, str(len(item.skipped)), label, value, budget))
        left += [(item.name, str(skip.layer), skip.kind, f"{skip.code} {skip.reason}") for skip in item.skipped]
    made = table("Passes", ["pass", "layers", ">skipped", "relation", ">value", ">budget"], rows)
    return made + (table("Left alone", ["pass", ">layer", "block", "reason"], left) if left else "")


def _training(item: files.PassReportFile, facts: files.TrainingFacts) -> str:
    """Show what training a pass was like: stages, what was learned, losses over the steps, what each layer matters."""
    parts = [
        f"<h2>Training of {escaped(item.spec)}</h2>\n",
        table("Learned", ["", ""], training.fact_rows(facts)),
        table("Stages", training.STAGES, training.stage_rows(facts)),
    ]
    if facts.transfer is not None:
        title = "Loss of transfer, weighted terms, mean of the layers"
        parts.append(charts.line_chart(title, _lines(facts.transfer.curve)))
    if facts.recovery is not None:
        measure = training.guarded(facts.recovery)
        looks = charts.Line(f"{measure} on held-out text", facts.recovery.guard_kl, dots=True)
        learned = "kl" if facts.recovery.onto == "result" else "text"
        trained = [line for line in _lines(facts.recovery.curve) if line.name == learned]
        parts.append(charts.line_chart("Recovery, nats a token", [*trained, looks]))
        texts = [charts.Line(one.name, one.kl, dots=True) for one in facts.recovery.guard_texts]
        if len(texts) > 1:
            parts.append(charts.line_chart(f"{measure} on each held-out text, nats a token", texts))
    if facts.choice is not None:
        title = "What restoring one layer alone takes off the KL, nats a token (filled: kept)"
        parts.append(charts.bar_chart(title, _bars(facts.choice)))
    if facts.branches is not None:
        parts += _branches(facts.branches)
    if rows := training.layer_rows(item):
        columns = [training.LAYERS[0].replace("layer", ">layer"), *training.LAYERS[1:]]
        parts += [table("Layers", columns, rows), f"<p>{escaped(training.LAYERS_NOTE)}.</p>\n"]
    return "".join(parts)


def _branches(facts: files.BranchFacts) -> Iterable[str]:
    """Show the model without each branch, and what the first one carries beside what the original gives to it."""
    if facts.ablation is not None:
        title = f"Branches, {facts.ablation.tokens} held-out tokens past what is exact"
        yield table(title, branches.ABLATION, branches.ablation_rows(facts.ablation))
        yield f"<p>{escaped(branches.ABLATION_NOTE)}.</p>\n"
    if facts.shares:
        due = f"the original gives to {facts.stands_for} (open)"
        title = f"Percent of the mass: the {facts.branches[0]} carries (filled), {due}"
        bars = [
            charts.Bar(label, 100 * branches.mean(side), full=not index)
            for one in facts.shares
            for index, (label, side) in enumerate([(f"layer {one.layer}", one.carried), ("original", one.due)])
        ]
        yield charts.bar_chart(title, bars)
        for said, side in (f"{facts.branches[0]} carries", "carried"), ("original gives", "due"):
            rows = [charts.Heads(f"layer {one.layer}", getattr(one, side)) for one in facts.shares]
            yield charts.head_map(f"Share of the mass by query head: what the {said}", rows)


def _heads(spec: str, found: files.HeadFacts) -> str:
    """Show the scores by which heads were chosen."""
    parts = [f"<h2>Heads of {escaped(spec)}</h2>\n<p>{escaped('; '.join(heads.meaning(found)))}.</p>\n"]
    for name in heads.kinds(found):
        rows = []
        for one in found.layers:
            scores = getattr(one, name)
            size = len(scores) // one.kv_heads
            kept = [group * size + head for group in one.kept for head in range(size)]
            rows.append(charts.Heads(f"layer {one.layer}", scores, kept))
        parts.append(charts.head_map(f"{heads.TITLES[name]} (framed: stays as it is)", rows))
    return "".join(parts)


def _lines(curve: files.CurveFacts) -> list[charts.Line]:
    return [
        charts.Line(name.replace("_", " "), list(zip(curve.steps, values, strict=False)))
        for name, values in curve.losses.items()
    ]


def _bars(choice: files.ChoiceFacts) -> list[charts.Bar]:
    return [
        charts.Bar(f"layer {layer}", choice.kl_nothing_restored - alone, full=layer in choice.kept)
        for layer, alone in choice.kl_restored_alone.items()
    ]


def _checks(checks: Sequence[f.CheckFacts]) -> str:
    rows = [(c.name, number(c.value), number(c.budget), number(c.noise_floor), c.outcome, c.detail) for c in checks]
    return table("Checks", ["check", ">value", ">budget", ">noise floor", "", "detail"], rows)


def _timing(report: m.ReportDocument) -> str:
    parts = [("capture", report.capture), ("raise", report.raising), *((item.spec, item) for item in report.passes)]
    rows = [
        (name, duration(part.timing.seconds), size(part.timing.peak_rss_bytes))
        for name, part in [*parts, ("verify", report.verify)]
        if part is not None
    ]
    return table("Time", ["step", ">seconds", ">peak memory"], rows)
