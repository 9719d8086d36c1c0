"""What a trained model owes to each branch of its rewritten blocks, as short text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from statistics import fmean

from memc.report.files import AblationFacts, BranchFacts, LayerShare
from memc.report.text import number

ABLATION = ("against the original", ">perplexity ratio", ">KL mean")
"""Heads of :func:`ablation_rows`."""

ABLATION_NOTE = (
    "a branch that is off gives nothing in any rewritten block, and the others stand alone; a model that is as near to "
    "the original without a branch as with it makes no use of that branch"
)

WIDTH = 27
"""Characters of a line of shares: two columns of them and their means fit 80."""


def ablation_rows(facts: AblationFacts) -> list[tuple[str, str, str]]:
    """Say how far the model is from the original as it is, and with each branch off."""
    rows = {"as it is": facts.as_it_is, **{f"{name} off": found for name, found in facts.without.items()}}
    return [(said, number(found.perplexity_ratio), number(found.kl_mean)) for said, found in rows.items()]


def columns(facts: BranchFacts) -> tuple[str, ...]:
    """Return the heads of :func:`share_rows`."""
    return ">layer", ">mean", f"{facts.branches[0]}, by head", ">mean", "original, by head"


def legend(facts: BranchFacts) -> str:
    """Say what the numbers of :func:`share_rows` are."""
    kept = any(None in layer.carried for layer in facts.shares)
    return (
        f"percent of the mass that the {facts.branches[0]} carries in the trained model, and that the original gives "
        f"to {facts.stands_for}, on held-out tokens that have any; . is under 0.5, 99 over 98.5"
        + ", * stays as it was"
        * kept
    )


def share_rows(facts: BranchFacts, layer: int | None = None) -> Iterator[tuple[str, ...]]:
    """Yield a layer's number and both shares, mean and by query head, for one layer or all."""
    for one in facts.shares:
        if layer in (None, one.layer):
            sides = [(_percent(mean(side)), _heads(side)) for side in (one.carried, one.due)]
            yield str(one.layer), *sides[0], *sides[1]


def mean(shares: Iterable[float | None]) -> float:
    """Return the mean of the heads that were rewritten."""
    return fmean(share for share in shares if share is not None)


def fact_rows(facts: BranchFacts) -> list[tuple[str, str]]:
    """Say in a row how much the first branch carries of what is its due, and in others what could not be told."""
    rows = [("not told", note) for note in facts.notes]
    if facts.shares:
        carried, due = (_percent(fmean(map(mean, side))) for side in _sides(facts.shares))
        said = f"carries {carried} % of the mass; the original gives {due} % to {facts.stands_for}"
        rows.insert(0, (facts.branches[0], said))
    return rows


def _sides(shares: Iterable[LayerShare]) -> Iterator[tuple[list[float | None], ...]]:
    return zip(*((share.carried, share.due) for share in shares), strict=True)


def _percent(share: float | None) -> str:
    return "*" if share is None else str(min(round(100 * share), 99) or ".")


def _heads(shares: list[float | None]) -> str:
    cells = [f"{_percent(share):>3}" for share in shares]
    size = WIDTH // 3
    return "\n".join("".join(cells[start : start + size]) for start in range(0, len(cells), size))
