"""How limits were kept, as short text: the same rows for the terminal and the page."""

from __future__ import annotations

from memc.report.files import FitFacts, FitLimit
from memc.report.text import layers, number, ratio, size

LIMITS = ("limit", ">original", ">reached", ">ratio", ">used")
"""Heads of :func:`limit_rows`."""

CHOSEN = ("setting", "layers", ">KL, summed")
"""Heads of :func:`chosen_rows`."""


def limit_rows(facts: FitFacts) -> list[tuple[str, str, str, str, str]]:
    """Say for each limit what was reached; the one that binds is marked."""
    binds = max((one.used for one in facts.limits), default=0.0)
    return [
        (
            one.limit + (" (binds)" if one.used == binds and len(facts.limits) > 1 else ""),
            _amount(one, one.original),
            _amount(one, one.reached),
            ratio(one.reached, one.original),
            f"{100 * one.used:.0f} %",
        )
        for one in facts.limits
    ]


def chosen_rows(facts: FitFacts) -> list[tuple[str, str, str]]:
    """Say which layers got which setting, and the sum of what they lose one at a time, in nats a token."""
    found: dict[str, list[int]] = {}
    for one in facts.layers:
        found.setdefault(one.spec, []).append(one.layer)
    lost = {one.layer: one.kl.get(one.spec, 0.0) for one in facts.layers}
    return [
        (spec or "as it is", layers(where), number(sum(lost[layer] for layer in where)) if spec else "")
        for spec, where in sorted(found.items())
    ]


def summary(facts: FitFacts) -> str:
    """Say how far the choice is from the original."""
    moved = f"KL {number(facts.kl_mean)} nats a token, perplexity {number(facts.perplexity_ratio)} times the original's"
    text = f"{facts.tokens} tokens that the choice was not made on"
    return f"{moved}, on {text}; the layers' own KL add up to {number(facts.kl_expected)}"


def _amount(limit: FitLimit, value: float) -> str:
    if limit.limit.startswith("state"):
        return size(value)
    return f"{number(value)} ms" if limit.limit.startswith("decode") else number(value)
