"""What ``sparsify`` costs in fidelity on SmolLM2-135M, and what its attention saves in time on a CPU.

    python benchmarks/texts.py texts
    python benchmarks/sparse.py --texts texts

Fidelity: rows of 2,048 and of 8,192 tokens of an Austen novel and of the Jargon File; the first ones read everything,
the last 1,024, or 256, choose. Recall: the tasks of ``memc eval``. Time: one attention for one new token, sparse and
dense. Writes ``results/sparse-DATE.json`` and ``.md``; ``--parts`` measures some of the three and keeps the others.
"""

from __future__ import annotations

import argparse
import datetime
import json
import operator
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
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
from memc.evaluate.score import run_tasks
from memc.evaluate.tasks import parse_tasks
from memc.frontend import capture_source
from memc.infer import infer
from memc.kernels.sparse_attention.choose import describe
from memc.pipeline import parse_spec
from memc.plugins import load_kernels
from memc.program import InputSpec, ModelInfo, OutputSpec, Program, StateSpec
from memc.raising import raise_program
from memc.runtime.session import Session
from memc.runtime.text import Text
from memc.target import get_target
from memc.verify.execute import positions_of, run
from memc.weights import materialize

aten = torch.ops.aten
HERE = Path(__file__).parent
TEXTS = {"Austen": "austen-northanger-abbey.txt", "Jargon File": "jargon.txt"}
CONTEXTS = [1024, 2048, 4096, 8192, 16384, 32768, 131072]
PIECE = 256


@dataclass(frozen=True)
class Rows:
    """Sequences of ``length`` tokens of which the last ``asked`` choose what they read."""

    length: int
    asked: int
    budgets: tuple[int, ...]
    choices: tuple[str, ...]

    @property
    def prefix(self) -> int:
        """Tokens that read everything."""
        return self.length - self.asked

    def every(self) -> Iterator[tuple[int, str]]:
        """Yield each budget and choice, first the oracle, which ranks every token by its own key."""
        for budget in self.budgets:
            yield budget, f"method=bounds,rerank={self.length // budget},budget={budget}"
            for choice in self.choices:
                if f"rerank={self.length // budget}" not in choice:
                    yield budget, f"{choice},budget={budget}"


LENGTHS = (
    Rows(
        2048,
        1024,
        (256, 512),
        (
            "method=lowbit,rerank=2",
            "method=bounds,rerank=2",
            "method=lowbit,rerank=1",
            "method=lowbit,channels=4,rerank=2",
            "method=moments,rerank=2",
            "method=bounds,rerank=4",
        ),
    ),
    Rows(8192, 256, (256, 512, 1024), ("method=lowbit,rerank=2", "method=bounds,rerank=2")),
)


def original(work: Path) -> tuple[Program, Text]:
    """Read the model, its attention raised, and its tokenizer."""
    captured = capture_source(model())
    for path in captured.tokenizer_files:
        (work / path.name).write_bytes(path.read_bytes())
    assert captured.weights is not None
    return materialize(raise_program(captured.program).program, captured.weights), Text(work)


def rows(path: Path, text: Text, length: int, count: int) -> Tensor:
    """Return ``count`` rows of ``length`` tokens spread evenly over the last tenth of a text."""
    ids = tokenize([path], text.tokenizer)
    ids = ids[len(ids) * 9 // 10 :]
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return torch.from_numpy(np.stack([ids[start : start + length] for start in starts]))


def sparsified(program: Program, choice: str, prefix: int) -> Program:
    """Apply the pass with a choice of its options."""
    pass_ = parse_spec(f"sparsify:{choice},dense_below={prefix}")
    return pass_.apply(program, pass_.plan(program, get_target("cpu")))[0]


@torch.no_grad()
def prefilled(program: Program, row: Tensor, prefix: int) -> dict[str, Tensor]:
    """Return the states of the original after the first tokens of a row, by name."""
    state = program.new_state(1)
    for start in range(0, prefix, 4 * PIECE):
        part = row[None, start : min(start + 4 * PIECE, prefix)]
        state = run(program, (part, positions_of(part, start)), state)[1:]
    return dict(zip((spec.name for spec in program.states), state, strict=True))


@torch.no_grad()
def later(program: Program, row: Tensor, held: Mapping[str, Tensor], at: Rows) -> Iterator[Tensor]:
    """Yield the log-probabilities ``[PIECE, vocab]`` of the last tokens of a row, in pieces, after what is held."""
    state = started(program, row, held, at)
    for start in range(at.prefix, at.length, PIECE):
        part = row[None, start : start + PIECE]
        logits, *after = run(program, (part, positions_of(part, start)), state)
        state = tuple(after)
        yield logits[0].log_softmax(-1)


def started(program: Program, row: Tensor, held: Mapping[str, Tensor], at: Rows) -> tuple[Tensor, ...]:
    """Return the states that the last tokens of a row go on from: what is held, pages of it described.

    Where keys are held in few bits the first tokens were run that way too.
    """
    if any(spec.dtype == torch.uint8 for spec in program.states):
        return tuple(prefilled(program, row, at.prefix).values())
    return tuple(held[spec.name] if spec.name in held else pages(program, spec, held) for spec in program.states)


def pages(program: Program, spec: StateSpec, held: Mapping[str, Tensor]) -> Tensor:
    """Describe the pages of the keys that are held; they are whole."""
    keys = held[spec.name.replace("_pages", "_key")]
    node = next(n for n in program.module.graph.nodes if n.target is torch.ops.memc.sparse_attention.default)
    return describe(keys.unflatten(2, (-1, node.kwargs["page"])), node.kwargs["method"])


def compared(dense: Sequence[Tensor], sparse: Iterator[Tensor], row: Tensor, first: int) -> dict[str, float]:
    """Return sums over tokens from ``first`` on: nats of divergence, losses of both sides, equal first choices."""
    sums = dict.fromkeys(("kl", "loss", "dense_loss", "same", "tokens"), 0.0)
    for p, q in zip(dense, sparse, strict=True):
        after = row[first + 1 : first + PIECE + 1]
        at = torch.arange(len(after))
        sums["kl"] += float((p.exp() * (p - q)).sum())
        sums["loss"] -= float(q[at, after].sum())
        sums["dense_loss"] -= float(p[at, after].sum())
        sums["same"] += float((p.argmax(-1) == q.argmax(-1)).sum())
        sums["tokens"] += len(p)
        first += PIECE
    return sums


def share_read(program: Program, sparse: Program, length: int) -> float:
    """Return the bytes that a choice reads of a full context's keys, values and descriptions, over those of dense."""
    dense, less = (work(one, length).state_bytes_read for one in (program, sparse))
    return less / dense


def fidelity(texts: Path, count: int) -> Iterator[dict[str, Any]]:
    """Yield one line for each length and choice, over ``count`` rows of each text."""
    with tempfile.TemporaryDirectory() as folder:
        program, text = original(Path(folder))
        lines = {
            at: [r for file in TEXTS.values() for r in rows(texts / file, text, at.length, count)] for at in LENGTHS
        }
    for at, found_rows in lines.items():
        held = [prefilled(program, row, at.prefix) for row in found_rows]
        dense = [list(later(program, row, states, at)) for row, states in zip(found_rows, held, strict=True)]
        for budget, choice in at.every():
            start = time.perf_counter()
            sparse = sparsified(program, choice, at.prefix)
            found = [
                compared(before, later(sparse, row, states, at), row, at.prefix)
                for before, row, states in zip(dense, found_rows, held, strict=True)
            ]
            total = {key: sum(one[key] for one in found) for key in found[0]}
            yield {
                "length": at.length,
                "asked": at.asked,
                "choice": choice,
                "budget": budget,
                "share_read": share_read(program, sparse, at.length),
                "kl": total["kl"] / total["tokens"],
                "kl_by_row": [one["kl"] / one["tokens"] for one in found],
                "ratio": float(np.exp((total["loss"] - total["dense_loss"]) / (total["tokens"] - len(found)))),
                "same": total["same"] / total["tokens"],
                "tokens": int(total["tokens"]),
                "seconds": time.perf_counter() - start,
            }


TASKS = "passkey,joint_recall,mqar"
TASK_LENGTH = 2048
TASK_SIDES = {"dense": "", "lowbit": "sparsify:method=lowbit,budget=256", "bounds": "sparsify:method=bounds,budget=256"}


def recall(samples: int) -> Iterator[dict[str, Any]]:
    """Yield the accuracy of each task, as ``memc eval --task`` asks them, of the original and of two choices."""
    backend, target = OnnxBackend(), get_target("cpu")
    for name, spec in TASK_SIDES.items():
        with tempfile.TemporaryDirectory() as folder:
            program, _ = original(Path(folder))
            if spec:
                pass_ = parse_spec(spec)
                program = pass_.apply(program, pass_.plan(program, target))[0]
            _, manifest = lower(program, backend, target, Path(folder), LowerOptions("fp32", TASK_LENGTH, 1))
            session = Session(Path(folder), manifest, backend.load(Path(folder), manifest, 1))
            for task in parse_tasks(TASKS):
                cells = run_tasks(session, [task], [TASK_LENGTH], samples=samples)
                asked = sum(cell.questions for cell in cells)
                right = sum(cell.accuracy * cell.questions for cell in cells)
                yield {"side": name, "spec": spec, "task": task.spec, "asked": asked, "right": right / asked}


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
                    random.standard_normal(dtype=np.float32, out=array)
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
    parser.add_argument("--samples", type=int, default=2, help="samples of each task and depth")
    parser.add_argument("--contexts", type=numbers, default=CONTEXTS, help="contexts of the timings")
    parser.add_argument("--parts", default="times,fidelity,recall", help="what to measure; the rest is left as it is")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load_kernels()
    path = arguments.results / f"sparse-{datetime.date.today()}.json"
    for part in arguments.parts.split(","):
        facts = {**machine_facts(), "rows": arguments.rows, "samples": arguments.samples}
        found: list[dict[str, Any]] = []
        for line in measured(part, arguments):
            found.append(line)
            print(json.dumps(line), flush=True)
            document = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps({**document, part: {**facts, "lines": found}}, indent=1) + "\n")
    write(path, json.loads(path.read_text()), page)


def measured(part: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the lines of one part."""
    match part:
        case "times":
            for shape in SHAPES:
                yield from times(shape, arguments.contexts)
        case "fidelity":
            yield from fidelity(arguments.texts, arguments.rows)
        case _:
            yield from recall(arguments.samples)


def conditions(part: dict[str, Any]) -> str:
    """Say on what a part was measured."""
    load = f"load {part['load_before']:.1f} before the start"
    return f"{part['cpu']}, {part['cores']} cores, {load}; memc at {part['commit']}."


def page(document: dict[str, Any]) -> str:
    """Write the page of a run."""
    parts = ["# Sparse attention on a CPU", "See [README](../README.md)."]
    if "fidelity" in document:
        parts += fidelity_page(document["fidelity"])
    if "recall" in document:
        parts += recall_page(document["recall"])
    if "times" in document:
        parts += times_page(document["times"])
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


def times_page(part: dict[str, Any]) -> list[str]:
    """Write the section on time."""
    parts = [conditions(part)]
    for name in dict.fromkeys(one["shape"] for one in part["lines"]):
        rows_ = [one for one in part["lines"] if one["shape"] == name]
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
    return parts


def _oracle(line: dict[str, Any]) -> bool:
    options = dict(part.split("=") for part in line["choice"].split(","))
    return int(options["rerank"]) * line["budget"] == line["length"]


if __name__ == "__main__":
    main()
