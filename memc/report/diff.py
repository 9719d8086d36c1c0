"""Comparing the reports of two artifacts: recipe, sites, training, costs, quality."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType

from memc.report import files, training
from memc.report import models as m
from memc.report.layout import lines, stack, table, text
from memc.report.text import layers, number, size

Value = str | int | float | bool | None


def diff(a: m.ReportDocument, b: m.ReportDocument) -> m.DiffDocument:
    """List every fact that the two reports disagree on; times are left out."""
    return m.DiffDocument(a=a.out, b=b.out, differences=list(_differences(a, b)))


def _differences(a: m.ReportDocument, b: m.ReportDocument) -> Iterator[m.Difference]:
    left, right = dict(_facts(a)), dict(_facts(b))
    for key in [*left, *(key for key in right if key not in left)]:
        one, two = left.get(key), right.get(key)
        if one != two:
            yield m.Difference(topic=key[0], name=key[1], a=one, b=two, ratio=_ratio(one, two))


def _ratio(a: Value, b: Value) -> float | None:
    if isinstance(a, bool | str | None) or isinstance(b, bool | str | None) or not a:
        return None
    return b / a


def _facts(report: m.ReportDocument) -> Iterator[tuple[tuple[str, str], Value]]:
    done = report.convert
    yield ("conversion", "finished"), report.finished
    model = done.model if done else report.capture.model if report.capture else None
    if model is not None:
        yield ("model", "source"), model.source
        yield ("model", "digest"), model.digest
    if done is not None:
        for name in ("target", "backend", "weights", "context", "verified", "untrained", "seed"):
            yield ("conversion", name), getattr(done, name)
        yield from _costs(done)
    for index, item in enumerate(report.passes):
        yield (f"pass {index + 1}", "spec"), item.spec
        yield (f"pass {index + 1}", "layers"), layers(site.layer for site in item.sites)
        yield (f"pass {index + 1}", "skipped"), len(item.skipped)
        yield (f"pass {index + 1}", "new parameters"), item.new_parameters
        for relation in item.relations:
            yield (f"pass {index + 1}", relation.metric.replace("_", " ")), relation.value
        if item.training is not None:
            yield from _training(f"training {index + 1}", item.training)
    if report.quality is not None:
        yield from _quality(report.quality)
    for check in report.verify.checks if report.verify else ():
        yield ("check", check.name), check.value


def _quality(document: m.EvalDocument) -> Iterator[tuple[tuple[str, str], Value]]:
    for row in document.by_context:
        yield ("quality", f"perplexity ratio at {row.context}"), row.ratio
        yield ("quality", f"KL mean at {row.context}"), row.kl_mean
    if document.free_running is not None:
        yield ("quality", "free-running equal before"), document.free_running.equal_before
    for task, share in document.sides.get("a", m.EvalSide()).tasks.items():
        yield ("quality", task), share


def _training(topic: str, facts: files.TrainingFacts) -> Iterator[tuple[tuple[str, str], Value]]:
    yield (topic, "tokens"), training.tokens_trained(facts)
    for when, error in training.mean_errors(facts).items():
        yield (topic, f"error {when}"), error
    if facts.choice is not None:
        yield (topic, "layers kept"), layers(facts.choice.kept) or "none"
    if facts.recovery is not None:
        yield (topic, "adapter rank"), facts.recovery.adapter_rank
        yield (topic, "recovery steps"), facts.recovery.steps
        yield (topic, "best step"), facts.recovery.best_step
        if looks := training.held_out_kl(facts.recovery):
            measure = training.guarded(facts.recovery)
            yield (topic, f"held-out {measure} before recovery"), looks[0]
            yield (topic, f"held-out {measure} after recovery"), looks[1]
    if facts.branches is not None and (found := facts.branches.ablation) is not None:
        for branch, distance in found.without.items():
            yield (topic, f"held-out KL, {branch} off"), distance.kl_mean


def _costs(done: m.ConvertDocument) -> Iterator[tuple[tuple[str, str], Value]]:
    yield ("cost", "parameters"), done.predicted.parameters
    yield ("cost", "FLOP per token"), done.predicted.flops_per_token
    yield from _by_context("state bytes", done.predicted.state_bytes)
    yield ("bytes", "fetched for a conversation"), done.predicted.fetched_bytes
    yield from _by_context("predicted ms", done.predicted.decode_ms)
    yield from _by_context("predicted ms of a prompt", done.predicted.prefill_ms)
    if done.measured is not None:
        yield from _by_context("measured ms", done.measured.decode_ms)
        yield ("bytes", "disk"), done.measured.disk_bytes


def _by_context(topic: str, values: Mapping[int, Any]) -> Iterator[tuple[tuple[str, str], Value]]:
    for context, value in sorted(values.items()):
        yield (topic, f"at {context}"), value


def diff_view(document: m.DiffDocument) -> RenderableType:
    """Show where two artifacts differ."""
    if not document.differences:
        return text(f"{document.a} and {document.b} report the same")
    rows = [
        (item.topic, item.name, _side(item, item.a), _side(item, item.b), f"{item.ratio:.3g}x" if item.ratio else "")
        for item in document.differences
    ]
    # Specs and topics are long; numbers and the names of facts stay whole.
    least = {1: max(len(item.name) for item in document.differences)}
    for index in (2, 3):
        sides = [(item.a, item.b)[index - 2] for item in document.differences]
        whole = [len(row[index]) for row, side in zip(rows, sides, strict=True) if not isinstance(side, str)]
        least[index] = max(whole, default=0)
    made = table(["", "", ">a", ">b", ">b/a"], rows, least=least)
    return stack(lines([f"a: {document.a}", f"b: {document.b}"]), made)


def _side(item: m.Difference, value: str | int | float | bool | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool | str):
        return str(value).lower() if isinstance(value, bool) else value
    if "bytes" in item.topic:
        return size(value)
    return number(value) if isinstance(value, float) else str(value)
