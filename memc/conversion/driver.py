"""A model in, a verified artifact out: capture, raise, passes, lowering, and every check on the way."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from memc import __version__, machine
from memc.artifact import seal
from memc.backend import Backend, LowerOptions
from memc.conversion.facts import (
    block_facts,
    check_facts,
    model_facts,
    near_miss_facts,
    op_counts,
    pass_facts,
    planned_facts,
)
from memc.conversion.folder import RECIPE, OutFolder, folder_bytes, link_folder, require_space, resume_key
from memc.conversion.lowering import lower, verify_lowered
from memc.conversion.pipeline import PassRun, Pipeline, plan_all
from memc.conversion.quality import WINDOW, measure_quality
from memc.conversion.text import keep_text, verification_text
from memc.conversion.training import make_trainer, training_data, trains
from memc.cost import SMALL, WORKING, predict
from memc.data import source_digest
from memc.errors import MemcError
from memc.frontend import Captured, capture_source
from memc.frontend.recast import recast
from memc.pipeline import Pass
from memc.plugins import load_kernels
from memc.program import Program, named_tensors, retie
from memc.program_io import save_program
from memc.progress import Progress, Silent
from memc.raising import Raised, raise_program
from memc.recipe import Recipe
from memc.relation import Close
from memc.report.facts import CONTEXTS, Timing
from memc.report.files import CaptureReport, RaiseReport, VerifyReport
from memc.report.models import ConvertDocument, EvalDocument, Measured, Predicted
from memc.target import Target
from memc.verify import (
    CheckResult,
    VerificationText,
    check_relation,
    check_text,
    finite,
    noise_floor,
    require_well_formed,
    split_invariance,
    take,
)
from memc.weights import materialize, program_dtype

RAISE_TOLERANCE = 1e-4
"""Most that raising may change a logit, or ten times the noise floor where that is more."""

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Request:
    """Everything that was asked of a conversion. ``recipe`` is resolved: what the command line adds is in it."""

    model: str | Path | Program
    out: Path
    recipe: Recipe
    target: Target
    backend: Backend
    dry_run: bool = False
    fresh: bool = False
    force: bool = False
    threads: int | None = None
    remote_code: bool = False
    contexts: tuple[int, ...] = CONTEXTS

    @property
    def weights(self) -> str:
        """Type of the lowered weights."""
        return self.recipe.weights or "fp32"


@dataclass
class Steps:
    """The steps of a conversion: who watches, and how long each took."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    start: float = field(default_factory=time.perf_counter)

    @contextmanager
    def step(self, name: str, title: str) -> Iterator[None]:
        """Time one step and show it."""
        begun = time.perf_counter()
        with self.progress.step(title):
            yield
        self.seconds[name] = time.perf_counter() - begun

    def timing(self, name: str) -> Timing:
        """Return what a step took, and the peak of memory so far."""
        return Timing(seconds=self.seconds.get(name, 0.0), peak_rss_bytes=machine.peak_rss_bytes())


def convert_model(request: Request, progress: Progress | None = None) -> ConvertDocument:
    """Convert a model as asked and return the document that says what was done; ``OUT`` is whole or not there.

    Raises ``MemcError``: what capture raises, E204 an output is in the way, E306 the model cannot be raised, E307 a
    pass matches nothing, E401 or E403 a check fails, E501 or E502 too little memory or disk, E601 the backend refuses.
    """
    steps = Steps(progress or Silent())
    folder = OutFolder(request.out)
    recipe = request.recipe.to_yaml()
    if refusal := request.backend.refuses_weights(request.weights, request.target):
        raise MemcError(
            "E601", refusal, f"--weights {request.weights}", f"one of: {', '.join(request.backend.weights)}"
        )
    passes = request.recipe.build()
    training = trains(request.recipe, passes)
    if not request.dry_run:
        facts = {"source": _source(request.model), "target": request.target.name, "backend": request.backend.name}
        folder.refuse_existing(recipe, facts, force=request.force)
    load_kernels()
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    captured, program, raised = _capture_and_raise(request, steps)
    document = _plan(request, steps, passes, captured, raised, training)
    if request.dry_run:
        return document
    _require_memory(request, captured, raised.program, document.predicted.weight_bytes)
    # The program once, however many passes, with what they add; and what is lowered.
    require_space(request.out, document.predicted.disk_bytes or 0)
    folder.open(_key(request, recipe, captured), fresh=request.fresh)
    try:
        _write_plan(folder, recipe, captured, raised, document, steps)
        training &= any(facts.new_parameters for facts in document.passes)
        return _Conversion(request, folder, steps, passes, captured, program, raised, document, training).run()
    except MemcError as error:
        folder.write_error(error)
        raise


def _capture_and_raise(request: Request, steps: Steps) -> tuple[Captured, Program, Raised]:
    with steps.step("capture", f"capture {_source(request.model)}"):
        captured = _capture(request)
        program = captured.program
        if program_dtype(program) in _HALF and _small(program):
            program = recast(program, torch.float32)
    with steps.step("raise", "raise"):
        raised = raise_program(program)
        require_raised(raised)
        require_well_formed(raised.program, "after raising")
    return captured, program, raised


def _capture(request: Request) -> Captured:
    if isinstance(request.model, Program):
        return Captured(request.model, None, {})
    return capture_source(request.model, remote_code=request.remote_code, weights=not request.dry_run)


def require_raised(raised: Raised) -> None:
    """Raise ``MemcError`` E306 for a decoder that does not run on tokens and positions alone, saying why."""
    program = raised.program
    roles = [spec.role for spec in program.inputs]
    if program.model.decoder and roles != ["tokens", "positions"]:
        names = ", ".join(spec.name for spec in program.inputs)
        reason = f"conversion takes decoders of tokens at positions, this one takes {names}"
        raise MemcError("E306", reason, program.model.source, "memc inspect MODEL shows its blocks")
    if program.model.decoder and not program.raised:
        near = raised.near_misses[0] if raised.near_misses else None
        reason = f"{near.nearest}: {near.reason}" if near else "an op mixes tokens in an unknown way"
        where = f"{near.path or near.node} {near.source}".strip() if near else program.model.source
        raise MemcError("E306", reason, where, "memc inspect MODEL --why")


def _plan(
    request: Request, steps: Steps, passes: list[Pass], captured: Captured, raised: Raised, training: bool
) -> ConvertDocument:
    """Plan every pass on what the ones before leave, and predict what the result costs."""
    with steps.step("plan", "plan"):
        planned, reports = plan_all(passes, raised.program, request.target, undecided=training)

        def cost(program: Program) -> Predicted:
            return predict(program, request.target, request.contexts, weights=request.weights, threads=request.threads)

        original, predicted = cost(raised.program), cost(planned)
    return ConvertDocument(
        out=str(request.out),
        target=request.target.name,
        backend=request.backend.name,
        weights=request.weights,
        context=request.recipe.context,
        dry_run=request.dry_run,
        model=model_facts(raised.program, remote_code=request.remote_code),
        passes=[planned_facts(report) for report in reports],
        original=original,
        predicted=predicted,
        untrained=any(report.untrained for report in reports),
        versions={"memc": __version__, "torch": torch.__version__, "python": platform.python_version()},
        seed=request.recipe.seed,
        threads=request.threads,
        remote_code=request.remote_code,
        warnings=_warnings(request, raised.program),
        next=[f"memc convert {_source(request.model)} -o {request.out} (without --dry-run)"] if request.dry_run else [],
    )


def _warnings(request: Request, program: Program) -> list[str]:
    context, limit = request.recipe.context, program.model.max_positions
    if context is None or limit is None or context <= limit:
        return []
    if program.model.absolute_positions:
        hint = f"--context {limit} or less"
        raise MemcError(
            "E206", f"context {context} is past the model's {limit} positions", f"--context {context}", hint
        )
    return [f"beyond_trained: context {context} is past the {limit} positions that the model was trained on"]


def _write_plan(
    folder: OutFolder, recipe: str, captured: Captured, raised: Raised, document: ConvertDocument, steps: Steps
) -> None:
    assert document.model is not None
    (folder.partial / RECIPE).write_text(recipe)
    for path in captured.tokenizer_files:
        shutil.copyfile(path, folder.partial / path.name)
    blocks = [block_facts(block, raised.program) for block in raised.blocks]
    folder.write_report(
        "00-capture.json",
        CaptureReport(model=document.model, blocks=blocks, warnings=document.warnings, timing=steps.timing("capture")),
    )
    folder.write_report(
        "01-raise.json",
        RaiseReport(
            blocks=blocks,
            near_misses=near_miss_facts(raised.near_misses),
            ops=op_counts(raised.program),
            timing=steps.timing("raise"),
        ),
    )
    folder.write_report("convert.json", document)


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
    training: bool
    quality: Callable[..., EvalDocument] | None = None

    def run(self) -> ConvertDocument:
        with self.steps.step("materialize", "read the weights"):
            original = self._load(self.raised.program)
            finite(original)
        progress, trainer = self.steps.progress, None
        if self.training:
            data = training_data(self.request.recipe, original, self.folder.partial, progress)
            trainer = make_trainer(self.request.recipe, data, original, progress)
        with self.steps.step("text", "verification text"):
            recipe, place = self.request.recipe, self.folder.partial
            text = keep_text(data.text, place) if trainer else verification_text(recipe, original, place)
            floor = noise_floor(original, take(text, 2, 13))
        with self.steps.step("verify_raise", "verify what was raised"):
            checks = [self._check_raising(original, text, floor)]
        pipeline = Pipeline(
            self.passes,
            self.request.target,
            text,
            floor,
            {str(metric): budget for metric, budget in self.request.recipe.verify.budgets.items()},
            self.folder.partial,
            progress,
            trainer,
        )
        program, runs = pipeline.run(original)
        self.steps.seconds |= {run.report.spec: run.report.timing.seconds for run in runs}
        with self.steps.step("verify", "verify the result"):
            checks += self._check_result(original, program, text, floor)
        require_passed(checks)
        if trainer is not None:
            windows = [facts["window"] for run in runs for facts in run.report.details.values() if "window" in facts]
            self.quality = partial(measure_quality, original, corpus=data.corpus, window=max(windows, default=WINDOW))
        del original
        return self._lower(program, pipeline.last_stage, runs, checks, text, floor)

    def _load(self, program: Program) -> Program:
        return materialize(program, self.captured.weights) if self.captured.weights is not None else program

    def _check_raising(self, original: Program, text: VerificationText, floor: float) -> CheckResult:
        relation = Close(max(RAISE_TOLERANCE, 10 * floor), tokens=min(33, text.tokens.numel()))
        raw = _share(self.raw, original) or self._load(self.raw)
        check = check_relation(raw, original, relation, text, floor=floor)
        result = CheckResult("raised_logits", *_fields(check))
        require_passed([result])
        return result

    def _check_result(
        self, original: Program, program: Program, text: VerificationText, floor: float
    ) -> list[CheckResult]:
        if not program.model.decoder:
            return []
        checks = [split_invariance(program, take(text, 3, 11), floor)]
        if self.passes:
            budgets = {str(metric): budget for metric, budget in self.request.recipe.verify.budgets.items()}
            checks += check_text(original, program, text, budgets)
        return checks

    def _lower(
        self,
        program: Program,
        stage: Path | None,
        runs: list[PassRun],
        checks: list[CheckResult],
        text: VerificationText,
        floor: float,
    ) -> ConvertDocument:
        request, place = self.request, self.folder.partial
        options = LowerOptions(request.weights, request.recipe.context, request.threads)
        with self.steps.step("lower", f"lower with {request.backend.name}"):
            if stage is None:
                save_program(program, place / "program")
            else:
                link_folder(stage, place / "program")
            shutil.rmtree(place / "lowered", ignore_errors=True)
            lowered, manifest = lower(program, request.backend, request.target, place, options)
        with self.steps.step("verify_lowered", "verify what was lowered"):
            runner = request.backend.load(place, manifest, request.threads)
            checks += verify_lowered(runner, program, text, request.weights, floor)
        self.steps.seconds["verify"] += self.steps.seconds.pop("verify_lowered")
        verified = VerifyReport(
            checks=[check_facts(check) for check in checks],
            text=text.origin,
            tokens=text.tokens.numel(),
            timing=self.steps.timing("verify"),
        )
        self.folder.write_report("verify.json", verified)
        require_passed(checks)
        if self.quality is not None:
            with self.steps.step("quality", "measure quality"):
                progress = self.steps.progress
                found = self.quality(manifest, runner, folder=place, seed=request.recipe.seed, progress=progress)
                self.folder.write_report("quality.json", found)
        del runner
        self.folder.clean()
        document = self._describe(program, runs, verified, lowered.forms)
        self.folder.write_report("convert.json", document)
        seal(place, manifest)
        self.folder.finish()
        return document

    def _describe(
        self, program: Program, runs: list[PassRun], verified: VerifyReport, forms: dict[str, str]
    ) -> ConvertDocument:
        out = self.request.out
        measured = Measured(
            parameters=program.parameter_count,
            state_bytes={context: program.state_bytes(context) for context in self.document.predicted.state_bytes},
            peak_rss_bytes=machine.peak_rss_bytes(),
            disk_bytes=folder_bytes(self.folder.partial),
            seconds=time.perf_counter() - self.steps.start,
            steps=dict(self.steps.seconds),
        )
        changes: dict[str, Any] = {
            "passes": [pass_facts(run) for run in runs],
            "untrained": any(run.report.untrained for run in runs),
            "measured": measured,
            "checks": verified.checks,
            "verified": verified.passed,
            "forms": forms,
            "next": next_commands(out, program),
        }
        return self.document.model_copy(update=changes)


def next_commands(out: str | Path, program: Program) -> list[str]:
    """Return what to type next: only a decoder generates."""
    return [*([f"memc generate {out} --prompt TEXT"] if program.model.decoder else []), f"memc report {out}"]


def require_passed(checks: list[CheckResult]) -> None:
    """Raise ``MemcError`` E401 for the first check that failed, E403 when its value is not finite."""
    for check in checks:
        if not check.passed:
            budget = f", over its budget of {check.budget:.3g}" if check.budget is not None else ""
            code = "E401" if check.value - check.value == 0 else "E403"
            reason = f"check {check.name} failed: {check.value:.3g}{budget}"
            raise MemcError(code, reason, check.detail, "memc report OUT shows what was measured")


def _share(raw: Program, original: Program) -> Program | None:
    """Give the raw program the tensors of the raised one, None when it has others: no second copy of the model."""
    known = dict(named_tensors(original.module))
    shared = raw.copy()
    values = {name: known[name] for name, _ in named_tensors(shared.module) if name in known}
    if len(values) < len(list(named_tensors(shared.module))):
        return None
    retie(shared.module, values)
    return shared


def _fields(check: CheckResult) -> tuple[float, float | None, float | None, bool, str]:
    return check.value, check.budget, check.noise_floor, check.passed, check.detail


def _key(request: Request, recipe: str, captured: Captured) -> str:
    data = [source_digest(source) for source in request.recipe.data]
    where = [request.target.name, request.backend.name, str(request.threads)]
    return resume_key(recipe, captured.program.model.digest, *where, *data)


def _source(model: str | Path | Program) -> str:
    return model.model.source if isinstance(model, Program) else str(model)


def _bytes(program: Program) -> int:
    return sum(value.numel() * value.element_size() for value in program.module.parameters())


def _small(program: Program) -> bool:
    return 4 * program.parameter_count < SMALL


def _require_memory(request: Request, captured: Captured, program: Program, weight_bytes: int) -> None:
    """Refuse what cannot be converted and checked in this machine's memory.

    Parameters that are read from their file as they are used need none of their own; what the backend loads does.
    """
    memory = machine.memory_bytes()
    if memory is None:
        return
    weights, dtype = captured.weights, program_dtype(program)
    converted = dtype != program_dtype(captured.program)
    held = _bytes(program) if weights is None or converted else weights.held_bytes(dtype)
    largest = max((value.numel() for value in program.module.parameters()), default=0)
    rest = held + WORKING * 4 * largest
    if rest + weight_bytes <= memory:
        return
    bytes_of = {kind: _weight_bytes(program, request, kind) for kind in request.backend.weights}
    fitting = [kind for kind, size in bytes_of.items() if rest + size <= memory]
    reason = (
        f"checking the result takes {weight_bytes / 1e9:.1f} GB of memory for its {request.weights} weights and"
        f" {rest / 1e9:.1f} GB beside them, this machine has {memory / 1e9:.1f} GB"
    )
    hint = f"--weights {min(fitting, key=bytes_of.__getitem__)}" if fitting else "convert on a machine with more memory"
    raise MemcError("E501", reason, program.model.source, hint)


def _weight_bytes(program: Program, request: Request, kind: str) -> int:
    return predict(program, request.target, (), weights=kind).weight_bytes
