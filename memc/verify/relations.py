"""Relations between an original and its rewrite, measured, each with the noise floor beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from memc.errors import MemcError
from memc.evaluate.perplexity import perplexity_of
from memc.program import Program
from memc.relation import Bounded, Close, Exact, Relation
from memc.verify.divergence import token_kl
from memc.verify.execute import PIECE, cut, logits, rows, streams, whole, whole_all
from memc.verify.sites import first_bad_site
from memc.verify.text import VerificationText, take

LENGTHS = (1, 2, 13)
BATCHES = (1, 3)
NO_KL = 1e-6
"""Divergence, in nats a token, under which there is none to speak of."""

ROUNDING = 10.0
"""How many noise floors over its tolerance a difference may be rounding, and is measured again in float64."""


@dataclass(frozen=True)
class CheckResult:
    """One check: it passed when ``value`` is at or under ``budget`` (None measures without promising)."""

    name: str
    value: float
    budget: float | None
    noise_floor: float | None
    passed: bool
    detail: str = ""


def judged(name: str, value: float, budget: float | None, floor: float | None, detail: str) -> CheckResult:
    """Return a check that passed when ``value`` is at or under ``budget``, or finite where nothing is promised."""
    # Written so that not-a-number never passes.
    passed = value <= budget if budget is not None else math.isfinite(value)
    return CheckResult(name, value, budget, floor, passed, detail)


@torch.no_grad()
def noise_floor(program: Program, tokens: Tensor) -> float:
    """Return the largest difference of the logits of ``tokens [B, T]`` between float32 and float64 arithmetic."""
    exact = whole(program, tokens, torch.float64)
    return float((exact - whole(program, tokens).double()).abs().max())


@torch.no_grad()
def check_relation(
    original: Program,
    result: Program,
    relation: Relation,
    text: VerificationText,
    *,
    floor: float | None = None,
    baseline: Callable[[], Program] | None = None,
) -> CheckResult:
    """Measure one relation of ``result`` to ``original`` on ``text``.

    ``floor`` is the noise floor of the original, reported beside differences of logits; a difference that is over its
    tolerance by so little that it may be rounding is measured again in float64, and that decides. ``baseline`` makes
    the program that the ratios to ``window`` compare with. Raises ``ValueError`` for a metric that is not known
    or lacks its baseline.
    """
    match relation:
        case Exact():
            return _check_close(original, result, "exact", 0.0, None, text, floor)
        case Close(tolerance, limit):
            return _check_close(original, result, "close", tolerance, limit, text, floor)
        case Bounded("kl_mean", budget):
            value = kl_mean(original, result, text.tokens)
            return judged("kl_mean", value, budget, 0.0, _kl_detail(text))
        case Bounded("perplexity_ratio", budget):
            return _check_ratio("perplexity_ratio", original, result, budget, text)
        case Bounded("perplexity_ratio_to_window", budget) if baseline is not None:
            return _check_ratio("perplexity_ratio_to_window", baseline(), result, budget, text)
        case Bounded("kl_ratio_to_window", budget) if baseline is not None:
            found, window = kl_mean(original, result, text.tokens), kl_mean(original, baseline(), text.tokens)
            detail = f"{found:.4g} nats a token against {window:.4g} over {text.tokens.numel()} tokens"
            return judged("kl_ratio_to_window", found / max(window, NO_KL), budget, None, detail)
    raise ValueError(f"relation {relation} cannot be measured")


def _check_close(
    original: Program,
    result: Program,
    name: str,
    tolerance: float,
    limit: int | None,
    text: VerificationText,
    floor: float | None,
) -> CheckResult:
    worst, where = _worst(original, result, limit, text, torch.float32)
    detail = f"largest at {where}"
    if tolerance < worst <= tolerance + ROUNDING * (floor or 0.0):
        # So near the noise floor float32 cannot tell a different function from a different order of sums.
        rounded, (worst, where) = worst, _worst(original, result, limit, text, torch.float64)
        detail = f"measured in float64, largest at {where}; {rounded:.3g} in float32"
    if not worst <= tolerance:
        site = first_bad_site(original, result, take(text, 2, min(limit or LENGTHS[-1], LENGTHS[-1])))
        detail += f"; {site}" if site else ""
    return judged(name, worst, tolerance, floor, detail)


def _worst(
    original: Program, result: Program, limit: int | None, text: VerificationText, precision: torch.dtype
) -> tuple[float, str]:
    shapes = list(_shapes(original, limit, text))
    short = [shape for shape in shapes if shape[1] <= PIECE]
    texts = [take(text, *shape) for shape in short]
    pairs = zip(whole_all(original, texts, precision), whole_all(result, texts, precision), strict=True)
    found = [float((before - after).abs().max()) for before, after in pairs]
    longer = [shape for shape in shapes if shape[1] > PIECE]
    found += [_difference(original, result, take(text, *shape), precision) for shape in longer]
    worst, where = -1.0, ""
    for difference, (batch, length) in zip(found, short + longer, strict=True):
        if not difference <= worst:
            worst, where = difference, f"batch {batch}, {length} tokens"
    return worst, where


def _shapes(program: Program, limit: int | None, text: VerificationText) -> Iterator[tuple[int, int]]:
    """Yield batch sizes and lengths: 1, 2, odd, and the most that the relation or the text covers."""
    if not any("T" in spec.shape for spec in program.inputs):
        yield from ((batch, 1) for batch in BATCHES)
        return
    longest = limit or text.tokens.shape[1]
    longest = min(longest, program.model.longest or longest)
    for length in sorted({*(n for n in LENGTHS if n < longest), longest}):
        for batch in BATCHES if length <= LENGTHS[-1] else BATCHES[:1]:
            yield batch, length


def _difference(original: Program, result: Program, tokens: Tensor, precision: torch.dtype) -> float:
    worst = 0.0
    for before, after in _pairs(original, result, tokens, precision):
        difference = float((before - after).abs().max())
        worst = difference if math.isnan(difference) else max(worst, difference)
    return worst


def _pairs(
    original: Program, result: Program, tokens: Tensor, precision: torch.dtype = torch.float32
) -> Iterator[tuple[Tensor, Tensor]]:
    if streams(original) == streams(result):
        most = min(cut(program, tokens.shape[1], PIECE)[0] for program in (original, result))
        both = (logits(program, tokens, precision, most) for program in (original, result))
        yield from zip(*both, strict=True)
    else:
        yield whole(original, tokens, precision), whole(result, tokens, precision)


def _check_ratio(
    name: str, original: Program, result: Program, budget: float | None, text: VerificationText
) -> CheckResult:
    return _ratio(name, perplexity(original, text.tokens), perplexity(result, text.tokens), budget, text)


def _ratio(name: str, before: float, after: float, budget: float | None, text: VerificationText) -> CheckResult:
    detail = f"perplexity {after:.4g} against {before:.4g} over {text.tokens.numel()} tokens"
    return judged(name, after / before, budget, None, detail)


@torch.no_grad()
def perplexity(program: Program, tokens: Tensor) -> float:
    """Return exp of the mean negative log-likelihood of ``tokens [N, L]`` but each row's first, one row at a time."""
    total, count = 0.0, 0
    for row in rows(tokens):
        start = 0
        for part in logits(program, row):
            total, start = total + _nll(part, row, start), start + part.shape[1]
        count += row.shape[1] - 1
    return _perplexity(total, count)


def _nll(part: Tensor, row: Tensor, start: int) -> float:
    """Return the summed negative log-likelihood of ``row [1, L]`` after each token of ``part [1, C, vocab]``."""
    targets = row[0, start + 1 : start + 1 + part.shape[1]]
    return float(F.cross_entropy(part[0, : targets.shape[0]], targets, reduction="sum"))


def _perplexity(total: float, count: int) -> float:
    return perplexity_of(total / max(count, 1))


@torch.no_grad()
def check_text(
    original: Program, result: Program, text: VerificationText, budgets: Mapping[str, float]
) -> list[CheckResult]:
    """Measure ``perplexity_ratio`` and ``kl_mean`` as :func:`check_relation` does, in one run of each program.

    ``budgets`` holds those that are promised, by metric.
    """
    before_nll = after_nll = divergence = 0.0
    for row in rows(text.tokens):
        start = 0
        for before, after in _pairs(original, result, row):
            before_nll += _nll(before, row, start)
            after_nll += _nll(after, row, start)
            divergence += _kl(before, after)
            start += before.shape[1]
    count = text.tokens.shape[0] * (text.tokens.shape[1] - 1)
    before_perplexity, after_perplexity = _perplexity(before_nll, count), _perplexity(after_nll, count)
    ratio = _ratio("perplexity_ratio", before_perplexity, after_perplexity, budgets.get("perplexity_ratio"), text)
    value = divergence / text.tokens.numel()
    return [ratio, judged("kl_mean", value, budgets.get("kl_mean"), 0.0, _kl_detail(text))]


@torch.no_grad()
def kl_mean(original: Program, result: Program, tokens: Tensor) -> float:
    """Return the mean over ``tokens [N, L]`` of KL(original || result) of the next token, in nats."""
    total = 0.0
    for row in rows(tokens):
        for before, after in _pairs(original, result, row):
            total += _kl(before, after)
    return total / tokens.numel()


def _kl(before: Tensor, after: Tensor) -> float:
    return float(token_kl(before.log_softmax(-1), after.log_softmax(-1)).sum())


def _kl_detail(text: VerificationText) -> str:
    return f"nats per token over {text.tokens.numel()} tokens"


def finite(program: Program) -> None:
    """Raise ``MemcError`` E403 naming the first parameter that holds a value that is not finite, and its source."""
    for name, value in program.module.named_parameters():
        if value.is_floating_point() and value.numel():
            low, high = value.detach().aminmax()
            if not (math.isfinite(low) and math.isfinite(high)):
                source = program.provenance[name].source if name in program.provenance else ""
                where = name if source in ("", name) else f"{name}, from {source}"
                raise MemcError("E403", "a parameter holds values that are not finite", where, "check the checkpoint")
