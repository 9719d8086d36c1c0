"""Every JSON document that memc prints or writes: one pydantic model each, with its schema number.

A field may be added under the same number; renaming or removing one raises it. Readers ignore fields that they do not
know. Keys named ``{context: ...}`` map a number of tokens to a value. Times and memory that differ from run to run are
under ``timing`` in the report files.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from memc.errors import MemcError

CONTEXTS = (512, 4096, 32768)
"""Contexts at which state, cost and time are reported unless others are asked for."""


class Facts(BaseModel):
    """Base of everything below: built by keyword, written by alias, unknown fields ignored."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True, serialize_by_alias=True)


class Document(Facts):
    """Base of the documents: what has a ``schema``."""

    def to_json(self, indent: int | None = 1) -> str:
        """Render the document as JSON text; not-a-number and infinity become null."""
        return self.model_dump_json(by_alias=True, indent=indent)


# Parts that several documents share.


class Timing(Facts):
    """What differs from run to run: seconds, and the peak of resident memory up to then."""

    seconds: float = 0.0
    peak_rss_bytes: int | None = None


class ModelFacts(Facts):
    """The source model. ``digest`` is empty when no weights were read; ``inputs`` are names and shapes."""

    source: str
    digest: str = ""
    parameters: int
    family: str
    vocab_size: int | None = None
    max_positions: int | None = None
    absolute_positions: bool = False
    decoder: bool = True
    inputs: list[str] = Field(default_factory=list)
    remote_code: bool = False


class BlockFacts(Facts):
    """One block of the model. ``window`` is set for sliding windows, ``mask_size`` for chunked and prefix masks too.

    ``reason`` says why a block is not ``raised``, or why its mask or bias is ``other``.
    """

    layer: int
    path: str
    kind: Literal["attention", "cross_attention", "feed_forward", "moe"]
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    scale: float | None = None
    mask: Literal["causal", "sliding_window", "chunked", "prefix", "bidirectional", "other"] | None = None
    window: int | None = None
    mask_size: int | None = None
    bias: Literal["none", "alibi", "relative", "other"] | None = None
    positions: Literal["rotary", "learned", "none", "other"] | None = None
    rotary_size: int | None = None
    softcap: float | None = None
    qk_norm: bool = False
    sink_logits: bool = False
    activation: str | None = None
    gated: bool | None = None
    width: int | None = None
    hidden: int | None = None
    raised: bool = True
    reason: str = ""


class NearMissFacts(Facts):
    """Something that looks like a block and was not raised. ``node`` is a graph node, ``source`` a FILE:LINE."""

    layer: int | None = None
    path: str
    kind: Literal["attention", "feed_forward"]
    nearest: str
    reason: str
    node: str
    source: str


class SiteFacts(Facts):
    """One block that a pass rewrote."""

    layer: int
    path: str = ""
    kind: str


class SkippedFacts(Facts):
    """One block that a pass left alone, and why."""

    layer: int
    path: str = ""
    kind: str
    code: str
    reason: str


class RelationFacts(Facts):
    """One declared relation and what was measured. ``tokens``: it holds for sequences no longer than that.

    ``passed`` is None while it has not been checked. ``noise_floor`` is the same measure between two precisions of
    one model.
    """

    relation: Literal["exact", "close", "bounded"]
    metric: str = "max_abs_logit_difference"
    value: float | None = None
    budget: float | None = None
    noise_floor: float | None = None
    tokens: int | None = None
    passed: bool | None = None


class CheckFacts(Facts):
    """One check of the finished artifact. It passed when ``value`` is at or under ``budget``."""

    name: str
    value: float | None = None
    budget: float | None = None
    noise_floor: float | None = None
    passed: bool
    detail: str = ""

    @property
    def outcome(self) -> str:
        """Say in a word how it went: without a budget there is nothing to pass."""
        if not self.passed:
            return "FAILED"
        return "measured" if self.budget is None else "passed"


class Predicted(Facts):
    """Cost of a program on a target, predicted. ``flops_per_token`` is at the shortest context.

    ``bytes_read_per_token`` counts weights and state; ``decode_ms`` is the roofline: the slower of computing and
    reading, plus launches. ``seconds`` is the time of the conversion itself.
    """

    parameters: int
    flops_per_token: float
    flops_by_context: dict[int, float] = Field(default_factory=dict)
    bytes_read_per_token: dict[int, float] = Field(default_factory=dict)
    decode_ms: dict[int, float] = Field(default_factory=dict)
    state_bytes: dict[int, int] = Field(default_factory=dict)
    weight_bytes: int = 0
    peak_rss_bytes: int | None = None
    disk_bytes: int | None = None
    seconds: float | None = None


class Measured(Facts):
    """What the conversion measured; ``steps`` has the seconds of capture, raise, each pass, lower and verify."""

    parameters: int | None = None
    decode_ms: dict[int, float] = Field(default_factory=dict)
    state_bytes: dict[int, int] = Field(default_factory=dict)
    peak_rss_bytes: int | None = None
    disk_bytes: int | None = None
    seconds: float | None = None
    steps: dict[str, float] = Field(default_factory=dict)


class PassFacts(Facts):
    """One pass of a conversion. ``sites`` is how many blocks it rewrites; ``rewritten`` lists them.

    ``relation``, ``value`` and ``budget`` repeat the last of ``relations``, which is the one that bounds quality.
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
    seconds: float | None = None
    resumed: bool = False


# Documents of the commands.


class InspectDocument(Document):
    """``memc inspect``."""

    schema_: Literal["memc.inspect/1"] = Field(default="memc.inspect/1", alias="schema")
    model: ModelFacts
    blocks: list[BlockFacts]
    near_misses: list[NearMissFacts] = Field(default_factory=list)
    state_bytes: dict[int, int] = Field(default_factory=dict)
    flops_per_token: float = 0.0
    flops_by_context: dict[int, float] = Field(default_factory=dict)
    warnings: list[str] = Field(default_factory=list)


class ConvertDocument(Document):
    """``memc convert``; also written as ``report/convert.json`` of the artifact.

    ``original`` is the prediction for the unrewritten program on the same target. ``untrained`` is true when a pass
    made parameters that nothing has trained. ``next`` lists commands to type.
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
    original: Predicted | None = None
    predicted: Predicted
    measured: Measured | None = None
    checks: list[CheckFacts] = Field(default_factory=list)
    verified: bool = False
    untrained: bool = False
    forms: dict[str, str] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    seed: int = 0
    threads: int | None = None
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


class EvalDocument(Document):
    """``memc eval``. ``ratio`` is the perplexity of a over that of b; divergences are of a from b, nats per token.

    What stands outside of ``by_context`` is of the longest window, ``window``. ``samples`` and ``seed`` are of the
    tasks.
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
    samples: int | None = None
    seed: int | None = None
    warnings: list[str] = Field(default_factory=list)


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


class BenchDocument(Document):
    """``memc bench``. ``sides`` maps a row's side to what was loaded for it."""

    schema_: Literal["memc.bench/1"] = Field(default="memc.bench/1", alias="schema")
    threads: int
    machine: str = ""
    sides: dict[str, str] = Field(default_factory=dict)
    rows: list[BenchRow]
    warnings: list[str] = Field(default_factory=list)


class GenerateDocument(Document):
    """``memc generate``. ``stopped`` tells whether a stop token or the length ended it."""

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


class TargetRow(Facts):
    """One target. ``reason`` says why it is not ``available`` here."""

    name: str
    description: str
    kind: str
    backend: str
    instruction_set: str
    memory_bytes: int | None = None
    memory_bandwidth: float | None = None
    flops: dict[str, float] = Field(default_factory=dict)
    available: bool
    reason: str = ""


class TargetsDocument(Document):
    """``memc targets``."""

    schema_: Literal["memc.targets/1"] = Field(default="memc.targets/1", alias="schema")
    targets: list[TargetRow]


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


# Files under OUT/report.


class CurveFacts(Facts):
    """Losses by name at some steps, each the mean since the point before."""

    steps: list[int] = Field(default_factory=list)
    losses: dict[str, list[float]] = Field(default_factory=dict)


class TransferFacts(Facts):
    """Block-wise transfer. ``errors`` are relative squared errors of each layer's output on held-out text.

    They are keyed by ``untrained``, ``initial`` (first values in closed form) and ``trained``, then by layer.
    """

    steps: int
    tokens: int
    curve: CurveFacts = Field(default_factory=CurveFacts)
    errors: dict[str, dict[int, float]] = Field(default_factory=dict)
    seconds: float = 0.0


class ChoiceFacts(Facts):
    """Which layers stay as they were: those whose restoration alone leaves the least KL to the original, in nats."""

    kept: list[int]
    share: float
    kl_nothing_restored: float
    kl_restored_alone: dict[int, float]
    seconds: float = 0.0


class RecoveryFacts(Facts):
    """Recovery of the whole model. ``guard_kl`` pairs a step with the KL to the original on held-out text.

    Training stops when that gets worse; ``best_step`` is the step whose parameters stayed. ``adapter_rank`` 0 means
    that every parameter was trained.
    """

    steps: int
    tokens: int
    adapter_rank: int
    curve: CurveFacts = Field(default_factory=CurveFacts)
    guard_kl: list[tuple[int, float]] = Field(default_factory=list)
    best_step: int = 0
    seconds: float = 0.0


class TrainingFacts(Facts):
    """What training a pass was like. ``tokens`` were asked for."""

    tokens: int
    transfer: TransferFacts
    choice: ChoiceFacts | None = None
    recovery: RecoveryFacts | None = None


class CaptureReport(Document):
    """``report/00-capture.json``: what was read."""

    schema_: Literal["memc.report.capture/1"] = Field(default="memc.report.capture/1", alias="schema")
    model: ModelFacts
    blocks: list[BlockFacts] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)
    timing: Timing = Field(default_factory=Timing)


class RaiseReport(Document):
    """``report/01-raise.json``: the blocks found, and what was nearly one. ``ops`` counts the dialect ops made."""

    schema_: Literal["memc.report.raise/1"] = Field(default="memc.report.raise/1", alias="schema")
    blocks: list[BlockFacts]
    near_misses: list[NearMissFacts] = Field(default_factory=list)
    ops: dict[str, int] = Field(default_factory=dict)
    timing: Timing = Field(default_factory=Timing)


class PassReportFile(Document):
    """``report/NN-NAME.json``, NN from 02 in the order of the passes: what one pass did and how far the outputs moved.

    ``details`` holds per-site facts keyed by layer. ``parameters`` and ``state_bytes`` are those of the result.
    ``training`` is None for what was not trained.
    """

    schema_: Literal["memc.report.pass/1"] = Field(default="memc.report.pass/1", alias="schema")
    spec: str
    sites: list[SiteFacts]
    skipped: list[SkippedFacts] = Field(default_factory=list)
    relations: list[RelationFacts] = Field(default_factory=list)
    details: dict[str, Any] = Field(default_factory=dict)
    training: TrainingFacts | None = None
    untrained: bool = False
    new_parameters: int = 0
    parameters: int | None = None
    state_bytes: dict[int, int] = Field(default_factory=dict)
    timing: Timing = Field(default_factory=Timing)

    @property
    def name(self) -> str:
        """Name of the pass."""
        return self.spec.partition(":")[0]


class VerifyReport(Document):
    """``report/verify.json``: every check of the lowered artifact against the original. ``text`` says on what."""

    schema_: Literal["memc.report.verify/1"] = Field(default="memc.report.verify/1", alias="schema")
    checks: list[CheckFacts]
    text: str = ""
    tokens: int = 0
    timing: Timing = Field(default_factory=Timing)

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


class ReportDocument(Document):
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
