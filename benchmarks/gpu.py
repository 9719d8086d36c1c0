"""memc's kernels and steps on a GPU, side by side with what others have; under ten minutes on one of the larger ones.

    pip install flash-linear-attention            # optional: its kernels are sides where they are installed
    python benchmarks/gpu.py                      # correctness first, then everything
    python benchmarks/gpu.py --only linear,sparse
    python benchmarks/gpu.py --tune               # times each kernel's choices of tile and writes kernels/tiles.toml

Writes ``results/gpu-DATE.json`` and ``.md``. Without a GPU it says so and writes nothing: figures are never estimated.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from gpu_sides import LARGE, SMOLLM2, Dense, Shape, Side, Steps, hybrid, linear, prompt, sparse
from gpu_tune import Tuner, write
from page import grid, save
from torch import Tensor

from memc.backends.triton.backend import here
from memc.kernels.launch import launcher_of, launching

HERE = Path(__file__).parent
ROUNDS = 20
LIMIT = 5e-3
"""Most that a kernel in bfloat16 may differ from the reference, relative to its root mean square."""

Row = dict[str, Any]


class Clock:
    """Times sides in turns by the GPU's own events, with a cold cache each time."""

    def __init__(self, device: torch.device) -> None:
        """Allocate what is written between two runs: larger than any cache."""
        self._flush = torch.empty(1 << 28, dtype=torch.int8, device=device)

    def once(self, side: Side) -> float:
        """Return the milliseconds of one run."""
        self._flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        side()
        stop.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(stop))

    def turns(self, sides: Mapping[str, Side], rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
        """Return each side's median, least and most in milliseconds; three rounds warm up."""
        found: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(rounds + 3):
            for name in list(sides)[:: -1 if number % 2 else 1]:
                taken = self.once(sides[name])
                if number >= 3:
                    found[name].append(taken)
        return {name: {"ms": statistics.median(t), "low": min(t), "high": max(t)} for name, t in found.items()}


def error(found: Tensor, expected: Tensor) -> float:
    """Return the root mean square of the difference over that of what is expected."""
    return float((found.double() - expected.double()).square().mean().sqrt() / expected.double().square().mean().sqrt())


def correctness(device: torch.device) -> list[Row]:
    """Compare each kind of side with the references; ``tests/gpu`` compares every op."""
    rows = []
    for size in (64, 128):
        shape = Shape(1, 4, 4, 300, size, device)
        own = linear(shape)[0]["memc"]
        rows.append({"what": f"linear memory, {size} channels", "error": _against_reference(own)})
        rows.append(
            {"what": f"window and memory, {size} channels", "error": _against_reference(prompt(shape, 64)["memc"])}
        )
        step = Shape(2, 8, 2, 1, size, device)
        rows.append(
            {"what": f"sparse step, {size} channels", "error": _against_reference(sparse(step, 4096, 512)["memc"])}
        )
    return rows


def _against_reference(side: Side) -> float:
    """Run a side by the kernels, then with the same inputs by the references, which run on a GPU too."""
    found = side()
    with launching(None):
        return error(found, side())


def kernels_of_linear(device: torch.device, clock: Clock) -> Iterator[Row]:
    """Time chunked linear attention, forward, and forward with backward."""
    for size in (64, 128):
        for tokens in (2048, 8192, 16384, 65536):
            forward, trained = linear(Shape(1, 2048 // size, 2048 // size, tokens, size, device))
            for name, sides in (("forward", forward), ("forward and backward", trained)):
                yield {"what": name, "size": size, "tokens": tokens, "sides": clock.turns(sides)}


def layers_of_prompts(device: torch.device, clock: Clock) -> Iterator[Row]:
    """Time a prompt through one layer of 32 heads over 8."""
    for tokens in (1024, 4096, 16384, 65536):
        sides = prompt(Shape(1, 32, 8, tokens, 128, device), 256)
        with torch.no_grad():
            yield {"what": "prompt of a layer", "size": 128, "tokens": tokens, "sides": clock.turns(sides)}


def sparse_steps(device: torch.device, clock: Clock) -> Iterator[Row]:
    """Time one token's attention by choice beside all."""
    for batch in (1, 8, 32):
        for held in (32768, 131072):
            sides = sparse(Shape(batch, 32, 8, 1, 128, device), held, 2048)
            with torch.no_grad():
                yield {"what": f"sparse step, batch {batch}", "size": 128, "tokens": held, "sides": clock.turns(sides)}


def bandwidth(device: torch.device, clock: Clock) -> float:
    """Return the bytes a second that a copy of 2 GiB reads and writes."""
    source = torch.empty(1 << 31, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    times = clock.turns({"copy": lambda: target.copy_(source)})
    return 2 * source.numel() / (times["copy"]["ms"] * 1e-3)


def whole_steps(device: torch.device, clock: Clock) -> Iterator[Row]:
    """Time steps of whole hybrids beside a dense model of the same sizes, and beside what their bytes allow."""
    rate = bandwidth(device, clock)
    launcher = launcher_of(device)
    assert launcher is not None
    for name, sizes in (("SmolLM2", SMOLLM2), ("8B", LARGE)):
        program = hybrid(sizes, "linearize:window=256", here(), torch.bfloat16, device)
        for batch in (1, 32):
            for context in (32768, 131072):
                steps = Steps(program, launcher, batch, context, device)
                sides: dict[str, Side] = {"memc": steps}
                try:
                    sides["SDPA, torch.compile"] = Dense(sizes, batch, context, torch.bfloat16, device, compiled=True)
                    times = clock.turns(sides)
                except torch.cuda.OutOfMemoryError:
                    times = clock.turns({"memc": steps})
                bound = steps.bytes / rate * 1e3
                yield {"what": f"{name}, batch {batch}", "tokens": context, "bound_ms": bound, "sides": times}
                del steps, sides
                gc.collect()
                torch.cuda.empty_cache()


SECTIONS: dict[str, Callable[[torch.device, Clock], Iterator[Row]]] = {
    "linear": kernels_of_linear,
    "prompt": layers_of_prompts,
    "sparse": sparse_steps,
    "steps": whole_steps,
}
TITLES = {
    "linear": "Gated linear attention, one gate a head, 2,048 channels in all",
    "prompt": "A prompt through one layer: window of 256 and memory, 32 heads over 8",
    "sparse": "Attention of one token, 2,048 chosen",
    "steps": "A step of a whole model, `linearize:window=256` in every layer",
}


def page(document: dict[str, Any]) -> str:
    """Write the page."""
    facts = document["facts"]
    parts = [
        f"# On {facts['device']}",
        f"{document['date']}; "
        + ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
        + f"; memc at {facts['commit']}."
        f" bfloat16. A cell is the median of {ROUNDS} runs in milliseconds and, in brackets, the least and the most;"
        " sides take turns, the cache is cold, times are the GPU's own. See [README](../README.md).",
        "## Correctness\n\nRoot mean square of the difference to the reference, which sums in float32, over its own.",
        grid(["what", "error"], ([row["what"], f"{row['error']:.1e}"] for row in document["correctness"])),
    ]
    for name, rows in document["sections"].items():
        sides = list(dict.fromkeys(side for row in rows for side in row["sides"]))
        head = ["", "channels", "tokens", *sides, *(f"{side} / memc" for side in sides[1:])]
        bounded = any("bound_ms" in row for row in rows)
        lines = [_line(row, sides, bounded=bounded) for row in rows]
        parts += [f"## {TITLES[name]}", grid(head + (["of the byte bound"] if bounded else []), lines)]
    return "\n\n".join(parts) + "\n"


def _line(row: Row, sides: list[str], *, bounded: bool) -> list[str]:
    times = row["sides"]
    cells = [f"{t['ms']:.3f} ({t['low']:.3f}-{t['high']:.3f})" if (t := times.get(side)) else "-" for side in sides]
    ratios = [f"{times[s]['ms'] / times['memc']['ms']:.2f}" if s in times else "-" for s in sides[1:]]
    share = [f"{row['bound_ms'] / times['memc']['ms']:.0%}"] if bounded else []
    return [row["what"], str(row.get("size", "")), f"{row['tokens']:,}", *cells, *ratios, *share]


def tune(device: torch.device, clock: Clock) -> None:
    """Settle the tiles of every kernel on this GPU and write them where the kernels look for them."""
    launcher = launcher_of(device)
    assert launcher is not None
    tuner = Tuner(launcher, lambda side: statistics.median(clock.once(side) for _ in range(7)))
    for size in (64, 128):
        for side in (*linear(Shape(1, 16, 16, 8192, size, device)), prompt(Shape(1, 32, 8, 8192, size, device), 256)):
            tuner.tune(side["memc"])
        for shape in (Shape(8, 32, 8, 1, size, device), Shape(1, 32, 8, 1, size, device)):
            tuner.tune(prompt(shape, 256)["memc"])
            tuner.tune(sparse(shape, 32768, 2048)["memc"])
    write(HERE.parent / "kernels" / "tiles.toml", here(), tuner.best)


def versions() -> dict[str, str]:
    """Return the versions that figures depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"torch": torch.__version__, "driver": str(torch.version.cuda or torch.version.hip)}
    for name in ("triton", "flash-linear-attention"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--tune", action="store_true", help="settle the tiles of this GPU first")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU on this machine: nothing is measured, nothing is written")
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    clock = Clock(device)
    if chosen.tune:
        tune(device, clock)
    checked = correctness(device)
    if wrong := [row["what"] for row in checked if not row["error"] <= LIMIT]:
        sys.exit(f"wrong results, nothing is timed: {', '.join(wrong)}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    document: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "facts": {"device": torch.cuda.get_device_name(device), "versions": versions(), "commit": commit.strip()},
        "correctness": checked,
        "sections": {},
    }
    for name in chosen.only.split(","):
        rows = document["sections"].setdefault(name, [])
        for row in SECTIONS[name](device, clock):
            rows.append(row)
            print(name, row["what"], row["tokens"], {s: round(t["ms"], 3) for s, t in row["sides"].items()}, flush=True)
        save(chosen.out / f"gpu-{document['date']}.json", document, page)


if __name__ == "__main__":
    main()
