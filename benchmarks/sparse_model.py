"""What ``sparsify`` costs SmolLM2-135M in fidelity and recall, and what its states take."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpu import model
from torch import Tensor

from memc.backend import LowerOptions
from memc.backends.onnx import OnnxBackend
from memc.conversion.lowering import lower
from memc.cost import work
from memc.data import tokenize
from memc.dialect.selectors import SELECTORS
from memc.dialect.sparse_attention import SPAN
from memc.evaluate.score import run_tasks
from memc.evaluate.tasks import parse_tasks
from memc.frontend import capture_source
from memc.kernels.sparse_attention.choose import describe
from memc.kernels.sparse_attention.levels import joined
from memc.pipeline import parse_spec
from memc.program import Program, StateSpec
from memc.raising import raise_program
from memc.runtime.session import Session
from memc.runtime.text import Text
from memc.target import get_target
from memc.verify.execute import positions_of, run
from memc.weights import materialize

TEXTS = {"Austen": "austen-northanger-abbey.txt", "Jargon File": "jargon.txt"}
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
            "method=hcam,rerank=2",
            "method=bounds,rerank=4",
            "method=bounds,bits=8,rerank=4",
            "method=bounds,bits=4,rerank=4",
            "method=bounds,bits=4,rerank=4,page=16",
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
    return applied(program, f"sparsify:{choice},dense_below={prefix}")


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
    found = describe(keys.unflatten(2, (-1, node.kwargs["page"])), node.kwargs["method"])
    if SELECTORS[node.kwargs["method"]].choice != "levels":
        return found
    return joined(found, torch.ones(len(found), found.shape[2] // SPAN, dtype=torch.bool))


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


def fidelity(texts: Path, count: int, lengths: Sequence[Rows] = LENGTHS) -> Iterator[dict[str, Any]]:
    """Yield one line for each length and choice, over ``count`` rows of each text."""
    with tempfile.TemporaryDirectory() as folder:
        program, text = original(Path(folder))
        lines = {
            at: [r for file in TEXTS.values() for r in rows(texts / file, text, at.length, count)] for at in lengths
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


MEMORY_SIDES = {
    "dense": "",
    "8 bits": "sparsify:method=bounds,bits=8",
    "4 bits": "sparsify:method=bounds,bits=4",
    "4 bits, half of the heads": "sparsify:method=bounds,bits=4,retrieve=heads:50%",
}
MEMORY_CONTEXTS = (2048, 8192, 32768)


def memory() -> Iterator[dict[str, Any]]:
    """Yield the bytes of the states that artifacts allocate for one sequence, beside those that are predicted."""
    backend, target = OnnxBackend(), get_target("cpu")
    for name, spec in MEMORY_SIDES.items():
        with tempfile.TemporaryDirectory() as folder:
            program, _ = original(Path(folder))
            if spec:
                program = applied(program, spec)
            _, manifest = lower(program, backend, target, Path(folder), LowerOptions("fp32", 2048, 1))
            runner = backend.load(Path(folder), manifest, 1)
            for context in MEMORY_CONTEXTS:
                held, predicted = runner.new_state(1, context).bytes, program.state_bytes(context)
                yield {"side": name, "spec": spec, "context": context, "bytes": held, "predicted": predicted}


def applied(program: Program, spec: str) -> Program:
    """Apply a pass, its options settled by the weights."""
    target = get_target("cpu")
    pass_, _ = parse_spec(spec).resolve(program, target)
    return pass_.apply(program, pass_.plan(program, target))[0]


TASKS = "passkey,needle_single"
"""Tasks that the model itself does; `mqar` and `joint_recall` it answers at chance."""
TASK_LENGTH = 2048
TASK_SIDES = {
    "dense": "",
    "lowbit": "sparsify:method=lowbit,budget=256",
    "bounds": "sparsify:method=bounds,budget=256",
    "two levels": "sparsify:method=bounds,levels=2,budget=256",
    "heads:50%": "sparsify:method=bounds,budget=256,retrieve=heads:50%",
    "decay:50%": "sparsify:method=bounds,budget=256,retrieve=decay:50%",
    "heads:25%": "sparsify:method=bounds,budget=256,retrieve=heads:25%",
    "decay:25%": "sparsify:method=bounds,budget=256,retrieve=decay:25%",
}


def recall(samples: int) -> Iterator[dict[str, Any]]:
    """Yield the accuracy of each task, as ``memc eval --task`` asks them, of the original and of several choices."""
    backend, target = OnnxBackend(), get_target("cpu")
    for name, spec in TASK_SIDES.items():
        with tempfile.TemporaryDirectory() as folder:
            program, _ = original(Path(folder))
            if spec:
                program = applied(program, spec)
            _, manifest = lower(program, backend, target, Path(folder), LowerOptions("fp32", TASK_LENGTH, 1))
            session = Session(Path(folder), manifest, backend.load(Path(folder), manifest, 1))
            for task in parse_tasks(TASKS):
                cells = run_tasks(session, [task], [TASK_LENGTH], samples=samples)
                asked = sum(cell.questions for cell in cells)
                right = sum(cell.accuracy * cell.questions for cell in cells)
                yield {"side": name, "spec": spec, "task": task.spec, "asked": asked, "right": right / asked}
