"""What ``sparsify`` costs in fidelity on SmolLM2-135M, and what its attention saves in time on a CPU.

    python benchmarks/texts.py texts
    python benchmarks/sparse.py --texts texts

Fidelity: rows of 2,048 tokens of an Austen novel and of the Jargon File; the first half reads everything, every token
of the second chooses. Time: one attention for one new token, sparse and dense. Writes ``results/sparse-DATE.json`` and
``.md``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import operator
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpu import facts as machine_facts
from cpu import model, numbers
from page import grid, write
from torch import Tensor
from torch.fx import Graph, GraphModule

from memc.backend import LowerOptions
from memc.backends.onnx import OnnxBackend
from memc.conversion.lowering import lower
from memc.cost import work
from memc.data import tokenize
from memc.dialect.sparse_attention import description
from memc.frontend import capture_source
from memc.infer import infer
from memc.pipeline import parse_spec
from memc.plugins import load_kernels
from memc.program import InputSpec, ModelInfo, OutputSpec, Program, StateSpec
from memc.raising import raise_program
from memc.runtime.text import Text
from memc.target import get_target
from memc.verify.execute import pieces
from memc.weights import materialize

aten = torch.ops.aten
HERE = Path(__file__).parent
TEXTS = {"Austen": "austen-northanger-abbey.txt", "Jargon File": "jargon.txt"}
LENGTH, PREFIX = 2048, 1024
CONTEXTS = [1024, 2048, 4096, 8192, 16384, 32768]
PIECE = 256

# The oracle ranks every token by its own key: it has as many budgets' worth of pages as there are pages.
CHOICES = tuple(
    f"method={method},rerank={rerank},budget={budget}"
    for budget, reranks in ((256, (8, 1, 2, 4)), (512, (4, 1, 2)))
    for rerank in reranks
    for method in (("bounds",) if rerank * budget == LENGTH else ("bounds", "moments"))
)


def original(work: Path) -> tuple[Program, Text]:
    """Read the model, its attention raised, and its tokenizer."""
    captured = capture_source(model())
    for path in captured.tokenizer_files:
        (work / path.name).write_bytes(path.read_bytes())
    assert captured.weights is not None
    return materialize(raise_program(captured.program).program, captured.weights), Text(work)


def rows(path: Path, text: Text, count: int) -> Tensor:
    """Return ``count`` rows of ``LENGTH`` tokens spread evenly over the last tenth of a text."""
    ids = tokenize([path], text.tokenizer)
    ids = ids[len(ids) * 9 // 10 :]
    starts = np.linspace(0, len(ids) - LENGTH, count).astype(int)
    return torch.from_numpy(np.stack([ids[start : start + LENGTH] for start in starts]))


def sparsified(program: Program, choice: str) -> Program:
    """Apply the pass with a choice of its options."""
    pass_ = parse_spec(f"sparsify:{choice},dense_below={PREFIX}")
    return pass_.apply(program, pass_.plan(program, get_target("cpu")))[0]


@torch.no_grad()
def second_half(program: Program, row: Tensor) -> Iterator[Tensor]:
    """Yield the log-probabilities ``[PIECE, vocab]`` of the second half of a row, in pieces."""
    sizes = [PREFIX, *[PIECE] * ((LENGTH - PREFIX) // PIECE)]
    for index, logits in enumerate(pieces(program, row[None], sizes)):
        if index:
            yield logits[0].log_softmax(-1)


def compared(dense: Sequence[Tensor], program: Program, row: Tensor) -> dict[str, float]:
    """Return sums over the second half of a row: nats of divergence, losses of both sides, equal first choices."""
    sums = dict.fromkeys(("kl", "loss", "dense_loss", "same", "tokens"), 0.0)
    for index, (p, q) in enumerate(zip(dense, second_half(program, row), strict=True)):
        first = PREFIX + index * PIECE
        after = row[first + 1 : first + PIECE + 1]
        at = torch.arange(len(after))
        sums["kl"] += float((p.exp() * (p - q)).sum())
        sums["loss"] -= float(q[at, after].sum())
        sums["dense_loss"] -= float(p[at, after].sum())
        sums["same"] += float((p.argmax(-1) == q.argmax(-1)).sum())
        sums["tokens"] += len(p)
    return sums


def share_read(program: Program, choice: str) -> float:
    """Return the bytes that a choice reads of a full context's keys, values and descriptions, over those of dense."""
    dense, sparse = (work(one, LENGTH).state_bytes_read for one in (program, sparsified(program, choice)))
    return sparse / dense


def fidelity(texts: Path, count: int, choices: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield one line for each choice, over ``count`` rows of each text."""
    with tempfile.TemporaryDirectory() as folder:
        program, text = original(Path(folder))
        lines = [(name, row) for name, file in TEXTS.items() for row in rows(texts / file, text, count)]
    dense = [list(second_half(program, row)) for _, row in lines]
    for choice in choices:
        start = time.perf_counter()
        sparse = sparsified(program, choice)
        found = [compared(before, sparse, row) for before, (_, row) in zip(dense, lines, strict=True)]
        total = {key: sum(one[key] for one in found) for key in found[0]}
        yield {
            "choice": choice,
            "share_read": share_read(program, choice),
            "kl": total["kl"] / total["tokens"],
            "kl_by_row": [one["kl"] / one["tokens"] for one in found],
            "ratio": float(np.exp((total["loss"] - total["dense_loss"]) / (total["tokens"] - len(lines)))),
            "same": total["same"] / total["tokens"],
            "tokens": int(total["tokens"]),
            "seconds": time.perf_counter() - start,
        }


@dataclass(frozen=True)
class Shape:
    """An attention, and the choice that it is timed with."""

    name: str
    heads: int
    groups: int
    size: int
    budget: int


SHAPES = (
    Shape("9 heads, 3 key-value, size 64", 9, 3, 64, 512),
    Shape("32 heads, 8 key-value, size 128", 32, 8, 128, 2048),
)
VOCAB = 64


SIDES: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "bounds": {"method": "bounds", "page": 16, "rerank": 2},
    "lowbit": {"method": "lowbit", "page": 64, "rerank": 2},
}


def attention(shape: Shape, choice: dict[str, Any] | None) -> Program:
    """Build a program of one attention over looked-up queries, keys and values; a choice of None is dense."""
    graph, root = Graph(), torch.nn.Module()
    tokens, positions = graph.placeholder("tokens"), graph.placeholder("positions")
    sizes = {"key": ("B", shape.groups, "S", shape.size), "value": ("B", shape.groups, "S", shape.size)}
    states = [StateSpec(f"past_{name}", torch.float32, size, grows=2) for name, size in sizes.items()]
    states.append(StateSpec("past_positions", torch.int64, ("B", "S"), -1.0, 1))
    options: dict[str, Any] = {"scale": shape.size**-0.5}
    op = torch.ops.memc.attention.default
    if choice is not None:
        op = torch.ops.memc.sparse_attention.default
        page = choice["page"]
        options |= {**choice, "budget": shape.budget, "sinks": 4, "window": 48, "channels": shape.size // 8}
        options["dense_below"] = shape.budget
        pages = ("B", shape.groups, f"S/{page}", *description(choice["method"], page, shape.size))
        states.append(StateSpec("past_pages", torch.float32, pages, grows=2))
    held = [graph.placeholder(state.name) for state in states]
    made = []
    for name, heads in (("query", shape.heads), ("key", shape.groups), ("value", shape.groups)):
        root.register_parameter(name, torch.nn.Parameter(torch.randn(VOCAB, heads * shape.size)))
        flat = graph.call_function(aten.embedding.default, (graph.get_attr(name), tokens))
        split = graph.call_function(aten.unflatten.int, (flat, -1, [heads, shape.size]))
        made.append(graph.call_function(aten.transpose.int, (split, 1, 2)))
    results = graph.call_function(op, (*made, positions, *held), options)
    first = len(op._schema.returns) - len(states)
    parts = [graph.call_function(operator.getitem, (results, i)) for i in (0, *range(first, first + len(states)))]
    merged = graph.call_function(
        aten.flatten.using_ints, (graph.call_function(aten.transpose.int, (parts[0], 1, 2)), 2)
    )
    graph.output((merged, *parts[1:]))
    inputs = tuple(InputSpec(name, name, torch.int64, ("B", "T")) for name in ("tokens", "positions"))  # type: ignore[arg-type]
    outputs = (OutputSpec("logits", torch.float32, ("B", "T", shape.heads * shape.size)),)
    info = ModelInfo("benchmark", "", "benchmark", VOCAB)
    program = Program(GraphModule(root, graph), inputs, outputs, tuple(states), info, raised=True)
    infer(program)
    return program


def times(shape: Shape, contexts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield the time of one new token at each context, the sides taking turns."""
    programs = {name: attention(shape, choice) for name, choice in SIDES.items()}
    backend, random = OnnxBackend(), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        runners = {}
        for name, program in programs.items():
            place = Path(folder) / name.replace(" ", "-")
            options = LowerOptions("fp32", max(contexts) + 64, 1)
            _, manifest = lower(program, backend, get_target("cpu"), place, options)
            runners[name] = backend.load(place, manifest, 1)
        for context in contexts:
            states = {name: runner.new_state(1, context + 64) for name, runner in runners.items()}
            for state in states.values():
                for array in state.current.values():
                    array[...] = random.standard_normal(array.shape, dtype=np.float32)
                state.lengths[:] = context
            query = torch.randn(1, shape.heads, 1, shape.size)
            key, value = torch.randn(2, 1, shape.groups, context, shape.size)
            taken: dict[str, list[float]] = {name: [] for name in ("sdpa", *runners)}
            for step in range(23):
                begin = time.perf_counter()
                torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
                taken["sdpa"].append(time.perf_counter() - begin)
                for name, runner in runners.items():
                    token, at = np.full((1, 1), step % VOCAB), np.full((1, 1), context + step)
                    begin = time.perf_counter()
                    runner.run(token, at, states[name])
                    taken[name].append(time.perf_counter() - begin)
            read = {name: work(program, context).state_bytes_read for name, program in programs.items()}
            yield {
                "shape": f"{shape.name}, budget {shape.budget}",
                "context": context,
                "ms": {name: 1e3 * float(np.median(found[3:])) for name, found in taken.items()},
                "p90": {name: 1e3 * float(np.quantile(found[3:], 0.9)) for name, found in taken.items()},
                "predicted": read["dense"] / read["lowbit"],
            }


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="folder that texts.py filled")
    parser.add_argument("--rows", type=int, default=2, help="rows of each text")
    parser.add_argument("--contexts", type=numbers, default=CONTEXTS, help="contexts of the timings")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load_kernels()
    document: dict[str, Any] = {**machine_facts(), "rows": arguments.rows, "times": [], "fidelity": []}
    path = arguments.results / f"sparse-{datetime.date.today()}.json"
    for shape in SHAPES:
        for found in times(shape, arguments.contexts):
            document["times"].append(found)
            print(json.dumps(found), flush=True)
    for found in fidelity(arguments.texts, arguments.rows, CHOICES):
        document["fidelity"].append(found)
        print(json.dumps(found), flush=True)
        path.write_text(json.dumps(document, indent=1) + "\n")
    write(path, document, page)


def page(document: dict[str, Any]) -> str:
    """Write the page of a run."""
    oracles = {choice["choice"].rpartition("=")[2]: choice["kl"] for choice in document["fidelity"] if _oracle(choice)}
    lines = [
        [
            ("oracle, " if _oracle(one) else "") + one["choice"].replace(",", ", "),
            f"{one['share_read']:.3f}",
            f"{one['kl']:.4f}",
            f"{one['kl'] / oracles[one['choice'].rpartition('=')[2]]:.2f}",
            f"{one['ratio']:.3f}",
            f"{one['same']:.3f}",
        ]
        for one in document["fidelity"]
    ]
    head = ["choice", "bytes read / dense", "KL, nats", "KL / oracle's", "perplexity / dense", "same first token"]
    parts = [
        "# Sparse attention on a CPU",
        f"{document['cpu']}, {document['cores']} cores, load {document['load_before']:.1f} before the start; memc at"
        f" {document['commit']}. See [README](../README.md).",
        f"## Fidelity, SmolLM2-135M, tokens {PREFIX} to {LENGTH}",
        f"{document['rows']} row(s) of each text, {document['fidelity'][0]['tokens']} predictions in all; sinks 4,"
        " window 48, pages of 16. Bytes are those of keys, values and descriptions for a token at the end. The oracle"
        " ranks every token by its own key.",
        grid(head, lines),
    ]
    for name in dict.fromkeys(one["shape"] for one in document["times"]):
        rows_ = [one for one in document["times"] if one["shape"] == name]
        sides = list(rows_[0]["ms"])
        cells = [[str(r["context"]), *(f"{r['ms'][s]:.2f} ({r['p90'][s]:.2f})" for s in sides)] for r in rows_]
        gains = [f"{r['ms']['dense'] / r['ms'][sides[-1]]:.1f}x" for r in rows_]
        shares = [f"{r['predicted']:.1f}x" for r in rows_]
        table = [[*row, gain, share] for row, gain, share in zip(cells, gains, shares, strict=True)]
        parts += [
            f"## Time of one attention for one new token, {name}, one thread",
            "Milliseconds, median of 20 and in brackets the ninth decile, the sides taking turns; float32, random keys"
            " and values. `dense` is `memc::attention` through the onnx backend, `sdpa` is torch's on keys that are"
            " contiguous already.",
            grid(["context", *sides, "dense / last", "by bytes"], table),
        ]
    return "\n\n".join(parts) + "\n"


def _oracle(choice: dict[str, Any]) -> bool:
    options = dict(part.split("=") for part in choice["choice"].split(","))
    return int(options["rerank"]) * int(options["budget"]) == LENGTH


if __name__ == "__main__":
    main()
