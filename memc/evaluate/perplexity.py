"""Perplexity of a session on a text, and the divergence of two sessions; numpy only, one chunk of logits at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from memc.errors import MemcError

if TYPE_CHECKING:
    from memc.runtime import Session

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

_ROWS = 32
"""Rows of logits in float64 at a time: 32 x 49k x 8 bytes is 12 MB."""
_BUCKETS = 6


@dataclass(frozen=True)
class Bucket:
    """Tokens with ``start`` to ``stop - 1`` tokens before them in their window, and their perplexity."""

    start: int
    stop: int
    tokens: int
    perplexity: float


@dataclass(frozen=True)
class PerplexityResult:
    """How well a text is predicted.

    ``tokens`` were predicted (the first of a window has nothing before it), at ``nll_mean`` nats each; ``perplexity``
    is its exponential. ``by_position`` halves the window again and again: [w/2, w) last, before it [w/4, w/2), and
    so on.
    """

    perplexity: float
    tokens: int
    nll_mean: float
    by_position: list[Bucket]


@dataclass(frozen=True)
class Comparison:
    """Two sessions on the same tokens.

    KL is KL(b || a) in nats per token: b is the reference, a stands in for it. ``kl_p99`` is its 99th percentile over
    tokens, ``top1_agreement`` the share of tokens at which both hold the same token for the likeliest.
    """

    a: PerplexityResult
    b: PerplexityResult
    kl_mean: float
    kl_p99: float
    top1_agreement: float

    @property
    def ratio(self) -> float:
        """Perplexity of a over that of b."""
        return self.a.perplexity / self.b.perplexity


def perplexity(
    session: Session, ids: npt.NDArray[np.integer], window: int, *, stride: int | None = None, limit: int | None = None
) -> PerplexityResult:
    """Predict the tokens ``ids [N]`` in windows of ``window`` tokens, each from an empty state.

    Windows start every ``stride`` tokens (None: ``window``, no overlap); with an overlap only the tokens that no
    earlier window predicted count. ``limit`` uses the first tokens alone. Raises ``MemcError``: E207 fewer than 2
    tokens, E200 a window or stride that makes no sense, E206 a window past the capacity, E208 the artifact is an
    encoder, E403 logits that are not finite.
    """
    session.require_decoder()
    windows = _windows(ids, window, stride, limit)
    tally = _Tally(window)
    for tokens, first in windows:
        for start, logits in session.logit_chunks(tokens[None]):
            for place, rows in _scored(start, logits[0], first, len(tokens)):
                tally.add(place, _nll(_log_softmax(rows, place), tokens, place))
    return tally.result()


def compare(
    session_a: Session,
    session_b: Session,
    ids: npt.NDArray[np.integer],
    window: int,
    *,
    stride: int | None = None,
    limit: int | None = None,
) -> Comparison:
    """Run two sessions over the same windows; ``session_b`` is the reference. Options and errors as ``perplexity``.

    Raises ``MemcError`` E208 also when their vocabularies differ in size.
    """
    session_a.require_decoder()
    session_b.require_decoder()
    windows = _windows(ids, window, stride, limit)
    tally_a, tally_b = _Tally(window), _Tally(window)
    divergence: list[F64] = []
    agreed = 0
    chunk = min(session_a.chunk, session_b.chunk)
    for tokens, first in windows:
        sweep = (session.logit_chunks(tokens[None], chunk=chunk) for session in (session_a, session_b))
        for (start, in_a), (_, in_b) in zip(*sweep, strict=True):
            if in_a.shape != in_b.shape:
                sizes = f"{in_a.shape[2]} and {in_b.shape[2]} tokens"
                raise MemcError("E208", f"vocabularies of {sizes} cannot be compared", str(session_a.folder))
            scored = (_scored(start, logits[0], first, len(tokens)) for logits in (in_a, in_b))
            for (place, rows_a), (_, rows_b) in zip(*scored, strict=True):
                log_a, log_b = _log_softmax(rows_a, place), _log_softmax(rows_b, place)
                tally_a.add(place, _nll(log_a, tokens, place))
                tally_b.add(place, _nll(log_b, tokens, place))
                divergence.append(np.einsum("tv,tv->t", np.exp(log_b), log_b - log_a))
                agreed += int((rows_a.argmax(1) == rows_b.argmax(1)).sum())
    # Rounding may leave a divergence just below 0.
    kl = np.maximum(np.concatenate(divergence), 0.0)
    share = agreed / len(kl)
    return Comparison(tally_a.result(), tally_b.result(), float(kl.mean()), float(np.quantile(kl, 0.99)), share)


class _Tally:
    """Sums of negative log-likelihoods by the number of tokens before each one."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.sums = np.zeros(window)
        self.counts = np.zeros(window, np.int64)

    def add(self, place: int, nll: F64) -> None:
        """Add the tokens predicted by the columns from ``place`` on."""
        self.sums[place + 1 : place + 1 + len(nll)] += nll
        self.counts[place + 1 : place + 1 + len(nll)] += 1

    def result(self) -> PerplexityResult:
        """Return the means."""
        edges = sorted({1, self.window} | {self.window >> n for n in range(1, _BUCKETS) if self.window >> n > 1})
        buckets = []
        for start, stop in pairwise(edges):
            count = int(self.counts[start:stop].sum())
            if count:
                buckets.append(Bucket(start, stop, count, perplexity_of(self.sums[start:stop].sum() / count)))
        total = int(self.counts.sum())
        mean = float(self.sums.sum() / total)
        return PerplexityResult(perplexity_of(mean), total, mean, buckets)


def perplexity_of(nll: float) -> float:
    """Return the perplexity of a mean in nats, bounded: a report has no infinite numbers; not-a-number stays."""
    return math.exp(min(nll, 700.0))


def _windows(ids: npt.NDArray[np.integer], window: int, stride: int | None, limit: int | None) -> list[tuple[I64, int]]:
    """Return the tokens of each window and the first of its columns whose prediction counts."""
    stride = window if stride is None else stride
    if window < 2 or not 1 <= stride <= window or (limit is not None and limit < 2):
        what = f"window {window}, stride {stride} and limit {limit} do not fit"
        raise MemcError("E200", what, next="give a window of at least 2, a stride from 1 to it, a limit of at least 2")
    ids = np.asarray(ids, np.int64)[:limit]
    if len(ids) < 2:
        raise MemcError("E207", f"the text has {len(ids)} tokens, prediction needs at least 2", next="give more text")
    windows = []
    done = 1  # tokens before this one are predicted, or have nothing before them
    for start in range(0, len(ids), stride):
        tokens = ids[start : start + window]
        if start + len(tokens) > done and len(tokens) > 1:
            windows.append((tokens, max(done - start, 1) - 1))
            done = start + len(tokens)
    return windows


def _scored(start: int, logits: F32, first: int, size: int) -> Iterator[tuple[int, F32]]:
    """Yield ``(column, rows of logits)`` of one chunk, a few rows at a time, from ``first`` to the last but one."""
    for place in range(max(start, first), min(start + len(logits), size - 1), _ROWS):
        yield place, logits[place - start : min(place + _ROWS, size - 1) - start]


def _log_softmax(rows: F32, place: int) -> F64:
    """Return log-probabilities ``[T,vocab]`` float64. Raises ``MemcError`` E403 for logits that are not finite."""
    if not np.isfinite(rows).all():
        raise MemcError("E403", f"logits near position {place} are not finite", next="memc report OUT")
    shifted = rows.astype(np.float64)
    shifted -= shifted.max(1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(1, keepdims=True))
    return shifted


def _nll(logs: F64, tokens: I64, place: int) -> F64:
    """Return the negative log-likelihood of the token that follows each column from ``place`` on."""
    return -logs[np.arange(len(logs)), tokens[place + 1 : place + 1 + len(logs)]]
