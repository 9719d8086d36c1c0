"""What fetched blocks cost in time: SmolLM2-135M with ``memory_bank`` beside the same model without, in turns.

    python benchmarks/fetched.py

Writes ``results/fetched-DATE.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cpu import facts as machine_facts
from cpu import model
from page import grid, save

from memc.backend import LowerOptions, Runner
from memc.backends.onnx import OnnxBackend
from memc.conversion.lowering import lower
from memc.frontend import capture_source
from memc.pipeline import parse_spec
from memc.plugins import load_kernels
from memc.program import Program
from memc.raising import raise_program
from memc.target import get_target
from memc.weights import materialize

HERE = Path(__file__).parent
WINDOW = "window:window=64"
WITHOUT = "without"
CALLS = {1: 60, 128: 10}
"""Tokens of a call, and how many calls are timed."""


@dataclass
class Side:
    """A lowered program, what is fetched for its one sequence, and milliseconds of CPU time of each call."""

    runner: Runner
    fetched: Mapping[str, np.ndarray]
    taken: dict[int, list[float]] = field(default_factory=dict)

    def start(self, tokens: int) -> None:
        """Begin a sequence that comes in calls of so many tokens."""
        self.state, self.at = self.runner.new_state(1), 0
        self.taken[tokens] = []

    def call(self, tokens: int) -> None:
        """Run the next call and note its time."""
        ids = np.arange(self.at, self.at + tokens)[None]
        began = time.process_time()
        self.runner.run(ids, ids, self.state, np.array([tokens - 1]), self.fetched)
        self.taken[tokens].append(1e3 * (time.process_time() - began))
        self.at += tokens


def banked(program: Program, share: float) -> Program:
    """Add blocks of a share of the model's parameters, alike in every layer."""
    unit = parse_spec("memory_bank:ranks=1")
    target = get_target("cpu")
    one, _ = unit.apply(program, unit.plan(program, target))
    units = round(share * program.parameter_count / (one.fetched_bytes / 4))
    made = parse_spec(f"memory_bank:ranks={units}")
    return made.apply(program, made.plan(program, target))[0]


def measured(program: Program, weights: str, shares: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Lower every side with these weights, time them in turns, and yield a line for each kind of call."""
    random, backend, target = np.random.default_rng(0), OnnxBackend(), get_target("cpu")
    programs = {WITHOUT: program} | {f"{share:.0%}": banked(program, share) for share in shares}
    with tempfile.TemporaryDirectory() as folder:
        sides: dict[str, Side] = {}
        for name, each in programs.items():
            _, manifest = lower(each, backend, target, Path(folder) / name, LowerOptions(weights, None, 1))
            shapes = {spec.name: (1, *spec.shape[1:]) for spec in each.fetched}
            blocks = {key: 0.02 * random.standard_normal(shape, np.float32) for key, shape in shapes.items()}
            sides[name] = Side(backend.load(Path(folder) / name, manifest, 1), blocks)
        for tokens, calls in CALLS.items():
            for side in sides.values():
                side.start(tokens)
            for turn in range(calls):
                for side in list(sides.values())[:: -1 if turn % 2 else 1]:
                    side.call(tokens)
            ms = {name: statistics.median(side.taken[tokens][2:]) for name, side in sides.items()}
            fetched = {name: each.fetched_bytes for name, each in programs.items()}
            yield {"weights": weights, "tokens": tokens, "cpu_ms": ms, "fetched_bytes": fetched}


def page(document: dict[str, Any]) -> str:
    """Write the page of a run."""
    parts = [
        "# What fetched blocks cost in time",
        f"SmolLM2-135M, `{WINDOW}`, through the onnx backend, one thread, one sequence: milliseconds of CPU time of a"
        " call, median, the sides in turns, and in brackets that over the model's without a bank. A share is that of"
        " the model's parameters; blocks are random, in float32 whatever the weights.",
        f"{document['cpu']}, {document['cores']} cores, load {document['load_before']:.1f} before the start; memc at"
        f" {document['commit']}. See [README](../README.md).",
    ]
    lines: list[dict[str, Any]] = document["lines"]
    names = list(lines[0]["cpu_ms"])
    fetched = [f"{lines[0]['fetched_bytes'][name] / 2**20:.1f} MiB" for name in names]
    table = [
        [
            line["weights"],
            str(line["tokens"]),
            *(f"{line['cpu_ms'][name]:.1f} ({line['cpu_ms'][name] / line['cpu_ms'][WITHOUT]:.2f})" for name in names),
        ]
        for line in lines
    ]
    parts.append(grid(["weights", "tokens", *names], [["fetched", "", *fetched], *table]))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", default="0.05,0.1,0.2", help="fetched parameters, over the model's own")
    parser.add_argument("--weights", default="fp32,int8")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    load_kernels()
    shares = [float(share) for share in arguments.shares.split(",")]
    document: dict[str, Any] = {**machine_facts(), "lines": []}
    captured = capture_source(str(model()))
    assert captured.weights is not None
    program = materialize(raise_program(captured.program).program, captured.weights)
    window = parse_spec(WINDOW)
    program, _ = window.apply(program, window.plan(program, get_target("cpu")))
    for weights in arguments.weights.split(","):
        for line in measured(program, weights, shares):
            document["lines"].append(line)
            print(json.dumps(line), flush=True)
    save(arguments.results / f"fetched-{datetime.date.today()}.json", document, page)


if __name__ == "__main__":
    main()
