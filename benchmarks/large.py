"""A conversion of a model that does not fit in memory in float32: anonymous memory, wall and CPU time of each step.

    python benchmarks/large.py FOLDER                          # 6.7 B parameters; 32 GB of disk
    python benchmarks/large.py FOLDER --layers 4 --weights int8 --threads 2

Writes a random Llama in bfloat16 shards under ``FOLDER/model`` unless it is there, converts it into ``FOLDER/out``,
which is removed before and after, and writes ``results/large-DATE.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from cpu import QUIET, facts
from page import grid, save
from safetensors.torch import save_file

from memc.machine import memory_bytes

HERE = Path(__file__).parent
TICK = 0.05
"""Seconds between two looks at the memory of the conversion."""


def build(folder: Path, sizes: Mapping[str, int], seed: int = 0) -> None:
    """Write a random Llama of these ``sizes`` in bfloat16, one shard a layer, never more than a shard in memory."""
    from transformers import LlamaConfig

    config = LlamaConfig(**sizes, max_position_embeddings=4096, tie_word_embeddings=False, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    folder.mkdir(parents=True)
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    kept = hidden // config.num_attention_heads * config.num_key_value_heads
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kept, hidden),
        "self_attn.v_proj": (kept, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shards: list[dict[str, tuple[int, ...]]] = [
        {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
        for index in range(config.num_hidden_layers)
    ]
    shards.append(
        {
            "model.embed_tokens.weight": (vocab, hidden),
            "model.norm.weight": (hidden,),
            "lm_head.weight": (vocab, hidden),
        }
    )
    places: dict[str, str] = {}
    generator = torch.Generator().manual_seed(seed)
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: values(shape, generator) for name, shape in shapes.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config.save_pretrained(folder)


def values(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Draw a matrix as training starts with it; a norm's scale is 1."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)


class Watch:
    """The memory of a process, looked at all the time; ``peaks`` of ``RssAnon`` and ``RssFile`` since it was asked."""

    def __init__(self, process: int) -> None:
        """Start looking."""
        self.process = process
        self.peaks = {"RssAnon": 0, "RssFile": 0}
        self.over = False
        threading.Thread(target=self._look, daemon=True).start()

    def take(self) -> dict[str, int]:
        """Return the peaks in bytes and start over."""
        found, self.peaks = self.peaks, {"RssAnon": 0, "RssFile": 0}
        return found

    def cpu(self) -> float:
        """Return the seconds of CPU that the process has used."""
        fields = Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _look(self) -> None:
        while not self.over:
            try:
                status = Path(f"/proc/{self.process}/status").read_text()
            except OSError:
                return
            for name, kib in re.findall(r"^(RssAnon|RssFile):\s+(\d+) kB", status, re.MULTILINE):
                self.peaks[name] = max(self.peaks[name], int(kib) * 1024)
            time.sleep(TICK)


def convert(model: Path, out: Path, weights: str, recipe: str, threads: int) -> dict[str, Any]:
    """Convert in a process of its own; return each step's peaks and times, and what the conversion says of itself."""
    command = [sys.executable, "-m", "memc", "convert", str(model), "-o", str(out), "--target", "cpu", "--json"]
    command += ["--recipe", recipe, "--weights", weights, "--threads", str(threads), "--fresh", "--force"]
    env = {**os.environ, **QUIET, "OMP_NUM_THREADS": str(threads)}
    began = time.perf_counter()
    said = out.with_name(out.name + ".json")
    with said.open("w") as stdout:
        process = subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, env=env, text=True)
    watch = Watch(process.pid)
    assert process.stderr is not None
    steps, last, used = [], began, 0.0
    for line in process.stderr:
        print(line, end="", file=sys.stderr, flush=True)
        if found := re.match(r"(.*?) \.\.\. ([\d.]+) s$", line.strip()):
            now, cpu = time.perf_counter(), watch.cpu()
            steps.append(
                {"step": found[1].replace(str(model), "MODEL"), "wall": now - last, "cpu": cpu - used, **watch.take()}
            )
            last, used = now, cpu
    if process.wait():
        raise SystemExit(f"the conversion ended with {process.returncode}: {said.read_text()}")
    watch.over = True
    document = json.loads(said.read_text())
    said.unlink()
    kept = {name: document[name] for name in ("checks", "passes", "measured", "predicted")}
    return {"weights": weights, "wall": time.perf_counter() - began, "cpu": used, "steps": steps, **kept}


def page(document: dict[str, Any]) -> str:
    """Write the page of a run."""
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    sizes = ", ".join(f"{name} {size}" for name, size in document["sizes"].items())
    parts = [
        "# A model that does not fit in float32",
        f"{document['cpu']}, {document['cores']} cores, {document['memory_bytes'] / 2**30:.0f} GiB,"
        f" {document['threads']} thread(s), load {document['load_before']:.1f} before the start; {versions};"
        f" memc at {document['commit']}. A random Llama in bfloat16 ({sizes}), recipe `{document['recipe']}`. Memory is"
        f" `RssAnon` and `RssFile` of `/proc/PID/status`, every {1000 * TICK:.0f} ms: the first is what the machine has"
        " to have, the second are pages of files that it can drop. See [README](../README.md).",
    ]
    for run in document["runs"]:
        parts += [f"## {run['weights']}", table(run), checks(run)]
    return "\n\n".join(parts) + "\n"


def table(run: dict[str, Any]) -> str:
    """Write one line a step."""
    total = {"step": "all", "wall": run["wall"], "cpu": run["cpu"]}
    total |= {name: max(step[name] for step in run["steps"]) for name in ("RssAnon", "RssFile")}
    lines = [
        [
            one["step"],
            f"{one['wall']:.0f}",
            f"{one['cpu']:.0f}",
            f"{one['RssAnon'] / 2**30:.2f} GiB",
            f"{one['RssFile'] / 2**30:.2f} GiB",
        ]
        for one in [*run["steps"], total]
    ]
    return grid(["step", "wall, s", "CPU, s", "anonymous, peak", "of files, peak"], lines)


def checks(run: dict[str, Any]) -> str:
    """Write what was checked, the passes' relations first."""
    lines = []
    for one in run["passes"]:
        for relation in one["relations"]:
            name = f"{one['spec']}: {relation.get('metric') or relation['relation']}"
            lines.append([name, relation["value"], relation["budget"], relation["passed"], ""])
    lines += [[c["name"], c["value"], c["budget"], c["passed"], c["detail"]] for c in run["checks"]]
    shown = [
        [
            name,
            "-" if value is None else f"{value:.3g}",
            "-" if budget is None else f"{budget:.3g}",
            str(passed),
            detail,
        ]
        for name, value, budget, passed, detail in lines
    ]
    return grid(["check", "value", "budget", "passed", "detail"], shown)


def main() -> None:
    """Build, convert, write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model and the artifact go")
    parser.add_argument("--weights", default="int4", help="types to convert to, one after the other: int4,int8")
    parser.add_argument("--recipe", default="long-context")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="where the two files of results go")
    arguments = parser.parse_args()
    sizes = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    }
    model, out = arguments.folder / "model", arguments.folder / "out"
    if not model.exists():
        build(model, sizes)
    document = {"schema": "memc.benchmark.large/1", **facts(), "memory_bytes": memory_bytes(), "sizes": sizes}
    document |= {"threads": arguments.threads, "recipe": arguments.recipe, "runs": []}
    for weights in arguments.weights.split(","):
        shutil.rmtree(out, ignore_errors=True)
        document["runs"].append(convert(model, out, weights, arguments.recipe, arguments.threads))
        results = arguments.out / f"large-{datetime.date.today().isoformat()}.json"
        save(results, document, page)
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
