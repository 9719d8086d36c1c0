"""What the commands of ``memc bank`` say, and what a bank gave for a text."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from memc.report.facts import CheckFacts, Document, Facts
from memc.report.text import number, size


class BankLevel(Facts):
    """One level of a bank's tree.

    Sizes are passages a cluster, of clusters that have some; ``balance`` is the largest over the mean of all clusters.
    ``seconds`` is what fetching one record from ``tier`` is predicted to take. ``limit`` is how far from its cluster a
    text may be to count as near.
    """

    level: int
    rank: int
    clusters: int
    empty: int
    trained: int
    smallest: int
    median: float
    largest: int
    balance: float
    limit: float
    record_bytes: int
    level_bytes: int
    tier: str = ""
    seconds: float = 0.0


class BankPassage(Facts):
    """A passage of a cluster and its distance to the centroid."""

    index: int
    source: str
    distance: float
    text: str


class BankCluster(Facts):
    """One cluster, with the passages nearest to its centroid and the sizes of its children."""

    cluster: str
    passages: int
    trained: bool
    children: list[int] = Field(default_factory=list)
    nearest: list[BankPassage] = Field(default_factory=list)


class BankDocument(Document):
    """``memc bank inspect``, and what ``memc bank build`` ends with.

    ``fetched_parameters`` are those of one path in all layers, ``bank_parameters`` those of every record;
    ``predicted_seconds`` is a fetch of a path of which only the pinned levels are in memory.
    """

    schema_: Literal["memc.bank/1"] = Field(default="memc.bank/1", alias="schema")
    bank: str
    model: str
    model_digest: str
    encoder: str
    encoder_width: int
    branch: int
    layers: list[int]
    width: int
    dtype: str
    seed: int
    passages: int
    sources: dict[str, int]
    fetched_parameters: int
    bank_parameters: int
    disk_bytes: int
    predicted_seconds: float
    levels: list[BankLevel]
    cluster: BankCluster | None = None


class BankUse(Facts):
    """What a bank gave for one text, and what it cost.

    ``cluster`` is where descent ended, ``near`` the deepest part of it that the text is near (empty for none),
    ``distances`` and ``limits`` are by level; ``used`` are the records whose units were added.
    """

    bank: str
    cluster: str
    near: str
    distances: list[float]
    limits: list[float]
    used: list[str]
    records_read: int
    bytes_read: int
    retrieve_seconds: float
    fetch_seconds: float

    def line(self) -> str:
        """Say it in one line."""
        cost = f"retrieved in {self.retrieve_seconds * 1000:.3g} ms, fetched in {self.fetch_seconds * 1000:.3g} ms"
        read = f"{self.records_read} records, {size(self.bytes_read)} read; {cost}"
        if not self.near:
            far = f"distance {number(self.distances[0])}, limit {number(self.limits[0])}"
            what = "the generic block" if self.used else "nothing is fetched"
            return f"bank: the prompt is like nothing in it ({far}): {what}; {read}"
        used = f"cluster {', '.join(self.used)}" if self.used else f"nothing of cluster {self.near}"
        return f"bank: {used} (distance {number(self.distances[self.near.count('.')])}); {read}"


class BankFuseDocument(Document):
    """``memc bank fuse``; also written as ``report/fuse.json``.

    ``used`` are the records that became part of the model, ``parameters`` more than it had; ``wider`` the layers whose
    own feed-forward network has their units now, ``beside`` those where they stand beside it.
    """

    schema_: Literal["memc.bank-fuse/1"] = Field(default="memc.bank-fuse/1", alias="schema")
    source: str
    out: str
    bank: str
    used: list[str]
    target: str
    backend: str
    weights: str
    wider: list[int]
    beside: list[int]
    parameters: int
    checks: list[CheckFacts] = Field(default_factory=list)
    disk_bytes: int
    seconds: float
    next: list[str] = Field(default_factory=list)


class BankJob(Facts):
    """One job of a bank's training: a subtree below the root, or ``generic``. Losses are nats a token, in training."""

    job: str
    passages: int
    blocks: int
    steps: int
    tokens: int
    loss_first: float | None = None
    loss_last: float | None = None
    seconds: float = 0.0


class BankHeldOut(Facts):
    """Perplexity of held-out passages of one cluster: without a block, with its own, the generic, and a wrong one."""

    cluster: str
    tokens: int
    original: float
    block: float
    generic: float | None = None
    wrong: float | None = None


class BankTrainDocument(Document):
    """``memc bank train``."""

    schema_: Literal["memc.bank-train/1"] = Field(default="memc.bank-train/1", alias="schema")
    bank: str
    jobs: list[BankJob]
    held_out: list[BankHeldOut] = Field(default_factory=list)

    def ratio(self, side: Literal["block", "generic", "wrong"]) -> float | None:
        """Return perplexity with a block over that without, on all that was held out; None where it was not run."""
        found = [(row.tokens, getattr(row, side), row.original) for row in self.held_out]
        logs = [(tokens, tokens * math.log(value / original)) for tokens, value, original in found if value is not None]
        return math.exp(sum(log for _, log in logs) / sum(tokens for tokens, _ in logs)) if logs else None
