"""A token of the whole SmolLM2-135M at a long context: sparse beside dense and llama.cpp, and what reading alone takes.

    pip install xllamacpp                    # llama.cpp; needs nothing else
    python benchmarks/sparse_decode.py       # converts what is missing, measures; hours, most of them llama.cpp's
    python benchmarks/sparse_decode.py --weights int4 --sides dense,bounds,llama.cpp

The sides of memc start from random states, as a prompt of that length takes hours; llama.cpp runs its prompt. All take
turns at single tokens (llama.cpp at bursts of four), and with them a sum over an array much larger than every cache,
for the rate at which one thread reads. Writes ``results/sparse-decode-DATE.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cpu import facts, model
from gguf import GGUFReader
from page import grid, save
from predict import STEPS, WARM_UP, Side
from sides import LlamaCpp

from memc import api, runtime
from memc.cost import Demand, demands
from memc.machine import cores
from memc.plugins import load_kernels
from memc.program_io import load_program

LLAMA = "llama.cpp"
SIDES = {
    "dense": ("onnx", ""),
    "lowbit": ("onnx", "sparsify"),
    "bounds": ("onnx", "sparsify:method=bounds"),
    "two levels": ("onnx", "sparsify:method=bounds,levels=2"),
    "4 bits": ("onnx", "sparsify:method=bounds,bits=4"),
    "half stream": ("onnx", "sparsify:method=bounds,retrieve=heads:50%"),
    "dense in tvm": ("tvm", ""),
    "bounds in tvm": ("tvm", "sparsify:method=bounds"),
    "two levels in tvm": ("tvm", "sparsify:method=bounds,levels=2"),
}
READ = 1 << 28
"""Bytes of the array that is summed."""
BURST = 4
"""Tokens of a turn of llama.cpp, whose server is asked for many at once."""


@dataclass
class Timed:
    """What takes its turn, and what it took: seconds of the processor and of the wall."""

    step: Callable[[int], Any]
    tokens: int = 1
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def turn(self, token: int) -> None:
        """Take one."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.step(token)
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)

    def ms(self) -> dict[str, float]:
        """Return medians, and the least and the most of the processor, once warm."""
        taken = ([1e3 * one / self.tokens for one in times[WARM_UP:]] for times in (self.cpu, self.wall))
        cpu, wall = map(sorted, taken)
        return {"cpu_ms": statistics.median(cpu), "least": cpu[0], "most": cpu[-1], "wall_ms": statistics.median(wall)}


def artifact(name: str, weights: str, context: int, work: Path) -> Path:
    """Convert the model for a side unless that was done."""
    backend, spec = SIDES[name]
    out = work / f"{name.replace(' ', '-')}-{weights}"
    if not (out / "memc.json").is_file():
        passes = [spec] if spec else []
        options: dict[str, Any] = {"weights": weights, "threads": 1, "context": context, "backend": backend}
        api.convert(model(), out, recipe="dense", passes=passes, fresh=True, force=True, **options)
    return out


def llama(context: int, work: Path) -> Timed:
    """Run the prompt; a turn then is a burst of tokens after it, before which the prompt's last is evaluated again.

    The server takes no more tokens than the model was trained on: a copy of the file says that it was on as many.
    """
    room = context + BURST + 8
    copy = work / f"context-{room}.gguf"
    if not copy.is_file():
        shutil.copyfile(model(), copy)
        GGUFReader(copy, "r+").fields["llama.context_length"].parts[-1][0] = room
    side = LlamaCpp(str(copy), 1, room, prompt_threads=cores())
    side.prefill([index % 1000 for index in range(context)], BURST)
    return Timed(lambda token: side.burst(BURST), BURST + 1)


def measure(names: list[str], weights: str, context: int, work: Path) -> dict[str, Any]:
    """Let the sides take turns; return the bytes that each reads and what it takes."""
    room = context + STEPS + WARM_UP
    outs = {name: artifact(name, weights, room, work) for name in names if name != LLAMA}
    timed, asked = {}, {}
    for name, out in outs.items():
        side = Side(name, runtime.load(out, threads=1), 1)
        side.start(context)
        timed[name] = Timed(side.step)
        asked[name] = demands(load_program(out / "program"), [context], weights)[context]
    if LLAMA in names:
        timed[LLAMA] = llama(context, work)
    array = torch.ones(READ // 4)
    timed["reading"] = Timed(lambda token: array.sum())
    order = list(timed.values())
    for index in range(STEPS + WARM_UP):
        for one in order[:: -1 if index % 2 else 1]:
            one.turn(index + 5)
        print(index, {name: round(1e3 * one.cpu[-1], 1) for name, one in timed.items()}, flush=True)
    rate = READ / timed.pop("reading").ms()["cpu_ms"] * 1e3
    lines = [line(name, one.ms(), asked.get(name), rate) for name, one in timed.items()]
    return {"weights": weights, "context": context, "rate": rate, "lines": lines}


def line(name: str, taken: dict[str, float], asked: Demand | None, rate: float) -> dict[str, Any]:
    """Put what a side took beside what reading its bytes takes."""
    if asked is None:
        return {"side": name, **taken}
    read = {"weight_bytes": asked.weight_bytes, "state_bytes_read": asked.state_bytes_read}
    return {"side": name, **taken, **read, "state_bytes": asked.state_bytes, "bound_ms": 1e3 * asked.bytes_read / rate}


def page(document: dict[str, Any]) -> str:
    """Write the page of all runs."""
    parts = ["# A token of SmolLM2-135M at a long context, one thread", "See [README](../README.md)."]
    for run in document["runs"]:
        parts += [
            f"## {run['context']:,} tokens, weights {run['weights']}",
            f"{run['cpu']}, {run['cores']} cores, load {run['load_before']:.1f} before the start; memc at"
            f" {run['commit']}. Milliseconds of the processor a token, median of {STEPS} and in brackets the least and"
            " the most, the sides taking turns. Read is what the program says that a token reads; the bound is that"
            f" at {run['rate'] / 1e9:.1f} GB/s, the rate of a sum that took turns with the sides; the share is that of"
            " the bound in the time.",
            table(run["lines"]),
        ]
    return "\n\n".join(parts) + "\n"


def table(lines: list[dict[str, Any]]) -> str:
    """Write one line a side."""
    dense = lines[0]["cpu_ms"]
    rows = []
    for one in lines:
        told = ["", "", "", ""]
        if "bound_ms" in one:
            told = [f"{one[name] / 1e6:.0f}" for name in ("weight_bytes", "state_bytes_read")]
            told += [f"{one['bound_ms']:.1f}", f"{100 * one['bound_ms'] / one['cpu_ms']:.0f}%"]
        ms = f"{one['cpu_ms']:.1f} ({one['least']:.1f}-{one['most']:.1f})"
        rows.append([one["side"], ms, f"{one['wall_ms']:.1f}", f"{dense / one['cpu_ms']:.2f}x", *told])
    head = ["side", "ms", "wall", f"{lines[0]['side']} / side", "weights read, MB", "states read, MB", "bound, ms"]
    return grid([*head, "share"], rows)


def main() -> None:
    """Measure, and write the results, beside those of other weights and contexts of the same day."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=32000)
    parser.add_argument("--sides", type=lambda text: text.split(","), help="by default all")
    parser.add_argument("--weights", default="fp32")
    parser.add_argument("--work", type=Path, default=Path("out/sparse-decode"), help="where artifacts are and go")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="where the two files go")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    load_kernels()
    names = given.sides or [*SIDES, LLAMA]
    path = given.out / f"sparse-decode-{datetime.date.today()}.json"
    document = json.loads(path.read_text()) if path.exists() else {"runs": []}
    found = {**facts(), **measure(names, given.weights, given.context, given.work)}
    same = (given.weights, given.context)
    document["runs"] = [run for run in document["runs"] if (run["weights"], run["context"]) != same] + [found]
    save(path, document, page)


if __name__ == "__main__":
    main()
