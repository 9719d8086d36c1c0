"""The JSON documents that the commands print: one pydantic model each, with its schema number."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from memc.errors import MemcError
from memc.report.bank import BankUse
from memc.report.facts import (
    BlockFacts,
    CheckFacts,
    Document,
    Facts,
    ModelFacts,
    NearMissFacts,
    RelationFacts,
    Shown,
    SiteFacts,
    SkippedFacts,
)
from memc.report.files import (
    AblationFacts,
    CaptureReport,
    FitFacts,
    PassReportFile,
    RaiseReport,
    TrainingFacts,
    VerifyReport,
)


class ByContext(Facts):
    """What of a program's cost depends on the context, predicted.

    ``bytes_read_per_token`` counts weights and state; ``decode_ms`` is the roofline: the slower of computing and
    reading, plus launches.
    """

    bytes_read_per_token: dict[int, float] = Field(default_factory=dict)
    decode_ms: dict[int, float] = Field(default_factory=dict)
    state_bytes: dict[int, int] = Field(default_factory=dict)


class Predicted(ByContext):
    """Cost of a program on a target, predicted. ``flops_per_token`` is at the shortest context.

    ``fetched_bytes`` are fetched for a conversation, once, and read for each of its tokens, among
    ``bytes_read_per_token``. ``seconds`` is the time of the conversion itself.
    """

    parameters: int
    flops_per_token: float
    flops_by_context: dict[int, float] = Field(default_factory=dict)
    weight_bytes: int = 0
    fetched_bytes: int = 0
    peak_rss_bytes: int | None = None
    disk_bytes: int | None = None
    seconds: float | None = None


class Measured(Facts):
    """What the conversion measured, which ended ``at`` that time (ISO 8601, UTC).

    ``steps`` has the seconds of capture, raise, each pass, lower and verify.
    """

    parameters: int | None = None
    decode_ms: dict[int, float] = Field(default_factory=dict)
    state_bytes: dict[int, int] = Field(default_factory=dict)
    peak_rss_bytes: int | None = None
    disk_bytes: int | None = None
    seconds: float | None = None
    at: str = ""
    steps: dict[str, float] = Field(default_factory=dict)


class PassFacts(Facts):
    """One pass of a conversion. ``sites`` is how many blocks it rewrites; ``rewritten`` lists them.

    ``relation``, ``value`` and ``budget`` repeat the last of ``relations``, which is the one that bounds quality.
    ``trains`` are the stages of training that a conversion has in store for it; ``training`` is what came of them, None
    for what was not trained.
    """

    spec: str
    sites: int
    rewritten: list[SiteFacts] = Field(default_factory=list)
    skipped: list[SkippedFacts] = Field(default_factory=list)
    relation: str = ""
    value: float | None = None
    budget: float | None = None
    relations: list[RelationFacts] = Field(default_factory=list)
    new_parameters: int = 0
    untrained: bool = False
    trains: list[str] = Field(default_factory=list)
    training: TrainingFacts | None = None
    seconds: float | None = None
    resumed: bool = False


class InspectDocument(Document):
    """``memc inspect``."""

    schema_: Literal["memc.inspect/1"] = Field(default="memc.inspect/1", alias="schema")
    model: ModelFacts
    blocks: list[BlockFacts]
    near_misses: list[NearMissFacts] = Field(default_factory=list)
    state_bytes: dict[int, int] = Field(default_factory=dict)
    bytes_read_per_token: dict[int, float] = Field(default_factory=dict)
    flops_per_token: float = 0.0
    flops_by_context: dict[int, float] = Field(default_factory=dict)
    warnings: list[str] = Field(default_factory=list)


class ConvertDocument(Document):
    """``memc convert``; also written as ``report/convert.json`` of the artifact.

    ``original`` is the prediction for the unrewritten program on the same target; ``curves`` have both sides,
    ``original`` and ``converted``, at many contexts. ``untrained`` is true when a pass made parameters that nothing has
    trained. ``fit`` tells how limits were kept, where they chose the passes. ``command`` makes the same again,
    ``next`` lists commands to type.
    """

    schema_: Literal["memc.convert/1"] = Field(default="memc.convert/1", alias="schema")
    out: str
    target: str
    backend: str
    weights: str = "fp32"
    context: int | None = None
    dry_run: bool = False
    model: ModelFacts | None = None
    passes: list[PassFacts] = Field(default_factory=list)
    fit: FitFacts | None = None
    original: Predicted | None = None
    predicted: Predicted
    curves: dict[str, ByContext] = Field(default_factory=dict)
    measured: Measured | None = None
    checks: list[CheckFacts] = Field(default_factory=list)
    verified: bool = False
    untrained: bool = False
    forms: dict[str, str] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    seed: int = 0
    threads: int | None = None
    machine: str = ""
    command: str = ""
    remote_code: bool = False
    warnings: list[str] = Field(default_factory=list)
    next: list[str] = Field(default_factory=list)


class LowerDocument(Document):
    """``memc lower``; also written as ``report/lower.json``. ``forms`` tells what each dialect op was lowered to.

    ``checks`` compare with the artifact it was made from; they are empty where the target cannot run here.
    """

    schema_: Literal["memc.lower/1"] = Field(default="memc.lower/1", alias="schema")
    source: str
    out: str
    target: str
    backend: str
    weights: str
    capacity: int | None = None
    forms: dict[str, str] = Field(default_factory=dict)
    checks: list[CheckFacts] = Field(default_factory=list)
    disk_bytes: int
    seconds: float
    next: list[str] = Field(default_factory=list)


class ExportDocument(Document):
    """``memc export``. ``changed`` are the fields of the configuration that differ from the source's: old and new."""

    schema_: Literal["memc.export/1"] = Field(default="memc.export/1", alias="schema")
    source: str
    out: str
    changed: dict[str, list[Any]] = Field(default_factory=dict)
    parameters: int
    checks: list[CheckFacts] = Field(default_factory=list)
    disk_bytes: int
    seconds: float
    next: list[str] = Field(default_factory=list)


class PositionBucket(Facts):
    """Perplexity of the tokens whose position in their window is in ``[start, end)``."""

    start: int
    end: int
    perplexity: float | None
    tokens: int = 0


class ContextPerplexity(Facts):
    """Perplexity of a text in windows of ``context`` tokens."""

    context: int
    perplexity: float
    tokens: int


class TaskCell(Facts):
    """One task at one length and depth; ``depth`` is None where it means nothing, ``chance`` where it is about 0.

    ``stderr`` is the standard error of ``accuracy`` over samples, None for a single one.
    """

    task: str
    length: int
    depth: float | None = None
    samples: int
    questions: int
    accuracy: float
    stderr: float | None = None
    chance: float | None = None


class EvalSide(Facts):
    """One side of an evaluation. ``tasks`` holds the accuracy of a task over all its ``cells``, questions alike."""

    source: str = ""
    perplexity: float | None = None
    tokens: int = 0
    by_position: list[PositionBucket] = Field(default_factory=list)
    by_context: list[ContextPerplexity] = Field(default_factory=list)
    tasks: dict[str, float] = Field(default_factory=dict)
    cells: list[TaskCell] = Field(default_factory=list)


class Divergence(Facts):
    """How far a is from b on a text in windows of ``context`` tokens; see ``EvalDocument``."""

    context: int
    ratio: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float


class FreeRunningFacts(Facts):
    """Greedy continuation of the same prompts by both sides, each from its own words.

    ``first_difference`` is for each prompt the number of equal tokens before the first that differs; ``equal_before``
    is their mean share of ``new_tokens``, ``equal`` the share of places that hold the same token.
    """

    prompts: int
    prompt_tokens: int
    new_tokens: int
    first_difference: list[int]
    equal_before: float
    equal: float


class EvalDocument(Shown):
    """``memc eval``. ``ratio`` is the perplexity of a over that of b; divergences are of a from b, nats per token.

    What stands outside of ``by_context`` is of the longest window, ``window``. ``samples`` and ``seed`` are of the
    tasks. ``ablations``, by the spec of a trained pass, are of the program before it was lowered.
    """

    schema_: Literal["memc.eval/1"] = Field(default="memc.eval/1", alias="schema")
    sides: dict[str, EvalSide]
    text: str = ""
    window: int | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None
    ratio: float | None = None
    by_context: list[Divergence] = Field(default_factory=list)
    free_running: FreeRunningFacts | None = None
    ablations: dict[str, AblationFacts] = Field(default_factory=dict)
    samples: int | None = None
    seed: int | None = None
    warnings: list[str] = Field(default_factory=list)

    def to_html(self) -> str:
        """Render the evaluation as one page, which needs no network."""
        from memc.report.quality import eval_page

        return eval_page(self)


class BenchRow(Facts):
    """One side at one context: medians over interleaved repetitions; ``state_bytes`` and ``rss_bytes`` afterwards."""

    side: str
    context: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    decode_ms_median: float
    decode_ms_p90: float
    cpu_ms_median: float
    state_bytes: int
    rss_bytes: int


class BenchDocument(Shown):
    """``memc bench``. ``sides`` maps a row's side to what was loaded for it."""

    schema_: Literal["memc.bench/1"] = Field(default="memc.bench/1", alias="schema")
    threads: int
    machine: str = ""
    sides: dict[str, str] = Field(default_factory=dict)
    rows: list[BenchRow]
    warnings: list[str] = Field(default_factory=list)

    def to_html(self) -> str:
        """Render the timings as one page, which needs no network."""
        from memc.report.pictures import bench_page

        return bench_page(self)


class GenerateDocument(Document):
    """``memc generate``. ``stopped`` tells whether a stop token or the length ended it.

    ``fetched_bytes`` is the size of what was fetched, 0 where no bank was given; ``bank`` says what was used of one.
    """

    schema_: Literal["memc.generate/1"] = Field(default="memc.generate/1", alias="schema")
    artifact: str
    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    stopped: Literal["stop", "length"]
    seed: int | None = None
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    state_bytes: int
    fetched_bytes: int = 0
    bank: BankUse | None = None


class OptionFacts(Facts):
    """One option of a pass."""

    name: str
    type: str
    default: Any = None
    help: str = ""
    unit: str = ""
    min: float | None = None
    max: float | None = None
    choices: list[str] = Field(default_factory=list)


class PassRow(Facts):
    """One registered pass. ``does_not_handle`` is that list of its docstring."""

    name: str
    summary: str = ""
    options: list[OptionFacts] = Field(default_factory=list)
    does_not_handle: list[str] = Field(default_factory=list)
    available: bool = True
    reason: str = ""


class PassesDocument(Document):
    """``memc passes``."""

    schema_: Literal["memc.passes/1"] = Field(default="memc.passes/1", alias="schema")
    passes: list[PassRow]


class RecipeRow(Facts):
    """One recipe."""

    name: str
    summary: str
    passes: list[str]
    path: str


class RecipesDocument(Document):
    """``memc recipes``."""

    schema_: Literal["memc.recipes/1"] = Field(default="memc.recipes/1", alias="schema")
    recipes: list[RecipeRow]


class BackendRow(Facts):
    """One registered backend."""

    name: str
    available: bool
    reason: str = ""
    version: str = ""
    weights: list[str] = Field(default_factory=list)


class CoverageRow(Facts):
    """How far one model family comes: tried on a tiny random model."""

    family: str
    captured: bool
    attention: bool
    ffn: bool
    logits: bool
    note: str = ""

    @property
    def complete(self) -> bool:
        """Whether every column is a yes."""
        return self.captured and self.attention and self.ffn and self.logits


class DoctorDocument(Document):
    """``memc doctor``. ``kernels`` maps a runtime's op to the types it has kernels for; ``coverage`` only if asked."""

    schema_: Literal["memc.doctor/1"] = Field(default="memc.doctor/1", alias="schema")
    version: str
    python: str
    machine: str
    threads: int
    packages: dict[str, str | None]
    backends: list[BackendRow]
    kernels: dict[str, list[str]] = Field(default_factory=dict)
    coverage: list[CoverageRow] | None = None
    problems: list[str] = Field(default_factory=list)


class ErrorDocument(Document):
    """What ``--json`` prints instead of a command's own document when it fails. ``log`` holds the traceback."""

    schema_: Literal["memc.error/1"] = Field(default="memc.error/1", alias="schema")
    code: str
    message: str
    where: str = ""
    next: str = ""
    exit_code: int
    log: str = ""

    @classmethod
    def of(cls, error: MemcError, log: str = "") -> ErrorDocument:
        """Describe an error."""
        return cls(
            code=error.code,
            message=error.message,
            where=error.where,
            next=error.next,
            exit_code=int(error.exit_code),
            log=log,
        )


class ReportDocument(Shown):
    """``memc report``: all the report files of one artifact, finished or not.

    ``convert`` is ``report/convert.json`` (there once the conversion is planned), ``quality`` ``report/quality.json``
    (of trained artifacts: a is the artifact, b the original, on held-out text), ``error`` ``report/error.json`` (there
    when it failed).
    """

    schema_: Literal["memc.report/1"] = Field(default="memc.report/1", alias="schema")
    out: str
    finished: bool
    convert: ConvertDocument | None = None
    capture: CaptureReport | None = None
    raising: RaiseReport | None = None
    passes: list[PassReportFile] = Field(default_factory=list)
    verify: VerifyReport | None = None
    quality: EvalDocument | None = None
    error: ErrorDocument | None = None

    def to_html(self) -> str:
        """Render the report as one page, which needs no network."""
        from memc.report.html import render

        return render(self)


class Difference(Facts):
    """One fact that two artifacts disagree on; ``ratio`` is b over a where both are numbers."""

    topic: str
    name: str
    a: str | int | float | bool | None
    b: str | int | float | bool | None
    ratio: float | None = None


class DiffDocument(Document):
    """``memc report diff``."""

    schema_: Literal["memc.diff/1"] = Field(default="memc.diff/1", alias="schema")
    a: str
    b: str
    differences: list[Difference]
