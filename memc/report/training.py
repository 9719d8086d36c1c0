"""What training was like, as short text: the same rows for the terminal, the page and the comparison."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from memc.report import branches
from memc.report.files import ChoiceFacts, GuardFacts, PassReportFile, RecoveryFacts, TrainingFacts
from memc.report.text import amount, duration, layers, number

STAGES = ("stage", ">steps", ">tokens", ">time", ">tokens/s")
"""Heads of :func:`stage_rows`."""

LAYERS = ("layer", "now", ">untrained", ">first values", ">trained", ">KL if restored")
"""Heads of :func:`layer_rows`."""

LAYERS_NOTE = (
    "untrained, first values, trained: relative squared error of the layer's output on held-out text; "
    "KL if restored: from the original, nats a token, with that layer alone given back"
)

_ERRORS = {"untrained": "untrained", "initial": "first values", "trained": "trained"}


def tokens_trained(training: TrainingFacts) -> int:
    """Return how many tokens were trained on."""
    return sum(stage.tokens for stage in (training.transfer, training.recovery) if stage)


def mean_errors(training: TrainingFacts) -> dict[str, float]:
    """Return the mean error over the layers, by when it was measured."""
    errors = training.transfer.errors if training.transfer else {}
    return {said: fmean(errors[when].values()) for when, said in _ERRORS.items() if errors.get(when)}


def held_out_kl(recovery: RecoveryFacts) -> tuple[float, float] | None:
    """Return the loss on held-out text before recovery and with the parameters that stayed."""
    looks = dict(recovery.guard_kl)
    if 0 not in looks or recovery.best_step not in looks:
        return None
    return looks[0], looks[recovery.best_step]


def stage_rows(training: TrainingFacts) -> list[tuple[str, str, str, str, str]]:
    """Say how long each stage took and how fast it was."""
    rows = []
    if training.transfer:
        rows.append(_stage("transfer", training.transfer.steps, training.transfer.tokens, training.transfer.seconds))
    if training.choice:
        rows.append(("choice of layers", "", "", duration(training.choice.seconds), ""))
    if training.recovery:
        rows.append(_stage("recovery", training.recovery.steps, training.recovery.tokens, training.recovery.seconds))
    if training.branches:
        rows.append(("branches left out", "", "", duration(training.branches.seconds), ""))
    return rows


def _stage(name: str, steps: int, tokens: int, seconds: float) -> tuple[str, str, str, str, str]:
    speed = amount(tokens / seconds) if seconds > 0 else "-"
    return name, str(steps), amount(tokens), duration(seconds), speed


def fact_rows(training: TrainingFacts) -> list[tuple[str, str]]:
    """Say in a few rows what was learned, where it stopped and which layers stayed."""
    rows = [("tokens", f"{amount(tokens_trained(training))} of the {amount(training.tokens)} asked for")]
    if training.device != "cpu":
        rows.append(("trained on", training.device))
    if errors := mean_errors(training):
        said = " -> ".join(f"{number(value)} {when}" for when, value in errors.items())
        count = len(training.transfer.errors["trained"]) if training.transfer and "trained" in errors else 0
        rows.append(("error of a layer", f"{said} (relative squared, held-out text, mean of {count})"))
    if training.choice:
        rows += _choice_rows(training.choice)
    if training.recovery:
        rows += _recovery_rows(training.recovery)
    if training.branches:
        rows += branches.fact_rows(training.branches)
    return rows


def _choice_rows(choice: ChoiceFacts) -> list[tuple[str, str]]:
    alone = choice.kl_restored_alone
    count = f"{len(choice.kept)} of {len(alone)}, {choice.share:.0%} asked for"
    rows = [("layers kept", f"{layers(choice.kept) or 'none'} ({count})")]
    kept = [layer for layer in choice.kept if layer in alone]
    others = [layer for layer in alone if layer not in choice.kept]
    if kept:
        best, last = min(kept, key=alone.__getitem__), max(kept, key=alone.__getitem__)
        said = f"{number(choice.kl_nothing_restored)} with none -> {_alone(choice, best)}"
        rows.append(("KL with one restored", said + (f" ... {_alone(choice, last)}" if last != best else "")))
    if kept and others:
        rows.append(("best not kept", _alone(choice, min(others, key=alone.__getitem__))))
    return rows


def _alone(choice: ChoiceFacts, layer: int) -> str:
    return f"{number(choice.kl_restored_alone[layer])} with layer {layer}"


def _recovery_rows(recovery: RecoveryFacts) -> list[tuple[str, str]]:
    alone = "the memory alone" if recovery.onto == "memory" else "every parameter"
    trained = f"adapters of rank {recovery.adapter_rank}" if recovery.adapter_rank else alone
    rows = [("recovery", f"{trained}, {recovery.steps} steps; the parameters of step {recovery.best_step} stayed")]
    if recovery.onto == "original":
        rows.append(("merged", "into the original: nothing is removed from the result"))
    if looks := held_out_kl(recovery):
        said = f"{number(looks[0])} -> {number(looks[1])} nats a token by recovery"
        rows.insert(0, (f"{guarded(recovery)} on held-out text", said))
    if len(recovery.guard_texts) > 1:
        rows += [(f"of {text.name}", _text_kl(text, recovery.best_step)) for text in recovery.guard_texts]
    return rows


def guarded(recovery: RecoveryFacts) -> str:
    """Name what was measured on held-out text."""
    names = {"result": "KL", "original": "cross-entropy of the smaller model", "memory": "cross-entropy"}
    return names[recovery.onto]


def _text_kl(text: GuardFacts, step: int) -> str:
    looks = dict(text.kl)
    return f"{number(looks.get(0))} -> {number(looks.get(step))}"


def layer_rows(item: PassReportFile, layer: int | None = None) -> list[tuple[str, ...]]:
    """Say of each layer that was trained, or of one, what became of it, its errors, and what restoring it does."""
    training = item.training
    if training is None or training.transfer is None:
        return []
    errors, choice = training.transfer.errors, training.choice
    alone: Mapping[int, float] = choice.kl_restored_alone if choice else {}
    known = sorted({*alone, *(number for values in errors.values() for number in values)})
    rewritten = {site.layer for site in item.sites}
    return [
        (
            str(each),
            "rewritten" if each in rewritten else "kept",
            *(number(errors.get(when, {}).get(each)) for when in ("untrained", "initial", "trained")),
            number(alone.get(each)),
        )
        for each in known
        if layer in (None, each)
    ]


def why_layer(item: PassReportFile, layer: int) -> str | None:
    """Say why training kept a layer or did not; None where training has nothing to say about it."""
    training = item.training
    if training is None or training.transfer is None:
        return None
    if all(layer not in errors for errors in training.transfer.errors.values()):
        return None
    choice = training.choice
    if choice is None or layer not in choice.kl_restored_alone:
        return f"layer {layer}: the options say which layers stay, training was not asked"
    alone = choice.kl_restored_alone
    rank = sorted(alone, key=alone.__getitem__).index(layer) + 1
    verb = "kept" if layer in choice.kept else "rewritten"
    count = len(choice.kept)
    stay = f"of which the first {count} stay" if count > 1 else "of which the first stays" if count else "none stays"
    return (
        f"layer {layer} was {verb}: restoring it alone takes the KL to the original from "
        f"{number(choice.kl_nothing_restored)} to {number(alone[layer])} nats a token, "
        f"rank {rank} of {len(alone)}, {stay}"
    )
