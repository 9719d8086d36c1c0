"""What running a model says: evaluations, timings, generated text."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from memc.report.facts import Document, Facts, Shown
from memc.report.files import AblationFacts
from memc.report.models.banks import BankUse


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
