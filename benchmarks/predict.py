"""Prediction against measurement: SmolLM2-135M's time of a token and of a prompt by recipe, on this machine.

    python benchmarks/predict.py                       # calibrates, converts what is missing, measures; some minutes
    python benchmarks/predict.py --recipes dense --contexts 512,8192 --prompts 512 --threads 2
    python benchmarks/predict.py --weights int8

Writes ``results/predict-DATE.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cpu import facts, model, numbers
from page import grid, save

from memc import api, runtime
from memc.calibrate import calibrate
from memc.conversion.speed import random_states
from memc.cost import predict
from memc.program_io import load_program
from memc.report.text import amount
from memc.runtime.state import SessionState
from memc.target import Target

HERE = Path(__file__).parent
STEPS, WARM_UP = 24, 6
GOAL = 0.25


@dataclass
class Side:
    """A recipe's artifact after so many tokens, and seconds of its steps: of the wall and of the processor."""

    recipe: str
    session: runtime.Session
    threads: int
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def start(self, context: int) -> None:
        """Give it a random state of ``context`` tokens: a step takes as long as after a prompt, which takes hours."""
        room = context + STEPS + WARM_UP
        run = self.session.runner.restore(random_states(self.session.manifest, context), room)
        self.state = SessionState(self.session.runner, run, np.array([context]), None, self.session.capacity)
        self.wall, self.cpu = [], []

    def step(self, token: int) -> None:
        """Decode one token."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.session.step([token], self.state)
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)

    def prompt(self, length: int) -> None:
        """Run a prompt from nothing."""
        self.wall, self.cpu = [], []
        state = self.session.new_state(1, length)
        wall, cpu = time.perf_counter(), time.process_time()
        self.session.prefill([index % 1000 for index in range(length)], state)
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)


def artifact(recipe: str, work: Path, context: int, weights: str) -> Path:
    """Convert the model with a recipe unless it is there."""
    out = work / (recipe if weights == "fp32" else f"{recipe}-{weights}")
    if not (out / "memc.json").is_file():
        api.convert(model(), out, recipe=recipe, weights=weights, threads=1, context=context, fresh=True, force=True)
    return out


def measure(sides: list[Side], context: int) -> None:
    """Let the sides take turns at one token each."""
    for side in sides:
        side.start(context)
    for index in range(STEPS + WARM_UP):
        for side in sides[:: -1 if index % 2 else 1]:
            side.step(index + 5)


def rows(arguments: argparse.Namespace, target: Target) -> dict[str, list[dict[str, Any]]]:
    """Predict and measure everything that was asked for: tokens and prompts."""
    longest = max(arguments.contexts) + STEPS + WARM_UP
    outs = {recipe: artifact(recipe, arguments.work, longest, arguments.weights) for recipe in arguments.recipes}
    sides = [Side(name, runtime.load(out, threads=arguments.threads), arguments.threads) for name, out in outs.items()]
    programs = {name: load_program(out / "program") for name, out in outs.items()}
    settings = {"weights": arguments.weights, "threads": arguments.threads}
    lengths = {*arguments.contexts, *arguments.prompts}
    predicted = {name: predict(program, target, lengths, **settings) for name, program in programs.items()}
    tokens, prompts = [], []
    for context in sorted(arguments.contexts):
        measure(sides, context)
        tokens += [row(side, context, predicted[side.recipe].decode_ms, WARM_UP) for side in sides]
    for length in sorted(arguments.prompts):
        for side in sides:
            side.prompt(length)
            prompts.append(row(side, length, predicted[side.recipe].prefill_ms, 0))
    return {"rows": tokens, "prompts": prompts}


def row(side: Side, context: int, predicted: dict[int, float], first: int) -> dict[str, Any]:
    """Put what a side took from a repetition on, the median, beside what was predicted."""
    wall, cpu = (1e3 * statistics.median(times[first:]) for times in (side.wall, side.cpu))
    # With one thread other programs of a busy machine add to the wall alone.
    measured = cpu if side.threads == 1 else wall
    found = {"recipe": side.recipe, "context": context, "predicted_ms": predicted[context], "wall_ms": wall}
    found |= {"cpu_ms": cpu, "measured_ms": measured, "error": predicted[context] / measured - 1}
    print(f"{side.recipe:14}{context:7}{found['predicted_ms']:10.1f}{measured:10.1f}", file=sys.stderr)
    return found


def page(document: dict[str, Any]) -> str:
    """Write the page."""
    target = document["target"]
    rates = [
        f"weights {amount(target['memory_bandwidth'], 'B/s')}",
        f"states {amount(target['state_bandwidth'], 'B/s')}",
        *(f"{name} {amount(rate, 'FLOP/s')}" for name, rate in target["flops"].items()),
        *(f"prompts {name} {amount(rate, 'FLOP/s')}" for name, rate in target.get("prompt_flops", {}).items()),
        *(f"prompts {name} {amount(rate, 'FLOP/s')}" for name, rate in target.get("prompt_ops", {}).items()),
        f"launch {1e6 * target['launch_overhead']:.2g} us",
    ]
    parts = [
        f"# Prediction against measurement: SmolLM2-135M, {document.get('weights', 'fp32')}, milliseconds",
        f"{document['cpu']}, {document['cores']} cores, {document['threads']} threads, "
        f"load {document['load_before']:.1f} before the start; memc at {document['commit']}. "
        f"`memc targets calibrate`: {', '.join(rates)}, per core. With one thread measured is time of the processor, "
        "else of the wall.",
        f"A token, {within(document['rows'])} Measured is the median of {STEPS} steps after a random state, the "
        "recipes in turns.",
        table(document["rows"]),
    ]
    if prompts := document.get("prompts"):
        parts += [f"A prompt, {within(prompts)} Measured once, from nothing.", table(prompts)]
    return "\n\n".join(parts) + "\n"


def within(found: list[dict[str, Any]]) -> str:
    """Say how many rows are predicted well, and which one worst."""
    worst = max(found, key=lambda row: abs(row["error"]))
    count = sum(abs(row["error"]) <= GOAL for row in found)
    return (
        f"{count} of {len(found)} within {100 * GOAL:.0f} %; the worst is {worst['recipe']} at {worst['context']:,}, "
        f"{100 * worst['error']:+.0f} %."
    )


def table(found: list[dict[str, Any]]) -> str:
    """Write rows below each other."""
    lines = [
        [
            row["recipe"],
            f"{row['context']:,}",
            *(f"{row[name]:.1f}" for name in ("predicted_ms", "measured_ms", "wall_ms")),
            f"{100 * row['error']:+.0f} %",
        ]
        for row in found
    ]
    return grid(["recipe", "context", "predicted", "measured", "wall", "error"], lines)


def main() -> None:
    """Calibrate, measure, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=numbers, default=[64, 512, 2048, 8192, 32000])
    parser.add_argument("--recipes", type=lambda text: text.split(","), default=["dense", "streaming", "long-context"])
    parser.add_argument("--prompts", type=numbers, default=[64, 512, 2048, 4096])
    parser.add_argument("--weights", default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("out/predict"), help="where artifacts are and go")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="where the two files go")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    document = {"schema": "memc.benchmark.predict/1", **facts(), "threads": arguments.threads}
    target = calibrate(threads=arguments.threads)
    document |= {"weights": arguments.weights, "target": target.model_dump(), **rows(arguments, target)}
    save(arguments.out / f"predict-{datetime.date.today().isoformat()}.json", document, page)


if __name__ == "__main__":
    main()
