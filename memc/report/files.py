"""The files under ``OUT/report`` that a conversion writes on its way, and what they say of training.

Times and memory that differ from run to run are under ``timing``.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from memc.report.facts import (
    BlockFacts,
    CheckFacts,
    Document,
    Facts,
    GateFacts,
    ModelFacts,
    NearMissFacts,
    PositionError,
    RelationFacts,
    SiteFacts,
    SkippedFacts,
    Timing,
)


class CurveFacts(Facts):
    """Losses by name at some steps, each the mean since the point before."""

    steps: list[int] = Field(default_factory=list)
    losses: dict[str, list[float]] = Field(default_factory=dict)


class TransferFacts(Facts):
    """Block-wise transfer. ``errors`` are relative squared errors of each layer's output on held-out text.

    They are keyed by ``untrained``, ``initial`` (first values in closed form) and ``trained``, then by layer;
    ``by_position`` has those of what was trained, by layer.
    """

    steps: int
    tokens: int
    curve: CurveFacts = Field(default_factory=CurveFacts)
    errors: dict[str, dict[int, float]] = Field(default_factory=dict)
    by_position: dict[int, list[PositionError]] = Field(default_factory=dict)
    seconds: float = 0.0


class ChoiceFacts(Facts):
    """Which layers stay as they were: those whose restoration alone leaves the least KL to the original, in nats."""

    kept: list[int]
    share: float
    kl_nothing_restored: float
    kl_restored_alone: dict[int, float]
    seconds: float = 0.0


class GuardFacts(Facts):
    """One held-out text: ``kl`` pairs a step with the KL to the original on it, in nats a token."""

    name: str
    kl: list[tuple[int, float]]


TrainedOnto = Literal["result", "original", "memory"]


class RecoveryFacts(Facts):
    """Recovery of the whole model. ``guard_kl`` pairs a step with the KL to the original, the mean of held-out texts.

    Training stops when that gets worse, or any of ``guard_texts`` worse than at the start; ``best_step`` is the step
    whose parameters stayed. ``adapter_rank`` 0 means that every parameter was trained, or only those of a ``memory``.
    Where adapters were merged ``onto`` the original, or a memory was taught, they learned the text, and cross-entropy
    stands in the place of the KL.
    """

    steps: int
    tokens: int
    adapter_rank: int
    onto: TrainedOnto = "result"
    curve: CurveFacts = Field(default_factory=CurveFacts)
    guard_kl: list[tuple[int, float]] = Field(default_factory=list)
    guard_texts: list[GuardFacts] = Field(default_factory=list)
    best_step: int = 0
    seconds: float = 0.0


class BranchDistance(Facts):
    """How far a model is from the original: ratio of the perplexities, mean KL in nats a token."""

    perplexity_ratio: float | None
    kl_mean: float | None


class AblationFacts(Facts):
    """How far a trained model is from the original, as it is and with a branch left out of every rewritten block.

    ``without`` goes by the names that the pass gives the branches. ``tokens`` of held-out text were measured: those
    past what every block gets right by construction.
    """

    tokens: int
    as_it_is: BranchDistance
    without: dict[str, BranchDistance]


class LayerShare(Facts):
    """Means over ``tokens`` by query head, None for heads that were not rewritten.

    ``carried`` is the share of the mass behind the block's output that its first branch holds in the trained model,
    ``due`` the share that the original gives to what the branch stands for. ``tokens`` are those that have any of it.
    """

    layer: int
    path: str
    tokens: int
    carried: list[float | None]
    due: list[float | None]


class BranchFacts(Facts):
    """What a trained model owes to the ``branches`` of its rewritten blocks; ``shares`` are those of the first one.

    ``stands_for`` says for what of the original. ``notes`` say what could not be told, and why.
    """

    branches: list[str]
    stands_for: str = ""
    ablation: AblationFacts | None = None
    shares: list[LayerShare] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    seconds: float = 0.0


class TrainingFacts(Facts):
    """What training a pass was like. ``tokens`` were asked for; ``branches`` is None where there are none.

    ``transfer`` is None where a pass added nothing, and what it took away was recovered. ``device`` is the processor
    that computed, as its maker names it.
    """

    tokens: int
    device: str = "cpu"
    transfer: TransferFacts | None = None
    choice: ChoiceFacts | None = None
    recovery: RecoveryFacts | None = None
    branches: BranchFacts | None = None


class FitLimit(Facts):
    """One limit of ``--fit``: what the choice reached and what the original has, in bytes, milliseconds, nats or times.

    ``used`` is the share of the limit, at most 1; the limit that uses most of its own is the one that binds.
    """

    limit: str
    reached: float
    original: float
    used: float


class FitLayer(Facts):
    """One block: the setting that was chosen (empty: it stays) and the KL of each alone, in nats a token.

    ``kind`` is attention or feed_forward.
    """

    layer: int
    kind: str = "attention"
    spec: str
    kl: dict[str, float]


class FitFacts(Facts):
    """How a choice was fitted to limits.

    ``kl_expected`` is the sum of the blocks' own and that of the ``weights`` type that was chosen, of which
    ``weights_kl`` has all that are quantised; ``kl_mean`` and ``perplexity_ratio`` were measured on ``tokens`` of text
    that the choice was not made on. ``binds`` is the limit that uses most of its own. Were it ``looser`` by that
    factor, the sum would be ``kl_looser``; None for a limit of quality.
    """

    limits: list[FitLimit]
    layers: list[FitLayer]
    weights: str = ""
    weights_kl: dict[str, float] = Field(default_factory=dict)
    kl_expected: float
    kl_mean: float
    perplexity_ratio: float
    tokens: int
    binds: str = ""
    looser: float = 1.0
    kl_looser: float | None = None
    seconds: float = 0.0


class LayerHeads(Facts):
    """Scores of one layer's query heads on repeated random tokens, and the key-value heads that a pass kept.

    ``induction`` is the mean attention on tokens after an earlier occurrence, ``echo`` that on the occurrences; or
    ``decay`` the area under the attention of the mean query, summed over the mean keys from the farthest on.
    """

    layer: int
    path: str
    kv_heads: int
    induction: list[float] = Field(default_factory=list)
    echo: list[float] = Field(default_factory=list)
    decay: list[float] = Field(default_factory=list)
    kept: list[int]


class HeadFacts(Facts):
    """What tells heads apart that look up earlier tokens, in the ``details`` of a pass that chose by it, as ``heads``.

    ``chance`` is the sum of its scores, the two or the one, that attending to all tokens alike would give.
    """

    chance: float
    layers: list[LayerHeads]


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

    ``details`` holds per-site facts keyed by layer (of a second block of a layer as ``3 (2)``), and under ``heads``
    what :class:`HeadFacts` describes where a pass chose heads. ``parameters`` and ``state_bytes`` are those of the
    result. ``training`` is None for what was not trained.
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

    def of_layer(self, layer: int) -> dict[str, Any]:
        """Return the facts of a layer's blocks."""
        return {key: facts for key, facts in self.details.items() if key.partition(" ")[0] == str(layer)}


class VerifyReport(Document):
    """``report/verify.json``: every check of the lowered artifact against the original. ``text`` says on what.

    ``gates`` tells of each linear memory what it forgets of one sequence of that text.
    """

    schema_: Literal["memc.report.verify/1"] = Field(default="memc.report.verify/1", alias="schema")
    checks: list[CheckFacts]
    text: str = ""
    tokens: int = 0
    gates: list[GateFacts] = Field(default_factory=list)
    timing: Timing = Field(default_factory=Timing)

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)
