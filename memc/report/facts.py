"""What the documents of the commands and the report files are made of, and what both have in common.

A field may be added under the same schema number; renaming or removing one raises it. Readers ignore fields that they
do not know. Keys named ``{context: ...}`` map a number of tokens to a value.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from memc.report.page import embedded

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


class Shown(Document):
    """Base of the documents that a notebook shows as the page that they have."""

    @abstractmethod
    def to_html(self) -> str:
        """Render the document as one page, which needs no network."""

    def _repr_html_(self) -> str:
        return embedded(self.to_html())


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

    ``parameters`` are those of its projections. ``reason`` says why a block is not ``raised``, or why its mask or bias
    is ``other``.
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
    parameters: int | None = None
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
    """One block that a pass rewrote, but for the key-value heads ``kept``."""

    layer: int
    path: str = ""
    kind: str
    kept: list[int] = Field(default_factory=list)


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


class GateFacts(Facts):
    """Half-lives of a linear memory's gates: the share of all tokens and heads whose is from 2^n tokens on, by n.

    Those under a token count as one, and the last power has all that are longer.
    """

    path: str
    shares: dict[int, float]


class PositionError(Facts):
    """Relative squared error of a block's output on the tokens of a sequence from ``start`` on to before ``end``."""

    start: int
    end: int
    error: float


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
