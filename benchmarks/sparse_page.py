"""The page of a run of ``sparse.py``."""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cpu import facts
from page import grid, save
from sparse_model import TASK_LENGTH

from memc.plugins import load_kernels

SHARED = " Of three turns of 8 tokens the first one chooses where a choice serves 8."


def conditions(part: dict[str, Any]) -> str:
    """Say on what a part was measured."""
    load = f"load {part['load_before']:.1f} before the start"
    return f"{part['cpu']}, {part['cores']} cores, {load}; memc at {part['commit']}."


def run_on_texts(
    about: str | None,
    name: str,
    count: int,
    measured: Callable[[Path, int], Iterator[dict[str, Any]]],
    page: Callable[[dict[str, Any]], str],
) -> None:
    """Measure line by line over ``count`` rows of each text, unless asked for more, and write ``NAME-DATE``."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="folder that texts.py filled")
    parser.add_argument("--rows", type=int, default=count, help="rows of each text")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    load_kernels()
    document: dict[str, Any] = {**facts(), "rows": given.rows, "lines": []}
    for line in measured(given.texts, given.rows):
        document["lines"].append(line)
        print(json.dumps(line), flush=True)
    save(given.results / f"{name}-{datetime.date.today()}.json", document, page)


def page(document: dict[str, Any]) -> str:
    """Write the page of a run."""
    parts = ["# Sparse attention on a CPU", "See [README](../README.md)."]
    if "fidelity" in document:
        parts += fidelity_page(document["fidelity"])
    if "recall" in document:
        parts += recall_page(document["recall"])
    if "memory" in document:
        parts += memory_page(document["memory"])
    if "times" in document:
        parts += times_page(document["times"])
    if "shared" in document:
        parts += sides_page(document["shared"], "Choosing for several tokens", SHARED)
    if "compiled" in document:
        parts += sides_page(document["compiled"], "Through the tvm backend and the onnx backend", "")
    return "\n\n".join(parts) + "\n"


def fidelity_page(part: dict[str, Any]) -> list[str]:
    """Write the section on fidelity."""
    made = [conditions(part)]
    head = ["choice", "bytes read / dense", "KL, nats", "KL / oracle's", "perplexity / dense", "same first token"]
    for length in dict.fromkeys(one["length"] for one in part["lines"]):
        lines = [one for one in part["lines"] if one["length"] == length]
        oracles = {one["budget"]: one["kl"] for one in lines if _oracle(one)}
        table = [
            [
                ("oracle, " if _oracle(one) else "") + one["choice"].replace(",", ", "),
                f"{one['share_read']:.3f}",
                f"{one['kl']:.4f}",
                f"{one['kl'] / oracles[one['budget']]:.2f}",
                f"{one['ratio']:.3f}",
                f"{one['same']:.3f}",
            ]
            for one in lines
        ]
        made += [
            f"## Fidelity, SmolLM2-135M, the last {lines[0]['asked']} of {length} tokens",
            f"{part['rows']} row(s) of each text, {lines[0]['tokens']} predictions in all; sinks 4, window 48. Bytes"
            " are those of keys, values and descriptions for a token at the end. The oracle ranks every token by its"
            " own key.",
            grid(head, table),
        ]
    return made


def recall_page(part: dict[str, Any]) -> list[str]:
    """Write the section on recall."""
    found = {(one["task"], one["side"]): one for one in part["lines"]}
    tasks, sides = (list(dict.fromkeys(names)) for names in zip(*found, strict=True))
    table = [
        [task, *(f"{found[task, side]['right']:.3f}" for side in sides), str(found[task, sides[0]]["asked"])]
        for task in tasks
    ]
    return [
        f"## Recall at {TASK_LENGTH} tokens, budget 256, questions one token at a time",
        conditions(part),
        grid(["task", *sides, "questions"], table),
    ]


def memory_page(part: dict[str, Any]) -> list[str]:
    """Write the section on the bytes of the states."""
    found = {(one["side"], one["context"]): one for one in part["lines"]}
    sides, contexts = (list(dict.fromkeys(names)) for names in zip(*found, strict=True))
    table = []
    for side in sides:
        cells = [found[side, context] for context in contexts]
        gains = [found["dense", context]["bytes"] / found[side, context]["bytes"] for context in contexts]
        shown = [
            f"{one['bytes'] / 1e6:.2f} ({one['predicted'] / 1e6:.2f}), {gain:.1f}x"
            for one, gain in zip(cells, gains, strict=True)
        ]
        table.append([side, *shown])
    return [
        "## Bytes of the states, SmolLM2-135M, one sequence, onnx, float32",
        conditions(part),
        "Megabytes that an artifact allocates for a context, those predicted in brackets, and dense over them.",
        grid(["choice", *map(str, contexts)], table),
    ]


def times_page(part: dict[str, Any]) -> list[str]:
    """Write the section on time."""
    parts = [conditions(part)]
    for name in dict.fromkeys(one["shape"] for one in part["lines"]):
        rows_ = [one for one in part["lines"] if one["shape"] == name]
        sides = list(rows_[0]["ms"])
        cells = [[str(r["context"]), *(f"{r['ms'][s]:.2f} ({r['p90'][s]:.2f})" for s in sides)] for r in rows_]
        gains = [f"{r['ms']['dense'] / r['ms'][sides[-1]]:.1f}x" for r in rows_]
        shares = [f"{r['predicted'][sides[-1]]:.1f}x" for r in rows_]
        table = [[*row, gain, share] for row, gain, share in zip(cells, gains, shares, strict=True)]
        parts += [
            f"## Time of one attention for one new token, {name}, one thread",
            "Milliseconds, median of 24 and in brackets the ninth decile, the sides taking turns; float32, random keys"
            " and values. `dense` is `memc::attention` through the onnx backend, `sdpa` is torch's on keys that are"
            " contiguous already.",
            grid(["context", *sides, "dense / last", "by bytes"], table),
        ]
    return parts


def sides_page(part: dict[str, Any], title: str, remark: str) -> list[str]:
    """Write a section on the time of several sides, below each what its bytes promise."""
    parts = [conditions(part)]
    for name in dict.fromkeys(one["shape"] for one in part["lines"]):
        rows_ = [one for one in part["lines"] if one["shape"] == name]
        sides = list(rows_[0]["predicted"])
        times_ = [[str(r["context"]), *(f"{r['ms'][s]:.2f} ({r['mean'][s]:.2f})" for s in sides)] for r in rows_]
        reads = [[f"{r['context']}, by bytes", *(f"{r['predicted'][s]:.1f}x" for s in sides)] for r in rows_]
        parts += [
            f"## {title}, {name}, one thread",
            "Milliseconds of one attention for one new token, median of 24 and in brackets the mean, the sides taking"
            f" turns; float32, random keys and values.{remark} Below it dense over the side, by the bytes that are"
            " predicted.",
            grid(["context", *sides], [row for pair in zip(times_, reads, strict=True) for row in pair]),
        ]
    return parts


def _oracle(line: dict[str, Any]) -> bool:
    options = dict(part.split("=") for part in line["choice"].split(","))
    return int(options["rerank"]) * line["budget"] == line["length"]
