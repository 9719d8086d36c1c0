"""Artifacts from artifacts: another target, backend or weight type, or a changed program, of one that is there."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memc.artifact import MANIFEST, read_manifest, seal
from memc.backend import Backend, LowerOptions, Runner
from memc.conversion.facts import check_facts
from memc.conversion.folder import OutFolder, folder_bytes, require_space, resume_key
from memc.conversion.lowering import (
    CHOSEN_ROWS,
    chosen_rows,
    lower,
    past_training,
    require_tuning,
    require_weights,
    verify_lowered,
)
from memc.conversion.outcome import next_commands, require_passed
from memc.conversion.speed import SPEED_CHECKS
from memc.cost import curve, predict
from memc.doctor import require_backend
from memc.errors import MemcError
from memc.plugins import load_kernels, load_plugin
from memc.program import Program
from memc.program_io import load_program
from memc.progress import Progress, Silent
from memc.report.facts import CheckFacts
from memc.report.models import LowerDocument
from memc.report.read import read_report
from memc.target import Target, get_target
from memc.verify import CheckResult, noise_floor, sample_text, take

PROGRAM = "program"
LOWERED_CHECKS = ("lowered_logits", "lowered_choice", "weights_perplexity_ratio", *SPEED_CHECKS)
NOT_COPIED = shutil.ignore_patterns("lowered", "log", MANIFEST, "lower.json", "report.html")


def lower_again(
    source: Path,
    out: Path,
    *,
    target: str | None = None,
    backend: str | None = None,
    weights: str | None = None,
    context: int | None = None,
    threads: int | None = None,
    force: bool = False,
    tune: int = 0,
    progress: Progress | None = None,
) -> LowerDocument:
    """Make the artifact ``out`` from the program of the artifact ``source``; ``out`` is whole or not there.

    ``target`` None is the source's, and ``backend`` None then too; of a target that is given it is that one's own.
    ``weights`` None is the source's where the backend takes it, else the backend's first; ``context`` None is the
    source's capacity. ``tune`` is how many other tiles are timed for each kind of product (backend ``tvm``); with 0
    what was timed for the source is used where it holds. What was lowered is checked against the program where this
    machine runs it. Raises ``MemcError``: E309 the source is no artifact, E402 a file of it has changed, E204 ``out``
    is in the way, E202 unknown names, E200 there is nothing to tune, E601 and E602 the backend refuses or is missing,
    E401 the check fails, E502 too little disk.
    """
    began, watching = time.perf_counter(), progress or Silent()
    manifest = read_manifest(source, verify=True, unread="lowered")
    hardware = get_target(target or manifest.target)
    asked = backend or (manifest.backend if target is None else None)
    chosen: Backend = load_plugin("memc.backends", require_backend(hardware, asked))()
    taken = chosen.taken_weights(hardware) or chosen.weights
    kind = weights or (manifest.weights if manifest.weights in taken else taken[0])
    require_weights(chosen, kind, hardware)
    require_tuning(chosen, hardware, tune)
    chosen.require(hardware)
    options = LowerOptions(kind, context if context is not None else manifest.capacity, threads, tune, source)
    folder = require_out(source, out, force=force)
    copy_artifact(source, folder, "lower")
    document = LowerDocument(
        source=str(source),
        out=str(out),
        target=hardware.name,
        backend=chosen.name,
        weights=kind,
        disk_bytes=0,
        seconds=0.0,
    )
    with undone(folder):
        load_kernels()
        program = load_program(folder.partial / PROGRAM)
        for warning in past_training(context, program):
            watching.note(f"warning: {warning}")
        made = lower_copy(document, folder, program, chosen, hardware, options, watching)
    found = {"disk_bytes": folder_bytes(folder.partial), "seconds": time.perf_counter() - began}
    runs = chosen.runs_here(hardware)
    made_at, made_from = shlex.quote(str(out)), shlex.quote(str(source))
    then = [f"memc bench {made_at} --against {made_from}" if runs else f"memc report {made_at}"]
    document = made.model_copy(update={**found, "next": then})
    folder.write_report("lower.json", document)
    folder.finish()
    return document


def require_out(source: Path, out: Path, *others: str | Path, force: bool) -> OutFolder:
    """Return the folder ``out`` of an artifact made from ``source`` and ``others``; nothing is touched yet.

    Raises ``MemcError`` E204 when it is in the way and E502 for too little disk.
    """
    folder = OutFolder(out)
    folder.refuse_existing("", {"lowered": ""}, force=force, sources=(source, *others))
    require_space(out, 2 * folder_bytes(source / PROGRAM))
    return folder


def copy_artifact(source: Path, folder: OutFolder, what: str) -> None:
    """Put everything but what was lowered into a fresh ``OUT.partial``, which ``what`` is to be done in."""
    folder.open(resume_key(what, str(source)), fresh=True)
    shutil.copytree(source, folder.partial, ignore=NOT_COPIED, dirs_exist_ok=True)


@contextmanager
def undone(folder: OutFolder) -> Iterator[None]:
    """Write an error down in the folder that it leaves unfinished."""
    try:
        yield
    except MemcError as error:
        folder.write_error(error)
        raise


def lowering_of(made: Any) -> LowerDocument:
    """Return the document of lowering for one that says what else was made of an artifact, and lowered."""
    names = ("source", "out", "target", "backend", "weights", "disk_bytes", "seconds")
    return LowerDocument(**{name: getattr(made, name) for name in names})


def lower_copy(
    document: LowerDocument,
    folder: OutFolder,
    program: Program,
    backend: Backend,
    target: Target,
    options: LowerOptions,
    progress: Progress,
    more: Callable[[Runner | None], list[CheckFacts]] = lambda _: [],
) -> LowerDocument:
    """Lower a copied artifact's ``program``, check it where it runs, make its reports speak of it, and seal it.

    ``more`` gives checks to add, from what was lowered, or from None where that does not run here. Raises ``MemcError``
    E401 and E601.
    """
    with progress.step(f"lower with {backend.name}"):
        lowered, manifest = lower(program, backend, target, folder.partial, options)
    checks: list[CheckResult] = []
    runner: Runner | None = None
    runs = backend.runs_here(target)  # a program for other hardware cannot be run here
    if runs:
        with progress.step("verify what was lowered"):
            text = sample_text(program, 0)
            floor = noise_floor(program, take(text, 2, 13))
            runner = backend.load(folder.partial, manifest, options.threads)
            checks = verify_lowered(runner, program, text, options.weights, floor)
            require_passed(checks)
    facts = [*(check_facts(check) for check in checks), *more(runner)]
    _rewrite_reports(document, folder, program, target, facts, runs=runs)
    seal(folder.partial, manifest)
    return document.model_copy(update={"capacity": lowered.capacity, "forms": lowered.forms, "checks": facts})


def _rewrite_reports(
    document: LowerDocument,
    folder: OutFolder,
    program: Program,
    target: Target,
    checks: list[CheckFacts],
    *,
    runs: bool,
) -> None:
    """Make the copied reports speak of the new artifact: what was lowered before is no longer in it."""
    report = read_report(folder.partial)
    if report.convert is None or report.verify is None:
        return
    replaced = {*LOWERED_CHECKS, *(check.name for check in checks)}
    kept = [check for check in report.verify.checks if check.name not in replaced]
    rows = chosen_rows(program, document.weights)
    warnings = [warning for warning in report.convert.warnings if not warning.startswith(CHOSEN_ROWS)]
    changes = {
        "warnings": [*warnings, *([rows] if rows else [])],
        **{name: getattr(document, name) for name in ("out", "target", "backend", "weights")},
        "predicted": predict(program, target, weights=document.weights),
        "curves": {"converted": curve(program, target, weights=document.weights)},
        "original": None,
        "measured": None,
        "checks": kept + checks,
        "next": next_commands(document.out, program, folder.partial, runs=runs),
    }
    folder.write_report("convert.json", report.convert.model_copy(update=changes))
    folder.write_report("verify.json", report.verify.model_copy(update={"checks": kept + checks}))
