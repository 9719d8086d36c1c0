"""The pipeline: each pass is planned, applied, checked, reported and kept, so that a killed run goes on."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from memc.errors import MemcError
from memc.machine import peak_rss_bytes
from memc.partial import write_whole
from memc.pipeline import Calibration, Pass, PassReport, Plan
from memc.plugins import load_plugin
from memc.program import Program
from memc.program_io import load_program, save_program
from memc.progress import Progress, Silent
from memc.relation import Bounded, Close, Exact, Relation
from memc.report.facts import CONTEXTS, RelationFacts, SiteFacts, SkippedFacts, Timing
from memc.report.files import PassReportFile
from memc.target import Target
from memc.train import Applied, Rewritten, Trainer
from memc.train.parallel import ALONE, Processes
from memc.verify import CheckResult, VerificationText, check_relation, past, require_well_formed

FIRST = 2
"""Number of the first pass's report and stage: 00 is capture, 01 raising."""


@dataclass(frozen=True)
class PassRun:
    """What is known of one pass of a pipeline; ``resumed`` when it was taken over from an earlier run."""

    report: PassReportFile
    resumed: bool = False


@dataclass(frozen=True)
class Pipeline:
    """Passes in order, on a target, checked on a text.

    ``floor`` is the noise floor of the original's logits. ``budgets`` replaces the budgets that the passes declare, by
    metric. With a ``folder``, the result of every verified pass is kept under ``stage-NN`` until the next one is, and
    its report under ``report``. ``calibrate`` gives sequences, so many of so many tokens, to passes that ask for some.
    """

    passes: Sequence[Pass]
    target: Target
    text: VerificationText
    floor: float | None = None
    budgets: Mapping[str, float] = field(default_factory=dict)
    folder: Path | None = None
    progress: Progress = field(default_factory=Silent)
    trainer: Trainer | None = None
    calibrate: Callable[[int, int], Calibration] | None = None

    def run(self, program: Program) -> tuple[Program, list[PassRun]]:
        """Run every pass that an earlier run has not verified and return the last result and all reports.

        Raises ``MemcError``: E307 when a pass matches nothing, E401 when a result is not well formed or not related to
        what the pass was given as declared, E403 when its outputs are not finite.
        """
        done = self._processes.from_leader(self._verified)
        runs = [PassRun(self._read_report(index), resumed=True) for index in range(done)]
        if done:
            assert self.folder is not None
            program = load_program(self._stage(done - 1))
            self.progress.note(f"going on after {self.passes[done - 1].spec}, which is verified")
        for index in range(done, len(self.passes)):
            with self.progress.step(f"pass {self.passes[index].spec}"):
                program, report = self._run_one(index, program)
            runs.append(PassRun(report))
            self._processes.wait()
        return program, runs

    def follow(self, program: Program) -> None:
        """Take part in the training of every pass that another process runs on the same program, and write nothing."""
        done = self._processes.from_leader(self._verified)
        for index in range(done, len(self.passes)):
            if index:
                program = load_program(self._stage(index - 1))
            self._rewrite(index, program)
            self._processes.wait()  # for the leader to have verified and kept it

    @property
    def _processes(self) -> Processes:
        return self.trainer.processes if self.trainer is not None else ALONE

    @property
    def last_stage(self) -> Path | None:
        """The folder of the last result, None when nothing was to be run or kept."""
        return self._stage(len(self.passes) - 1) if self.folder is not None and self.passes else None

    def _run_one(self, index: int, before: Program) -> tuple[Program, PassReportFile]:
        """Run one pass and keep its result; what is returned is what was read back, as a resumed run would."""
        start = time.perf_counter()
        done = self._rewrite(index, before)
        results = [
            # What a pass makes exact it makes so by construction, which changed weights are no part of.
            self._check(done, relation, before, done.program if isinstance(relation, Bounded) else done.transferred)
            for relation in done.report.relations
        ]
        timing = Timing(seconds=time.perf_counter() - start, peak_rss_bytes=peak_rss_bytes())
        document = describe_pass(done.report, done.program, results, timing)
        document = document.model_copy(update={"training": done.facts})
        if self.folder is not None:
            self._write_report(index, document)
        for (relation, result), facts in zip(results, document.relations, strict=True):
            if not result.passed:
                raise _failure(done.pass_, relation, result, facts)
        if self.folder is None:
            return done.program, document
        return self._keep(index, before, done.program), document

    def _rewrite(self, index: int, before: Program) -> Rewritten:
        """Apply a pass, and train where there is something to train and to train on."""
        pass_, found = self.passes[index].resolve(before, self.target)

        def apply(chosen: Pass) -> Applied:
            plan = plan_pass(chosen, before, self.target)
            if self.calibrate is not None and (wanted := chosen.calibrates()) is not None:
                plan = replace(plan, calibration=self.calibrate(*wanted))
            after, report = chosen.apply(before, plan)
            require_well_formed(after, f"after {chosen.spec}")
            return plan, after, report

        plan, after, report = applied = apply(pass_)
        done = Rewritten(pass_, plan, after, report, after, None)
        if self.trainer is not None and report.trains:
            done = self.trainer.train(pass_, before, applied, apply, self._training(index))
            require_well_formed(done.program, f"after training {done.pass_.spec}")
        return replace(done, report=replace(done.report, details={**done.report.details, **found}))

    def _check(
        self, done: Rewritten, relation: Relation, before: Program, after: Program
    ) -> tuple[Relation, CheckResult]:
        if isinstance(relation, Bounded) and relation.metric in self.budgets:
            relation = Bounded(relation.metric, self.budgets[relation.metric])

        def baseline() -> Program:
            return window_baseline(done.pass_, done.plan, before, self.target)

        text = self.text
        if isinstance(relation, Bounded):
            exact = [each.tokens for each in done.report.relations if isinstance(each, Close) and each.tokens]
            text = past(text, max(exact, default=None), before.model.longest)
        result = check_relation(before, after, relation, text, floor=self.floor, baseline=baseline)
        return relation, result

    def _stage(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"stage-{FIRST + index:02d}"

    def _training(self, index: int) -> Path | None:
        return self.folder / f"train-{FIRST + index:02d}" if self.folder is not None else None

    def _report(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / "report" / f"{FIRST + index:02d}-{self.passes[index].name}.json"

    def _write_report(self, index: int, document: PassReportFile) -> None:
        path = self._report(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, document.to_json() + "\n")

    def _read_report(self, index: int) -> PassReportFile:
        return PassReportFile.model_validate_json(self._report(index).read_text())

    def _verified(self) -> int:
        """Return how many passes an earlier run has verified: the rename of a stage's folder is what says so."""
        if self.folder is None:
            return 0
        count = len(self.passes)
        return next((index + 1 for index in reversed(range(count)) if self._stage(index).is_dir()), 0)

    def _keep(self, index: int, before: Program, program: Program) -> Program:
        stage = self._stage(index)
        partial = stage.with_name(stage.name + ".writing")
        shutil.rmtree(partial, ignore_errors=True)
        save_program(program, partial, (before, self._stage(index - 1)) if index else None)
        partial.rename(stage)
        kept = load_program(stage)
        shutil.rmtree(self._training(index) or partial, ignore_errors=True)
        if index:
            shutil.rmtree(self._stage(index - 1), ignore_errors=True)
        return kept


def plan_pass(pass_: Pass, program: Program, target: Target) -> Plan:
    """Plan a pass; raises ``MemcError`` E307 with the reasons when it would rewrite nothing."""
    plan = pass_.plan(program, target)
    if plan.sites:
        return plan
    counts = Counter((rejection.code, rejection.reason) for rejection in plan.rejections)
    reasons = "; ".join(f"{count} x {code}: {reason}" for (code, reason), count in counts.most_common())
    reasons = reasons or "no block of its kind that no earlier pass rewrote"
    hint = "memc inspect MODEL --why shows every block"
    if {code for code, _ in counts} == {"encoder"}:
        hint = f"--recipe dense converts the model as it is; {hint}"
    raise MemcError("E307", f"pass {pass_.name!r} matched nothing: {reasons}", pass_.spec, hint)


def plan_all(
    passes: Sequence[Pass], program: Program, target: Target, *, undecided: bool = False, merges: bool = False
) -> tuple[Program, list[PassReport]]:
    """Plan every pass on what the ones before leave, without running anything; parameters may be fake.

    ``undecided`` plans a pass whose layers training will choose with as many layers, evenly spread. Where training
    ``merges``, what can be recovered is left as it was before. Raises ``MemcError`` E307 as :func:`plan_pass`.
    """
    reports = []
    for pass_ in passes:
        if undecided:
            pass_ = provisional(pass_, program, target)
        after, report = pass_.apply(program, plan_pass(pass_, program, target))
        program = program if merges and report.recovers else after
        reports.append(report)
    return program, reports


def provisional(pass_: Pass, program: Program, target: Target) -> Pass:
    """Return the pass with as many layers staying as training will choose, evenly spread: what a plan can cost."""
    share = pass_.open_share()
    if share is None:
        return pass_
    layers = [site.layer for site in plan_pass(pass_, program, target).sites]
    count = round(share * len(layers))
    return pass_.settle(layers[(2 * index + 1) * len(layers) // (2 * count)] for index in range(count))


def window_baseline(pass_: Pass, plan: Plan, program: Program, target: Target) -> Program:
    """Apply the ``window`` pass with the options it shares with ``pass_``, in the layers and heads of ``plan``."""
    window: type[Pass] = load_plugin("memc.passes", "window")
    # Not what is kept: the plan has its layers and heads, and passes name them in ways of their own.
    own_options, options = ({spec.name for spec in dataclasses.fields(kind)} for kind in (window, pass_))
    baseline = window(**{name: getattr(pass_, name) for name in sorted((own_options & options) - {"keep"})})
    chosen = {(site.layer, site.path): site for site in plan.sites}
    own = baseline.plan(program, target)
    sites = tuple(chosen[site.layer, site.path] for site in own.sites if (site.layer, site.path) in chosen)
    return baseline.apply(program, replace(own, sites=sites))[0]


def describe_pass(
    report: PassReport,
    result: Program,
    checks: Sequence[tuple[Relation, CheckResult]],
    timing: Timing,
) -> PassReportFile:
    """Render what a pass did and what was measured as its report file."""
    return PassReportFile(
        spec=report.spec,
        sites=[SiteFacts(**dataclasses.asdict(site)) for site in report.sites],
        skipped=[SkippedFacts(**dataclasses.asdict(rejection)) for rejection in report.rejections],
        relations=[relation_facts(relation, result) for relation, result in checks],
        details=report.details,
        untrained=report.untrained,
        new_parameters=report.new_parameters,
        parameters=result.parameter_count,
        state_bytes={context: result.state_bytes(context) for context in CONTEXTS},
        timing=timing,
    )


def relation_facts(relation: Relation, check: CheckResult | None = None) -> RelationFacts:
    """Render a declared relation, and what was measured if it was."""
    measured: dict[str, Any] = (
        {"value": check.value, "noise_floor": check.noise_floor, "passed": check.passed} if check else {}
    )
    match relation:
        case Exact():
            return RelationFacts(relation="exact", budget=0.0, **measured)
        case Close(tolerance, tokens):
            return RelationFacts(relation="close", budget=tolerance, tokens=tokens, **measured)
        case Bounded(metric, budget):
            return RelationFacts(relation="bounded", metric=metric, budget=budget, **measured)


def _failure(pass_: Pass, relation: Relation, result: CheckResult, facts: RelationFacts) -> MemcError:
    if math.isnan(result.value) or math.isinf(result.value):
        reason = f"{facts.metric} is not finite after the pass"
        return MemcError("E403", reason, f"{pass_.spec}: {result.detail}", "check the checkpoint and the pass")
    budget = f"over its budget of {result.budget:.3g}" if result.budget is not None else "not a number"
    floor = f", noise floor {result.noise_floor:.3g}" if result.noise_floor is not None else ""
    promise = type(relation).__name__
    reason = f"{promise} does not hold: {facts.metric} is {result.value:.3g}, {budget}{floor}"
    return MemcError("E401", reason, f"{pass_.spec}: {result.detail}", "memc report OUT shows what was measured")
