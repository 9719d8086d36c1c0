"""How much of the softmax of SmolLM2-135M what is chosen holds, beside the bytes that choosing and reading take.

    python benchmarks/texts.py texts
    python benchmarks/sparse_mass.py --texts texts

Rows of 2,048 tokens of an Austen novel and of the Jargon File run through the original; every seventh of the last 1,024
tokens chooses in every layer, from the queries and keys of that run. Writes ``results/sparse-mass-DATE.json`` and
``.md``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from page import grid
from sparse_model import TEXTS, original, rows
from sparse_page import conditions, run_on_texts
from torch import Tensor
from torch.fx import Interpreter, Node

from memc.dialect import arguments
from memc.dialect.refreshed_attention import RefreshedAttention
from memc.dialect.sparse_attention import SparseAttention
from memc.kernels.refreshed_attention.choose import Choices
from memc.kernels.sparse_attention.choose import Rule, describe, narrowed
from memc.kernels.sparse_attention.reference import find_sequences
from memc.program import Program
from memc.verify.execute import positions_of

LENGTH, FIRST, EVERY = 2048, 1024, 7
SINKS, WINDOW = 4, 48
ORACLE = {"method": "bounds", "page": 16, "budget": 256, "rerank": LENGTH // 256}
CHOICES: list[dict[str, Any]] = [
    ORACLE,
    *({"method": "bounds", "page": 16, "budget": 256, "rerank": 1, "refresh": n} for n in (1, 2, 4, 8, 16)),
    *({"method": "hip", "page": 16, "budget": budget, "rerank": 1} for budget in (256, 336, 384)),
    *({"method": "hip", "page": page, "budget": 256, "rerank": 1} for page in (8, 4)),
    {"method": "hip", "page": 4, "budget": 192, "rerank": 1},
    {"method": "hip", "page": 4, "budget": 256, "rerank": 1, "refresh": 8},
    *({"method": method, "page": 16, "budget": 256, "rerank": 2} for method in ("bounds", "hip")),
    {"method": "hip", "page": 4, "budget": 256, "rerank": 2},
    *({"method": "lowbit", "page": 64, "budget": 256, "rerank": 2, "refresh": n} for n in (1, 8)),
    *({"method": "moments", "page": 16, "budget": 256, "rerank": 1, "mass": mass} for mass in (1.0, 0.9, 0.7)),
    {"method": "moments", "page": 16, "budget": 512, "rerank": 1, "mass": 0.9},
    {"method": "bounds", "page": 16, "budget": 256, "rerank": 1, "mass": 0.7},
    *({"method": "moments", "page": 16, "budget": budget, "rerank": 1} for budget in (224, 464)),
    {"method": "bounds", "page": 16, "budget": 176, "rerank": 1},
]


class _Attended(Interpreter):
    """Keeps the queries and keys of every attention."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self.found: list[tuple[Tensor, Tensor, float]] = []

    def run_node(self, n: Node) -> Any:
        """Run a node; of an attention keep what it scores."""
        if n.target is torch.ops.memc.attention.default:
            a = arguments(n)
            self.found.append((self.env[a["query"]], self.env[a["key"]], a["scale"]))
        return super().run_node(n)


def attended(program: Program, row: Tensor) -> list[tuple[Tensor, Tensor, float]]:
    """Return queries, keys and scale of every attention of a run over the tokens of ``row``."""
    run = _Attended(program)
    run.run(row[None], positions_of(row[None], 0), *program.new_state(1))
    return run.found


def rule_of(choice: dict[str, Any], scale: float, size: int) -> Rule:
    """Return how a choice is made."""
    sizes = {"sinks": SINKS, "window": WINDOW, "dense_below": FIRST, "channels": size // 8}
    return Rule(scale=scale, **sizes, **choice)


def mass(query: Tensor, key: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Return the share ``[H,T]`` of the softmax of each asked token that it reads, and how many tokens ``[G,T]``."""
    positions = torch.arange(LENGTH)[None]
    sequence = find_sequences(positions, positions[:, :0], LENGTH)[-1]
    pages = describe(key.unflatten(2, (-1, rule.page)), rule.method)
    none = torch.full((1, key.shape[1], rule.most), -1)
    scaled = query * rule.scale
    choices = Choices.of(scaled, pages, positions, sequence, none, LENGTH, rule)
    asked = slice(FIRST, LENGTH, EVERY)
    at = positions[:, asked]
    taken = choices.candidates(asked, at, LENGTH // rule.unit, rule)
    read = narrowed(scaled[:, :, asked], key, taken, at, rule)
    return of_softmax(scaled[:, :, asked], key, read, at), read.sum(-1)[0]


def of_softmax(query: Tensor, key: Tensor, read: Tensor, at: Tensor) -> Tensor:
    """Return the share ``[H,T]`` that what is ``read [1,G,T,L]`` has of the softmax of queries, times the scale."""
    repeat = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(repeat, 1).mT
    later = torch.arange(key.shape[2]) > at[:, None, :, None]
    weight = scores.masked_fill(later, -torch.inf).softmax(-1)
    return (weight * read.repeat_interleave(repeat, 1)).sum(-1)[0]


def share_read(choice: dict[str, Any], query: Tensor, key: Tensor) -> float:
    """Return the bytes that a token at the end reads, over those of all keys and values."""
    nothing, at = key[:, :, :0], torch.zeros(1, 0, dtype=torch.int64)
    a: dict[str, Any] = {"query": query, "key": key, "value": key, "positions": at, "past_positions": at}
    a |= dict.fromkeys(("past_key", "past_value", "past_pages"), nothing)
    a |= {"scale": 1.0, "sinks": SINKS, "window": WINDOW, "dense_below": FIRST, "channels": key.shape[3] // 8, **choice}
    call = RefreshedAttention(past_choice=at, **a) if "refresh" in a else SparseAttention(**a)
    return call.cost(LENGTH).bytes / (2 * LENGTH * key.shape[1] * key.shape[3] * key.dtype.itemsize)


@torch.no_grad()
def measured(texts: Path, count: int) -> Iterator[dict[str, Any]]:
    """Yield one line for each choice, over ``count`` rows of each text."""
    with tempfile.TemporaryDirectory() as folder:
        program, text = original(Path(folder))
        tokens = [row for file in TEXTS.values() for row in rows(texts / file, text, LENGTH, count)]
    layers: list[tuple[Tensor, Tensor, float]] = []
    for row in tokens:
        layers += attended(program, row)
    query, key, _ = layers[0]
    for choice in CHOICES:
        found = [mass(q, k, rule_of(choice, scale, q.shape[3])) for q, k, scale in layers]
        held, count = (torch.stack(x).double() for x in zip(*found, strict=True))
        yield {
            "choice": ",".join(f"{name}={value}" for name, value in choice.items()),
            "share_read": share_read(choice, query, key),
            "mass": float(held.mean()),
            "mass_p5": float(held.flatten().quantile(0.05)),
            "read": float(count.mean()),
            "asked": held.numel(),
        }


def page(document: dict[str, Any]) -> str:
    """Write the page of a run."""
    lines = [
        [
            one["choice"].replace(",", ", "),
            f"{one['share_read']:.3f}",
            f"{one['read']:.0f}",
            f"{one['mass']:.3f}",
            f"{one['mass_p5']:.3f}",
        ]
        for one in document["lines"]
    ]
    parts = [
        "# What choices hold of the softmax, SmolLM2-135M",
        conditions(document),
        f"{document['rows']} row(s) of {LENGTH} tokens of each text, every {EVERY}th of the last {FIRST} tokens, all"
        f" layers and heads: {document['lines'][0]['asked']} softmaxes. Sinks {SINKS}, window {WINDOW}. Bytes are those"
        " of keys, values and descriptions for a token at the end, with `refresh` the mean over those that share a"
        " choice, with `mass` the most. The first choice is the oracle: every token ranked by its own key. See"
        " [README](../README.md).",
        grid(["choice", "bytes read / dense", "tokens read, mean", "mass held, mean", "5th percentile"], lines),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    run_on_texts(__doc__, "sparse-mass", 2, measured, page)
