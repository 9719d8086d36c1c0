"""How the result of a pass relates to what it was given: declared by the pass, checked on the result."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Exact:
    """The outputs are the same bits."""


@dataclass(frozen=True)
class Close:
    """The logits differ by at most ``tolerance`` on every sequence of at most ``tokens`` tokens.

    Absolute, in float32; where that is missed by no more than float32's own noise could account for, float64 decides.
    """

    tolerance: float
    tokens: int | None = None


@dataclass(frozen=True)
class Bounded:
    """A measured ``metric`` stays at or under ``budget``; None measures without promising.

    Metrics: ``perplexity_ratio`` (result over original on the verification text), ``perplexity_ratio_to_window``
    (result over the ``window`` pass with the same window, sinks and layers), ``kl_mean`` (nats per token from the
    original), ``kl_ratio_to_window`` (that over the same of the ``window`` pass).
    """

    metric: str
    budget: float | None


Relation = Exact | Close | Bounded
