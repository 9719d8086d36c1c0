"""A model in, a verified artifact out: capture, raise, passes, lowering, and every check on the way."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from memc import machine
from memc.analysis.gates import half_lives
from memc.artifact import seal
from memc.backend import LowerOptions, Runner
from memc.conversion.calibration import CalibrationText
from memc.conversion.facts import ablations, check_facts, pass_facts
from memc.conversion.fitting import fit_recipe
from memc.conversion.folder import OutFolder, folder_bytes, link_folder, require_space, resume_key
from memc.conversion.lowering import chooses_from, lower, require_tuning, require_weights, verify_lowered
from memc.conversion.outcome import next_commands, require_passed
from memc.conversion.pipeline import PassRun, Pipeline
from memc.conversion.planning import capture_and_raise, make_plan, require_memory, write_plan
from memc.conversion.quality import WINDOW, measure_quality
from memc.conversion.raising import check_raising
from memc.conversion.request import Request, Steps, source_name
from memc.conversion.speed import (
    CONTEXTS,
    check_speed,
    decode_times,
    fits_beside,
    lowered_beside,
    measures_speed,
    modelled,
    speed_budgets,
)
from memc.conversion.text import keep_text, require_text_files, text_beside, verification_text
from memc.conversion.training import (
    TrainingData,
    make_trainer,
    require_mergeable,
    require_shareable,
    training_data,
    trains,
)
from memc.cost import SMALL
from memc.data import require_file, source_digest
from memc.errors import MemcError
from memc.fit.limits import read_limits
from memc.frontend import Captured
from memc.pipeline import Pass
from memc.plugins import load_kernels
from memc.program import Program, named_tensors, retie
from memc.program_io import save_program
from memc.progress import Progress, Silent
from memc.raising import Raised
from memc.report.files import VerifyReport
from memc.report.models import ConvertDocument, EvalDocument, Measured
from memc.train.parallel import Processes, joined
from memc.verify import (
    CheckResult,
    VerificationText,
    check_text,
    finite,
    noise_floor,
    past,
    split_invariance,
    streams,
    take,
)
from memc.verify.splits import holds_all_to
from memc.weights import materialize


def convert_model(request: Request, progress: Progress | None = None) -> ConvertDocument:
    """Convert a model as asked and return the document that says what was done; ``OUT`` is whole or not there.

    Where ``torchrun`` has started several processes they share the training, and the first does all the rest; the
    others return what was planned. Raises ``MemcError``: what capture raises, E302 a file beside the weights cannot be
    read, E204 an output is in the way, E306 the model cannot be raised, E307 a pass matches nothing, E401 or E403 a
    check fails, E501 or E502 too little memory or disk, E503 another process is gone, E601 the backend refuses, E602 it
    lacks a tool for the target.
    """
    with joined() as processes:
        return _convert(request, Steps((progress if processes.leads else None) or Silent()), processes)


def _convert(request: Request, steps: Steps, processes: Processes) -> ConvertDocument:
    folder = OutFolder(request.out)
    recipe = request.recipe.to_yaml()
    require_weights(request.backend, request.weights, request.target)
    require_tuning(request.backend, request.target, request.tune)
    if not request.dry_run:
        request.backend.require(request.target)
    for source in request.recipe.data:
        require_file(source)
    limits = read_limits(request.recipe)
    passes = request.recipe.build()
    training = limits is None and trains(request.recipe, passes)
    if not request.dry_run and processes.leads:
        facts = {"source": source_name(request.model), "target": request.target.name, "backend": request.backend.name}
        sources = [*request.recipe.data, *([] if isinstance(request.model, Program) else [request.model])]
        folder.refuse_existing(recipe, facts, force=request.force, sources=sources)
    require_text_files(looked := text_beside(request.model))
    load_kernels()
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    captured, program, raised = capture_and_raise(request, steps)
    require_text_files([path for path in captured.tokenizer_files if path not in looked])
    fitted = None
    if limits is not None:
        require_shareable(request.recipe, training, processes)
        chosen, fitted = fit_recipe(request, limits, captured, raised.program, steps)
        request = replace(request, recipe=chosen)
        recipe, passes = chosen.to_yaml(), chosen.build()
    document = make_plan(request, steps, passes, captured, raised, training)
    document.fit = fitted
    training &= any(facts.trains for facts in document.passes)
    require_mergeable(request.recipe, training, document.passes)
    if request.dry_run:
        quick = _promises_time(request, passes, raised.program)
        found = modelled(document, _speed_budgets(request, passes)) if quick else []
        require_passed(found)
        return document.model_copy(update={"checks": [check_facts(check) for check in found]})
    require_shareable(request.recipe, training, processes)
    make = partial(_Conversion, request, folder, steps, passes, captured, program, raised, document, processes)
    if not processes.leads:
        make(training).follow()
        return document
    require_memory(request, captured, raised.program, document.predicted.weight_bytes)
    # The program once, however many passes, with what they add; and what is lowered.
    timed = document.original is not None and _timed_beside(request, passes, raised.program)
    beside = document.original.weight_bytes if timed and document.original is not None else 0
    require_space(request.out, (document.predicted.disk_bytes or 0) + beside)
    folder.open(_key(request, recipe, captured), fresh=request.fresh)
    try:
        write_plan(folder, recipe, captured, raised, document, steps)
        return make(training).run()
    except MemcError as error:
        folder.write_error(error)
        raise


@dataclass
class _Conversion:
    """The part of a conversion that has weights and writes."""

    request: Request
    folder: OutFolder
    steps: Steps
    passes: list[Pass]
    captured: Captured
    raw: Program
    raised: Raised
    document: ConvertDocument
    processes: Processes
    training: bool
    quality: Callable[..., EvalDocument] | None = None

    def run(self) -> ConvertDocument:
        with self.steps.step("materialize", "read the weights"):
            original = self._load(self.raised.program)
            finite(original)
        progress, trainer = self.steps.progress, None
        if self.training:
            data = self._training_data(original)
            trainer = make_trainer(self.request.recipe, data, original, progress, self.processes)
            self.processes.wait()
        recipe, place = self.request.recipe, self.folder.partial
        sequences = CalibrationText(recipe, original, place, progress)
        with self.steps.step("text", "verification text"):
            looked_at = trainer is None and any(pass_.calibrates() for pass_ in self.passes)
            apart = sequences.held_out() if looked_at else None
            text = keep_text(data.text, place) if trainer else verification_text(recipe, original, place, apart)
            floor = noise_floor(original, take(text, 2, 13))
        with self.steps.step("verify_raise", "verify what was raised"):
            checks = [check_raising(_share(self.raw, original) or self._load(self.raw), original, text, floor)]
            require_passed(checks)
        pipeline = Pipeline(
            self.passes,
            self.request.target,
            text,
            floor,
            _budgets(self.request),
            self.folder.partial,
            progress,
            trainer,
            sequences,
        )
        program, runs = pipeline.run(original)
        self.steps.seconds |= {run.report.spec: run.report.timing.seconds for run in runs}
        with self.steps.step("verify", "verify the result"):
            checks += self._check_result(original, program, text, floor)
        require_passed(checks)
        if trainer is not None:
            windows = [facts["window"] for run in runs for facts in run.report.details.values() if "window" in facts]
            self.quality = partial(measure_quality, original, corpus=data.corpus, window=max(windows, default=WINDOW))
        beside = original if _timed_beside(self.request, self.passes, original) else None
        del original
        return self._lower(program, pipeline.last_stage, runs, checks, text, floor, beside)

    def follow(self) -> None:
        """Take part in the training of what the leading process converts."""
        original = self._load(self.raised.program)
        self.processes.wait()  # for the tokenizer, and what was sampled from the original
        place, progress = self.folder.partial, self.steps.progress
        data = self._training_data(original)
        trainer = make_trainer(self.request.recipe, data, original, progress, self.processes)
        sequences = CalibrationText(self.request.recipe, original, place, progress)
        make = partial(Pipeline, self.passes, self.request.target, data.text, folder=place)
        make(trainer=trainer, calibrate=sequences).follow(original)

    def _training_data(self, original: Program) -> TrainingData:
        transfers = any("transfer" in facts.trains for facts in self.document.passes)
        progress = self.steps.progress
        return training_data(self.request.recipe, original, self.folder.partial, progress, transfers=transfers)

    def _load(self, program: Program) -> Program:
        return materialize(program, self.captured.weights) if self.captured.weights is not None else program

    def _check_result(
        self, original: Program, program: Program, text: VerificationText, floor: float
    ) -> list[CheckResult]:
        if not program.model.decoder:
            return []
        checks = [split_invariance(program, take(text, 3, 11), floor)]
        if self.passes:
            beyond = max(filter(None, (chooses_from(program), holds_all_to(program))), default=None)
            text = past(text, beyond, program.model.longest)
            checks += check_text(original, program, text, _budgets(self.request))
        return checks

    def _lower(
        self,
        program: Program,
        stage: Path | None,
        runs: list[PassRun],
        checks: list[CheckResult],
        text: VerificationText,
        floor: float,
        original: Program | None,
    ) -> ConvertDocument:
        """Lower the program and check it; it is timed beside the ``original`` where there is one."""
        request, place = self.request, self.folder.partial
        options = LowerOptions(request.weights, request.recipe.context, request.threads, request.tune)
        with self.steps.step("lower", f"lower with {request.backend.name}"):
            if stage is None:
                save_program(program, place / "program")
            else:
                link_folder(stage, place / "program")
            shutil.rmtree(place / "lowered", ignore_errors=True)
            lowered, manifest = lower(program, request.backend, request.target, place, options)
        options = replace(options, tune=0, tuned=place)  # what the original is lowered with, to be timed beside it
        runner = None
        if request.backend.runs_here(request.target):
            with self.steps.step("verify_lowered", "verify what was lowered"):
                runner = request.backend.load(place, manifest, request.threads)
                checks += verify_lowered(runner, program, text, request.weights, floor)
            self.steps.seconds["verify"] += self.steps.seconds.pop("verify_lowered")
        speed, times = self._time(original, runner, options) if streams(program) else ([], [])
        checks += speed
        verified = VerifyReport(
            checks=[check_facts(check) for check in checks],
            text=text.origin,
            tokens=text.tokens.numel(),
            gates=half_lives(program, text.tokens[:1]) if program.model.decoder else [],
            timing=self.steps.timing("verify"),
        )
        self.folder.write_report("verify.json", verified)
        require_passed(checks)
        if self.quality is not None and runner is not None:
            with self.steps.step("quality", "measure quality"):
                progress = self.steps.progress
                found = self.quality(manifest, runner, folder=place, seed=request.recipe.seed, progress=progress)
                found.ablations = ablations(runs)
                self.folder.write_report("quality.json", found)
        del runner
        self.folder.clean()
        document = self._describe(program, runs, verified, lowered.forms, times)
        self.folder.write_report("convert.json", document)
        seal(place, manifest)
        self.folder.finish()
        return document

    def _time(
        self, original: Program | None, runner: Runner | None, options: LowerOptions
    ) -> tuple[list[CheckResult], list[dict[int, float]]]:
        """Time what was lowered, in turns with the ``original`` where there is one and memory for it.

        Returns the checks of what passes promise, and milliseconds of a token by context: of the result, of the
        original.
        """
        request, steps = self.request, self.steps
        budgets, checks, dense = _speed_budgets(request, self.passes), list[CheckResult](), None
        with ExitStack() as stack:
            if runner is not None and original is not None and fits_beside(self.document):
                with steps.step("beside", "lower the original, to time it beside the result"):
                    place = self.folder.partial, request.backend, request.target
                    dense = stack.enter_context(lowered_beside(original, *place, options))
            with steps.step("speed", "time the result" + (" beside the original" if dense is not None else "")):
                if original is not None and _promises_time(request, self.passes, original):
                    checks = modelled(self.document, budgets)
                    if runner is not None and dense is not None:
                        checks = check_speed(runner, dense, original.model.vocab_size or 1, budgets)
                return checks, decode_times([one for one in (runner, dense) if one], CONTEXTS, request.threads)

    def _describe(
        self,
        program: Program,
        runs: list[PassRun],
        verified: VerifyReport,
        forms: dict[str, str],
        times: list[dict[int, float]],
    ) -> ConvertDocument:
        out = self.request.out
        measured = Measured(
            parameters=program.parameter_count,
            **dict(zip(("decode_ms", "original_decode_ms"), times, strict=False)),
            state_bytes={context: program.state_bytes(context) for context in self.document.predicted.state_bytes},
            peak_rss_bytes=machine.peak_rss_bytes(),
            disk_bytes=folder_bytes(self.folder.partial),
            seconds=time.perf_counter() - self.steps.start,
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            steps=dict(self.steps.seconds),
        )
        changes: dict[str, Any] = {
            "passes": [pass_facts(run) for run in runs],
            "untrained": any(run.report.untrained for run in runs),
            "measured": measured,
            "checks": verified.checks,
            "verified": verified.passed,
            "forms": forms,
            "next": next_commands(
                out, program, self.folder.partial, runs=self.request.backend.runs_here(self.request.target)
            ),
        }
        return self.document.model_copy(update=changes)


def _share(raw: Program, original: Program) -> Program | None:
    """Give the raw program the tensors of the raised one, None when it has others: no second copy of the model."""
    known = dict(named_tensors(original.module))
    shared = raw.copy()
    values = {name: known[name] for name, _ in named_tensors(shared.module) if name in known}
    if len(values) < len(list(named_tensors(shared.module))):
        return None
    retie(shared.module, values)
    return shared


def _promises_time(request: Request, passes: list[Pass], program: Program) -> bool:
    merges = request.recipe.train is not None and request.recipe.train.onto == "original"  # with nothing taken out
    return measures_speed(passes, program) and not merges


def _timed_beside(request: Request, passes: list[Pass], program: Program) -> bool:
    """Tell whether the original is lowered too, to be timed: where time was promised, and where it costs little."""
    small = 4 * program.parameter_count < SMALL
    return _promises_time(request, passes, program) or (bool(passes) and program.model.decoder and small)


def _speed_budgets(request: Request, passes: list[Pass]) -> dict[str, float]:
    return speed_budgets(passes, _budgets(request))


def _budgets(request: Request) -> dict[str, float]:
    return {str(metric): budget for metric, budget in request.recipe.verify.budgets.items()}


def _key(request: Request, recipe: str, captured: Captured) -> str:
    data = [source_digest(source) for source in request.recipe.data]
    where = [request.target.name, request.backend.name, str(request.threads)]
    return resume_key(recipe, captured.program.model.digest, *where, *data)
