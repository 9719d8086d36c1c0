"""How near a linearized SmolLM2-135M comes to the original on a CPU: training, choice of layers, controls.

    python benchmarks/texts.py texts
    python benchmarks/linearize.py --texts texts --tokens 300000

Trains on five Austen novels and on text sampled from the model itself, holds out the sixth novel (in domain) and the
Jargon File (another domain), and writes ``results/linearize-DATE.json`` and ``.md``. Interrupted it goes on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpu import facts as machine_facts
from cpu import model
from page import grid, save

from memc.cli.console import Console
from memc.conversion.pipeline import window_baseline
from memc.conversion.training import make_trainer, training_data
from memc.data import tokenize
from memc.frontend import capture_source
from memc.machine import cores
from memc.pipeline import Pass, PassReport, Plan, parse_spec
from memc.program import Program
from memc.program_io import load_program, save_program
from memc.raising import raise_program
from memc.recipe import Recipe
from memc.runtime.text import Text
from memc.target import get_target
from memc.train.adapters import add_adapters, attention_projections, fold_adapters
from memc.train.loop import Checkpoints, Schedule
from memc.train.recovery import Recovery, recover
from memc.train.trainer import ADAPTER_SCALE, Trainer
from memc.verify.relations import kl_mean, perplexity
from memc.weights import materialize

HERE = Path(__file__).parent
NOVELS = ("emma", "mansfield-park", "persuasion", "pride-and-prejudice", "sense-and-sensibility")
HELD_OUT = {"Austen": "austen-northanger-abbey.txt", "Jargon File": "jargon.txt"}
ROWS = {"Austen": 10, "Jargon File": 6}
LENGTHS = (512, 1024)
WINDOW = 64


class Bench:
    """One run: the original, its tokenizer, and the trainer that both variants share."""

    def __init__(self, work: Path, texts: Path, tokens: int, seed: int) -> None:
        """Read the model and the texts."""
        self.work, self.console = work, Console()
        (work / "report").mkdir(parents=True, exist_ok=True)
        captured = capture_source(model())
        for path in captured.tokenizer_files:
            shutil.copyfile(path, work / path.name)
        raised = raise_program(captured.program)
        assert captured.weights is not None
        self.original = materialize(raised.program, captured.weights)
        self.recipe = Recipe(
            recipe=1, data=[str(texts / f"austen-{name}.txt") for name in NOVELS], tokens=tokens, seed=seed
        )
        data = training_data(self.recipe, self.original, work, self.console)
        self.trainer: Trainer = make_trainer(self.recipe, data, self.original, self.console)
        self.held_out = {name: self.rows(texts / file, ROWS[name], max(LENGTHS)) for name, file in HELD_OUT.items()}
        self.seconds: dict[str, float] = {}
        self.cpu: dict[str, float] = {}

    def rows(self, path: Path, count: int, length: int) -> torch.Tensor:
        """Return ``count`` rows of ``length`` tokens spread evenly over the last tenth of a text."""
        ids = tokenize([path], Text(self.work).tokenizer)
        ids = ids[len(ids) * 9 // 10 :]
        starts = np.linspace(0, len(ids) - length, count).astype(int)
        return torch.from_numpy(np.stack([ids[start : start + length] for start in starts]))

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add up the wall and the processor time of a part."""
        wall, used = time.perf_counter(), _cpu()
        yield
        self.seconds[name] = time.perf_counter() - wall
        self.cpu[name] = _cpu() - used

    def apply(self, pass_: Pass) -> tuple[Plan, Program, PassReport]:
        """Plan and apply a pass to the original."""
        plan = pass_.plan(self.original, get_target("cpu"))
        after, report = pass_.apply(self.original, plan)
        return plan, after, report

    def train(self, name: str, spec: str, shared: str | None = None) -> tuple[Program, Program, dict[str, Any], Pass]:
        """Train a pass, or read what an earlier run made; ``shared`` names the variant whose transfer it takes."""
        folder = self.work / name
        facts = folder / "facts.json"
        if not facts.is_file():
            if shared is not None and not (folder / "training" / "transfer").exists():
                (folder / "training").mkdir(parents=True, exist_ok=True)
                source = self.work / shared / "training"
                shutil.copytree(source / "transfer", folder / "training" / "transfer")
                shutil.copyfile(source / "transfer.json", folder / "training" / "transfer.json")
            with self.timed(name):
                pass_ = parse_spec(spec)
                trained = self.trainer.train(pass_, self.original, self.apply(pass_), self.apply, folder / "training")
            save_program(trained.transferred, folder / "transferred")
            save_program(trained.program, folder / "program")
            times = {"seconds": self.seconds[name], "cpu": self.cpu[name]}
            assert trained.facts is not None
            facts.write_text(
                json.dumps({"spec": trained.pass_.spec, **times, **trained.facts.model_dump(mode="json")}) + "\n"
            )
        found = json.loads(facts.read_text())
        return (
            load_program(folder / "transferred"),
            load_program(folder / "program"),
            found,
            parse_spec(found["spec"]),
        )

    def window(self, name: str, pass_: Pass) -> tuple[Program, Program]:
        """Return the ``window`` pass in the same layers, untrained, and with the same adapters and steps."""
        plan = pass_.plan(self.original, get_target("cpu"))
        plain = window_baseline(pass_, plan, self.original, get_target("cpu"))
        folder = self.work / name / "window"
        if not folder.is_dir():
            settings = self.trainer.settings
            with self.timed(f"{name}, window"):
                adapted, adapters = add_adapters(
                    plain, attention_projections(self.original), settings.adapters, ADAPTER_SCALE, self.trainer.seed
                )
                rates = dict.fromkeys([n for a in adapters for n in (a.down, a.up)], settings.adapter_rate)
                recovery = Recovery(
                    self.original, adapted, rates, settings.accumulate, settings.text, self.trainer.products
                )
                schedule = Schedule(self.trainer.recovery_steps)
                first = self.trainer.transfer_steps
                checkpoints = Checkpoints(self.work / name / "window-training", {"side": "window"})
                recover(
                    recovery,
                    lambda step: self.trainer.batches(first + step),
                    self.trainer.guard,
                    schedule,
                    checkpoints,
                    self.console,
                )
            save_program(fold_adapters(plain, adapted, adapters), folder)
        return plain, load_program(folder)

    def measure(self, name: str, program: Program) -> dict[str, float]:
        """Return perplexity, its ratio to the original's, and KL to the original on the held-out texts."""
        path = self.work / "measured.json"
        known: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.is_file() else {}
        if name not in known:
            found: dict[str, float] = {}
            for text, rows in self.held_out.items():
                for length in LENGTHS:
                    tokens = rows[:, :length]
                    found[f"{text} {length}"] = perplexity(program, tokens)
                found[f"{text} KL"] = kl_mean(self.original, program, rows[:, : LENGTHS[0]])
            known[name] = found
            path.write_text(json.dumps(known) + "\n")
        return known[name]


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def page(document: dict[str, Any]) -> str:
    """Write the Markdown page of a run."""
    rows = document["rows"]
    base = rows["original"]
    columns = [key for key in base if "KL" not in key]
    head = ["side", *(f"{c}" for c in columns), *(f"{c}" for c in base if "KL" in c)]
    lines = []
    for name, row in rows.items():
        ratios = [f"{row[c]:.2f}" if name == "original" else f"{row[c] / base[c]:.3f}" for c in columns]
        lines.append([name, *ratios, *("-" if name == "original" else f"{row[c]:.4f}" for c in base if "KL" in c)])
    versions_ = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    parts = [
        "# Linearizing SmolLM2-135M on a CPU",
        f"{document['cpu']}, {document['cores']} cores, {document['threads']} threads in use; {versions_}; memc at"
        f" {document['commit']}. Window {WINDOW} and 4 sinks; {document['tokens']} tokens of five Austen novels and of"
        f" text sampled from the model, in sequences of 512, seed {document['seed']}.",
        "Perplexity of the original, then ratios to it, at 8 and 16 windows of context on text that nothing was trained"
        " on: the sixth novel, and the Jargon File as another domain. KL to the original in nats a token at 512.",
        grid(head, lines),
        "## Time",
        grid(
            ["part", "wall, s", "processor, s", "kept layers"],
            (
                [
                    name,
                    f"{f['seconds']:.0f}",
                    f"{f['cpu']:.0f}",
                    ", ".join(map(str, (f["choice"] or {}).get("kept", []))),
                ]
                for name, f in document["training"].items()
            ),
        ),
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("out/linearize"))
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    torch.set_num_threads(given.threads)
    bench = Bench(given.work, given.texts, given.tokens, given.seed)
    training, rows = {}, {"original": bench.measure("original", bench.original)}
    for name, keep, shared in (("25 % kept", "auto:25%", None), ("none kept", "none", "25 % kept")):
        transferred, program, facts, pass_ = bench.train(name, f"linearize:window={WINDOW},keep={keep}", shared)
        training[name] = facts
        rows[f"{name}: transfer"] = bench.measure(f"{name}: transfer", transferred)
        rows[f"{name}: transfer and recovery"] = bench.measure(f"{name}: transfer and recovery", program)
        plain, adapted = bench.window(name, pass_)
        rows[f"{name}: window, untrained"] = bench.measure(f"{name}: window, untrained", plain)
        rows[f"{name}: window, same adapters and steps"] = bench.measure(f"{name}: window, adapted", adapted)
    document = {
        "date": datetime.date.today().isoformat(),
        **machine_facts(),
        "threads": given.threads,
        "tokens": given.tokens,
        "seed": given.seed,
        "rows": rows,
        "training": training,
    }
    results = HERE / "results" / f"linearize-{document['date']}.json"
    save(results, document, page)


if __name__ == "__main__":
    main()
