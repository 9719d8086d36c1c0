"""What ``sparsify:method=em`` costs SmolLM2-135M in fidelity, beside choices of single tokens and of pages.

    python benchmarks/texts.py texts
    python benchmarks/sparse_events.py --texts texts

Rows of 2,048 tokens of an Austen novel and of the Jargon File, in calls of 256; the last 1,024 tokens choose what they
read. Writes ``results/sparse-events-DATE.json`` and ``.md``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from page import grid
from sparse_model import PIECE, TEXTS, applied, original, rows
from sparse_page import conditions, run_on_texts
from torch import Tensor

from memc.program import Program
from memc.verify.execute import positions_of, run

LENGTH, FIRST = 2048, 1024
FIXED = f"budget=256,sinks=4,window=48,dense_below={FIRST}"
CHOICES = (
    "method=em",
    "method=em,contiguity=0.0",
    "method=em,refine=conductance",
    "method=lowbit,rerank=1",
    "method=bounds,rerank=1",
    "method=em,refine=none",
    "method=lowbit,rerank=2",
)


@torch.no_grad()
def later(program: Program, row: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the log-probabilities of the last tokens of a row, and the lengths of the events that are known."""
    state, found = program.new_state(1), []
    for start in range(0, LENGTH, PIECE):
        part = row[None, start : start + PIECE]
        logits, *after = run(program, (part, positions_of(part, start)), state)
        state = tuple(after)
        if start >= FIRST:
            found.append(logits[0].log_softmax(-1))
    held = dict(zip((spec.name for spec in program.states), state, strict=True)).get("event_numbers")
    return torch.cat(found), None if held is None else held[held >= 0].bincount()


def measured(texts: Path, count: int) -> Iterator[dict[str, Any]]:
    """Yield one line for each choice, over ``count`` rows of each text."""
    with tempfile.TemporaryDirectory() as folder:
        program, text = original(Path(folder))
        tokens = [row for file in TEXTS.values() for row in rows(texts / file, text, LENGTH, count)]
    dense = [later(program, row)[0] for row in tokens]
    for choice in CHOICES:
        page = 16 if "bounds" in choice else 64
        sparse = applied(program, f"sparsify:{FIXED},page={page},{choice}")
        total, events = 0.0, list[Tensor]()
        for row, expected in zip(tokens, dense, strict=True):
            found, lengths = later(sparse, row)
            total += float((expected.exp() * (expected - found)).sum())
            events += [] if lengths is None else [lengths.double()]
        line: dict[str, Any] = {"choice": choice, "kl": total / (len(tokens) * (LENGTH - FIRST))}
        if events:
            every = torch.cat(events)
            line |= {"events": len(every), "mean": float(every.mean()), "ones": float((every == 1).double().mean())}
        yield line


def page(document: dict[str, Any]) -> str:
    """Write the page of a run."""
    lines = [
        [
            one["choice"].replace(",", ", "),
            f"{one['kl']:.4f}",
            *((f"{one['events']}", f"{one['mean']:.1f}", f"{one['ones']:.0%}") if "events" in one else ("", "", "")),
        ]
        for one in document["lines"]
    ]
    parts = [
        "# What choices by events cost, SmolLM2-135M",
        conditions(document),
        f"{document['rows']} row(s) of {LENGTH} tokens of each text in calls of {PIECE}, KL to the original in nats a"
        f" token over the last {FIRST}; {FIXED.replace(',', ', ')}. See [README](../README.md).",
        grid(["choice", "KL", "events", "tokens of one, mean", "of one token"], lines),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    run_on_texts(__doc__, "sparse-events", 1, measured, page)
