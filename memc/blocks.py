"""Attention and feed-forward blocks: views over the nodes of a raised program, never copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch.fx import Node


@dataclass(frozen=True)
class Causal:
    """Every token reads itself and everything before it."""


@dataclass(frozen=True)
class SlidingWindow:
    """Every token reads itself and the ``size - 1`` tokens before it."""

    size: int


@dataclass(frozen=True)
class Chunked:
    """Every token reads what precedes it within its own chunk of ``size`` tokens."""

    size: int


@dataclass(frozen=True)
class Prefix:
    """The first ``size`` tokens read one another, the rest is causal."""

    size: int


@dataclass(frozen=True)
class Bidirectional:
    """Every token reads every token."""


@dataclass(frozen=True)
class OtherMask:
    """A mask that no class above describes."""

    reason: str


Mask = Causal | SlidingWindow | Chunked | Prefix | Bidirectional | OtherMask


@dataclass(frozen=True)
class Alibi:
    """Scores get ``slopes[h] * (key position - query position)`` added."""

    slopes: tuple[float, ...]


@dataclass(frozen=True)
class RelativeBias:
    """A learned bias that depends on the distance between query and key."""


@dataclass(frozen=True)
class OtherBias:
    """A bias that no class above describes."""

    reason: str


Bias = Alibi | RelativeBias | OtherBias


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding of query and key: ``size`` rotated channels of a head."""

    size: int
    interleaved: bool
    scaling: float


@dataclass(frozen=True)
class Projection:
    """The linear map that a block's query, key, value or output comes from.

    ``weight`` and ``bias`` are qualified parameter names (``bias`` may be empty); ``rows`` are the weight's output
    channels in the order of the block's ``[head, channel]`` axes, or None when all in plain order;
    ``transposed`` tells that the weight is stored ``[in, out]``.
    """

    node: Node
    weight: str
    bias: str
    rows: tuple[int, ...] | None
    transposed: bool


@dataclass(frozen=True)
class AttentionBlock:
    """One attention over heads.

    ``attention`` is the ``memc::attention`` (or ``full_attention``) node; ``query [B, heads, T, head_dim]``,
    ``key`` and ``value [B, kv_heads, T, head_dim]`` are its inputs, after rotary and query-key norms; ``output`` is the
    value ``[B, heads, T, value_dim]`` that goes to the output projection. ``hidden [B, T, width]`` is what query, key
    and value are projected from, in however many steps, or None when they come from different places.
    ``query_pre_rotary`` and ``key_pre_rotary`` equal query and key where there is no rotary.
    """

    layer: int
    path: str
    kind: Literal["attention", "cross_attention"]
    attention: Node
    query: Node
    key: Node
    value: Node
    output: Node
    hidden: Node | None
    query_pre_rotary: Node
    key_pre_rotary: Node
    projections: dict[str, Projection]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    mask: Mask
    bias: Bias | None
    softcap: float | None
    sink_logits: Node | None
    rotary: Rotary | None
    qk_norm: bool
    kv_source: str
    streamable: bool


@dataclass(frozen=True)
class FeedForwardBlock:
    """One feed-forward network: ``output = down(activation(gate(x)) * up(x))``, or without ``gate``. What ``down``
    projects may be normalised first.

    ``kind`` ``moe`` names a mixture of experts, which is seen and not taken apart: only ``input`` and ``output`` count.
    """

    layer: int
    path: str
    kind: Literal["feed_forward", "moe"]
    input: Node
    output: Node
    up: Node | None
    gate: Node | None
    down: Node | None
    activation: str
    width: int
    hidden: int


@dataclass(frozen=True)
class NearMiss:
    """Something that looks like a block and was not raised: the nearest idiom and what differs, where."""

    path: str
    kind: Literal["attention", "feed_forward"]
    nearest: str
    reason: str
    node: str
    source: str


Block = AttentionBlock | FeedForwardBlock
