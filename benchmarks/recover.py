"""How much of what pruning cost SmolLM2-135M a short training wins back on a CPU, and whether another domain is hurt.

    python benchmarks/texts.py texts
    python benchmarks/recover.py --texts texts --tokens 150000

Prunes as ``prune.py`` does (its calibration text, its test text), trains adapters (``--rank 0``: every parameter)
towards the original's own distribution as ``memc convert --data`` does, on the novels and the Jargon File or on the
novels alone, folds them in and writes ``results/recover-DATE.json`` and ``.md``. Interrupted it goes on: every part is
kept in ``--work``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import resource
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpu import facts as machine_facts
from page import grid, save
from prune import LENGTH, NOVELS, Bench, recalled

from memc.conversion.training import make_trainer, training_data
from memc.data import read_tokens
from memc.passes.prune import Prune
from memc.pipeline import PassReport, Plan
from memc.program import Program
from memc.program_io import load_program, save_program
from memc.recipe import Recipe, Train
from memc.runtime.text import Text
from memc.target import get_target
from memc.train import Trainer
from memc.train.guard import Guard
from memc.verify.relations import kl_mean

HERE = Path(__file__).parent
SIDES = {"novels and the Jargon File": True, "novels alone": False}
"""What is trained on, a quarter of it sampled from the original in both; whether the Jargon File is there."""


class Recovery:
    """The original, the pruned program and its training, all on the texts of one :class:`Bench`."""

    def __init__(self, bench: Bench, work: Path, texts: Path, pass_: Prune, samples: int) -> None:
        """Prune, or read what an earlier run pruned; recall is measured on ``samples`` of each task and depth."""
        self.bench, self.work, self.texts, self.pass_, self.samples = bench, work, texts, pass_, samples
        (work / "report").mkdir(parents=True, exist_ok=True)
        folder = work / f"pruned-{pass_.amount:g}-{pass_.allocate}"
        plan = self.pass_.plan(bench.original, get_target("cpu"))
        if not folder.is_dir():
            with bench.console.step(f"prune {pass_.amount:.0%}"):
                program, _ = self.pass_.apply(bench.original, replace(plan, calibration=bench.calibration))
            keep(program, folder)
        self.pruned = load_program(folder)
        report = PassReport(plan.spec, plan.sites, plan.rejections, plan.relations, recovers=True)
        self.applied: tuple[Plan, Program, PassReport] = plan, self.pruned, report

    def recipe(self, jargon: bool, tokens: int, settings: Train) -> Recipe:
        """Return a recipe on the part of the texts that ``prune.py`` calibrates on."""
        data = [str(self.texts / f"austen-{name}.txt") for name in NOVELS]
        if jargon:
            path = self.work / "jargon.npy"
            if not path.is_file():
                ids = np.asarray(read_tokens(self.texts / "jargon.txt", Text(self.work).tokenizer).ids)
                np.save(path, ids[: len(ids) * 8 // 10].astype(np.int64))
            data.append(str(path))
        return Recipe(recipe=1, data=data, tokens=tokens, train=settings)

    def trainer(self, jargon: bool, tokens: int, settings: Train) -> Trainer:
        """Return what trains, on the texts without what is held out of each."""
        recipe = self.recipe(jargon, tokens, settings)
        data = training_data(recipe, self.bench.original, self.work, self.bench.console, transfers=False)
        return make_trainer(recipe, data, self.bench.original, self.bench.console)

    def train(self, name: str, trainer: Trainer) -> tuple[Program, dict[str, Any]]:
        """Train, or read what an earlier run came to."""
        folder = self.work / name
        if not (folder / "facts.json").is_file():
            began = time.process_time()
            done = trainer.train(self.pass_, self.bench.original, self.applied, lambda _: self.applied, folder)
            assert done.facts is not None and done.facts.recovery is not None
            keep(done.program, folder / "program")
            facts = {**done.facts.recovery.model_dump(mode="json"), "cpu_seconds": time.process_time() - began}
            facts["guard_texts"] = [text | {"name": Path(text["name"]).stem} for text in facts["guard_texts"]]
            (folder / "facts.json").write_text(json.dumps(facts) + "\n")
        return load_program(folder / "program"), json.loads((folder / "facts.json").read_text())

    def measure(self, program: Program) -> dict[str, dict[str, float]]:
        """Return perplexity on each test text, the KL to the original on it, and the share of what is recalled."""
        original, tests = self.bench.original, self.bench.tests
        kl = {name: kl_mean(original, program, rows) for name, rows in tests.items()} if program is not original else {}
        recall = self.bench.recall(program, self.samples)
        return {"perplexity": self.bench.measure(program), "kl": kl, "recall": recall}


def keep(program: Program, folder: Path) -> None:
    """Save a program so that the folder is whole or not there."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_program(program, partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def closed(row: dict[str, Any], pruned: dict[str, Any], dense: dict[str, float], name: str) -> float:
    """Return the share of the gap in log perplexity between pruned and dense that is closed."""
    gap = math.log(pruned["perplexity"][name] / dense[name])
    return 1 - math.log(row["perplexity"][name] / dense[name]) / gap


def page(document: dict[str, Any]) -> str:
    """Write the page of a run."""
    dense, names = document["dense"], list(document["dense"])
    pruned = document["rows"][0]
    lines = [
        [
            row["side"],
            *(f"{row['perplexity'][name] / dense[name]:.3f}" for name in names),
            *(f"{closed(row, pruned, dense, name):.0%}" for name in names),
            *(f"{row['kl'][name]:.4f}" for name in names),
            *(f"{value:.3f}" for value in row["recall"].values()),
        ]
        for row in document["rows"]
    ]
    head = ["trained on", *(f"{n}, ratio" for n in names), *(f"{n}, gap closed" for n in names)]
    trained = [
        [
            row["side"],
            str(f["tokens"]),
            str(f["steps"]),
            str(f["best_step"]),
            f"{f['seconds'] / 60:.0f} min",
            f"{f['cpu_seconds'] / 60:.0f} min",
            texts(f),
        ]
        for row in document["rows"]
        if (f := row.get("training"))
    ]
    settings, test, rank = document["settings"], document["test_tokens"], document["settings"]["adapters"]
    what = f"Adapters of rank {rank} on every projection of a block" if rank else "Every parameter"
    threads = "one thread" if document["threads"] == 1 else f"{document['threads']} threads"
    parts = [
        f"# SmolLM2-135M pruned by {document['amount']:.0%} and recovered by training",
        f"{document['cpu']}, {threads}; memc at {document['commit']}. Pruned on"
        f" {document['calibration_tokens']} tokens of calibration text, share: {document['allocate']}."
        f" {what}, KL to the original, peak rate"
        f" {settings['adapter_rate']:g}, {document['tokens']} tokens asked for in sequences of {settings['length']},"
        f" {settings['accumulate']} a step,"
        f" {settings['sampled']:.0%} of them sampled from the original. Tested on {test} tokens of each text, of which"
        " nothing was trained or calibrated on. Dense:"
        f" {', '.join(f'{name} {value:.2f}' for name, value in dense.items())}. A gap is that in log perplexity.",
        grid([*head, *(f"{n}, KL" for n in names), *document["recall"]], lines),
        *recalled(document),
        "Of an original that is not pruned the same training would learn nothing: its KL to itself is 0, and so is"
        " every gradient. What is closed here is no adaptation to the text.",
        "The guard's texts, held out of each text that is trained on; KL to the original, nats a token, at the start"
        " and with the parameters that stayed:",
        grid(["trained on", "tokens", "steps", "best", "time", "processor time", "guard"], trained),
    ]
    if document["trials"]:
        parts.append("Rates that were tried, on the last two of the guard's texts:")
        parts.append(grid(["peak rate", "tokens", "KL at the start", "KL at the end"], trials(document)))
    return "\n\n".join(parts) + "\n"


def texts(facts: dict[str, Any]) -> str:
    """Say what became of each of the guard's texts."""
    found = []
    for text in facts["guard_texts"]:
        looks = dict(map(tuple, text["kl"]))
        found.append(f"{text['name']} {looks[0]:.3f} to {looks[facts['best_step']]:.3f}")
    return ", ".join(found)


def trials(document: dict[str, Any]) -> list[list[str]]:
    """Return what each of the rates came to after the tokens of a trial."""
    return [
        [f"{one['rate']:g}", str(one["tokens"]), f"{one['first']:.4f}", f"{one['last']:.4f}"]
        for one in document["trials"]
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prune, train every side and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="folder that texts.py wrote")
    parser.add_argument("--work", type=Path, default=Path("recover-work"), help="folder for what is kept")
    parser.add_argument("--amount", type=float, default=0.25, help="the share of block parameters that goes")
    parser.add_argument("--allocate", choices=("uniform", "search"), default="uniform", help="the pass's option")
    parser.add_argument("--samples", type=int, default=0, help="samples of each task of recall and depth")
    parser.add_argument("--tokens", type=int, default=150_000, help="tokens that each side is trained on")
    parser.add_argument("--rate", type=float, default=Train().adapter_rate, help="peak learning rate")
    parser.add_argument("--rank", type=int, default=Train().adapters, help="rank of the adapters, or 0")
    parser.add_argument("--length", type=int, default=Train().length, help="tokens of a training sequence")
    parser.add_argument("--accumulate", type=int, default=Train().accumulate, help="sequences of a step")
    parser.add_argument("--try-rates", type=float, nargs="*", default=[], help="rates to try on --trial tokens first")
    parser.add_argument("--trial", type=int, default=16_384, help="tokens of a trial")
    parser.add_argument("--sequences", type=int, default=128, help=f"calibration sequences of {LENGTH} tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=16, help=f"rows of {LENGTH} tokens of each test text")
    parser.add_argument("--sides", nargs="*", choices=list(SIDES), default=list(SIDES), help="what is trained on")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    bench = Bench(options.texts, options.work, options.sequences, options.rows)
    pass_ = Prune(amount=options.amount, allocate=options.allocate)
    recovery = Recovery(bench, options.work, options.texts, pass_, options.samples)
    settings = Train(
        adapters=options.rank, adapter_rate=options.rate, length=options.length, accumulate=options.accumulate
    )
    document: dict[str, Any] = {
        **machine_facts(),
        "threads": options.threads,
        "amount": options.amount,
        "allocate": options.allocate,
        "samples": options.samples,
        "tokens": options.tokens,
        "settings": settings.model_dump(),
        "calibration_tokens": options.sequences * LENGTH,
        "test_tokens": options.rows * LENGTH,
        "rows": [],
        "trials": [],
    }
    known = options.work / "measured.json"
    measured: dict[str, Any] = json.loads(known.read_text()) if known.is_file() else {}

    def measure(name: str, program: Program) -> dict[str, Any]:
        key = f"{name}, {options.samples} samples"
        if key not in measured:
            with bench.console.step(f"measure {name}"):
                measured[key] = recovery.measure(program)
            known.write_text(json.dumps(measured) + "\n")
        return dict(measured[key])

    whole = measure("dense", bench.original)
    document["dense"], document["recall"] = whole["perplexity"], whole["recall"]
    document["rows"].append({"side": "nothing", **measure(f"pruned-{options.allocate}", recovery.pruned)})
    trained = f"{options.allocate}-{options.rank}-{options.length}x{options.accumulate}"
    for rate in options.try_rates:
        name = f"trial-{trained}-{rate:g}-{options.trial}"
        tried = settings.model_copy(update={"adapter_rate": rate})
        trainer = recovery.trainer(True, options.tokens, tried)
        # Two of the texts say enough, and looks at all of them would cost more than so short a training.
        trainer = replace(trainer, tokens=options.trial, guard=Guard(trainer.guard.texts[-2:]))
        _, facts = recovery.train(name, trainer)
        looks = [value for _, value in facts["guard_kl"]]
        document["trials"].append({"rate": rate, "tokens": facts["tokens"], "first": looks[0], "last": looks[-1]})
    for side in options.sides:
        trainer = recovery.trainer(SIDES[side], options.tokens, settings)
        name = f"{side.replace(' ', '-')}-{options.tokens}-{trained}-{options.rate:g}"
        program, facts = recovery.train(name, trainer)
        document["rows"].append({"side": side, **measure(name, program), "training": facts})
        document["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        results = options.results / f"recover-{datetime.date.today().isoformat()}.json"
        save(results, document, page)


if __name__ == "__main__":
    main()
