"""How limits were kept, as short text: the same rows for the terminal and the page."""

from __future__ import annotations

from memc.report.files import FitFacts, FitLayer, FitLimit
from memc.report.text import layers, number, ratio, size

LIMITS = ("limit", ">original", ">reached", ">ratio", ">used")
"""Heads of :func:`limit_rows`."""

MOST = 3
"""Blocks that are named for what they lose."""

KINDS = {"attention": "attention", "feed_forward": "feed-forward"}

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
    found: dict[tuple[str, str], list[FitLayer]] = {}
    for one in facts.layers:
        found.setdefault((one.spec, one.kind if not one.spec else ""), []).append(one)
    rows = [
        (
            spec or f"{KINDS[kind]} as it is",
            layers(one.layer for one in where),
            number(sum(one.kl[spec] for one in where)) if spec else "",
        )
        for (spec, kind), where in sorted(found.items())
    ]
    if facts.weights_kl:
        rows.append((f"weights {facts.weights}", "all", number(facts.weights_kl.get(facts.weights, 0.0))))
    return rows


def summary(facts: FitFacts) -> str:
    """Say how far the choice is from the original."""
    moved = f"KL {number(facts.kl_mean)} nats a token, perplexity {number(facts.perplexity_ratio)} times the original's"
    text = f"{facts.tokens} tokens that the choice was not made on"
    return f"{moved}, on {text}; the KL of each alone adds up to {number(facts.kl_expected)}"


def given_up(facts: FitFacts) -> str:
    """Say which limit binds, what is lost for it and where most, and what there would be if it were looser."""
    lost = sorted(((one.kl[one.spec], one) for one in facts.layers if one.spec), key=lambda pair: -pair[0])
    most = [f"{KINDS[one.kind]} {one.layer} {number(kl)}" for kl, one in lost[:MOST]]
    quantised = facts.weights_kl.get(facts.weights)
    most += [f"weights in {facts.weights} {number(quantised)}"] if quantised is not None else []
    told = f"{facts.binds} binds; given up most, nats a token: {', '.join(most) or 'nothing'}"
    if facts.kl_looser is not None:
        told += f"; were it {facts.looser:g} times looser, "
        less = f"{number(facts.kl_looser)} would be lost in place of {number(facts.kl_expected)}"
        told += less if facts.kl_looser < facts.kl_expected else "no less would be lost"
    return told


def _amount(limit: FitLimit, value: float) -> str:
    if limit.limit.startswith("state"):
        return size(value)
    return f"{number(value)} ms" if limit.limit.startswith("decode") else number(value)
