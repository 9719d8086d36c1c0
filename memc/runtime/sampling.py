"""Drawing the next token from logits, in float64, the way transformers does: temperature, then top-k, then top-p."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import numpy as np
import numpy.typing as npt

from memc.arguments import whole_number
from memc.errors import MemcError

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Raises ``MemcError`` E200 for a value out of range.

    ``temperature`` divides the logits; 0 takes the likeliest token, the first of equals, which top-k and top-p keep.
    ``top_k`` keeps the k likeliest tokens and what ties with the last of them, None keeps all. ``top_p`` in (0, 1]
    keeps the likeliest tokens whose probabilities first reach it (nucleus sampling, Holtzman et al. 2020).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not (isinstance(self.temperature, Real) and math.isfinite(self.temperature) and self.temperature >= 0):
            raise MemcError("E200", f"temperature is {self.temperature!r}", next="give 0 (greedy) or a positive number")
        if self.top_k is not None:
            whole_number("top_k", self.top_k)
        if not (isinstance(self.top_p, Real) and 0 < self.top_p <= 1):
            raise MemcError("E200", f"top_p is {self.top_p!r}", next="give a number above 0 and at most 1")


def distribution(logits: npt.NDArray[np.floating], sampling: Sampling) -> F64:
    """Return the probabilities ``[vocab]`` float64 that a token is drawn with, for ``logits [vocab]``.

    Raises ``MemcError`` E403 when a logit is not finite.
    """
    probabilities = np.zeros(logits.shape[0])
    kept, weights = _candidates(_finite(logits), sampling)
    probabilities[kept] = weights / weights.sum()
    return probabilities


class Sampler:
    """Draws tokens for the rows of a batch; row r has its own generator, PCG64 seeded with ``seed + r``."""

    def __init__(self, sampling: Sampling, seed: int, rows: int) -> None:
        """Make the generators of ``rows`` rows."""
        self.sampling = sampling
        self.generators = [np.random.Generator(np.random.PCG64(seed + row)) for row in range(rows)]

    def draw(self, row: int, logits: npt.NDArray[np.floating]) -> int:
        """Draw one token of one row from ``logits [vocab]``. Raises ``MemcError`` E403 when one is not finite."""
        kept, weights = _candidates(_finite(logits), self.sampling)
        if len(kept) == 1:
            return int(kept[0])
        total = np.cumsum(weights)
        # The first entry whose cumulative weight is past the draw; rounding may put the draw on the very end.
        place = int(np.searchsorted(total, self.generators[row].random() * total[-1], side="right"))
        last = int(np.searchsorted(total, total[-1], side="left"))
        return int(kept[min(place, last)])


def _finite(logits: npt.NDArray[np.floating]) -> F64:
    if not np.isfinite(logits).all():
        bad = int(np.count_nonzero(~np.isfinite(logits)))
        raise MemcError(
            "E403", f"{bad} of {logits.shape[0]} logits are not finite", next="check the artifact with memc report OUT"
        )
    return logits.astype(np.float64)


def _candidates(scores: F64, sampling: Sampling) -> tuple[npt.NDArray[np.int64], F64]:
    """Return the tokens that may be drawn and their weights (not normalised), in any order."""
    if sampling.temperature == 0:
        return np.array([int(scores.argmax())]), np.ones(1)
    # Subtracting the maximum first keeps a tiny temperature from overflowing.
    scores = (scores - scores.max()) / sampling.temperature
    kept = np.arange(scores.shape[0])
    if sampling.top_k is not None and sampling.top_k < scores.shape[0]:
        kept = np.flatnonzero(scores >= np.partition(scores, -sampling.top_k)[-sampling.top_k])
    weights = np.exp(scores[kept])
    if sampling.top_p < 1:
        chosen = _nucleus(weights / weights.sum(), sampling.top_p)
        kept, weights = kept[chosen], weights[chosen]
    return kept, weights


def _nucleus(probabilities: F64, top_p: float) -> npt.NDArray[np.int64]:
    """Return the indices kept by top-p: in rising order those whose cumulative sum is above ``1 - top_p``."""
    # Tokens below (1 - p)/V sum to less than 1 - p, so all of them go: only the others need sorting.
    likely = np.flatnonzero(probabilities >= (1 - top_p) / probabilities.shape[0])
    rest = 1.0 - probabilities[likely].sum()
    order = likely[np.argsort(probabilities[likely], kind="stable")]
    above = rest + np.cumsum(probabilities[order]) > 1 - top_p
    above[-1] = True
    kept: npt.NDArray[np.int64] = order[above]
    return kept
