"""Does fetching pay? Blocks of 16 clusters beside one block, and LoRA, of the same size, for everything.

    python benchmarks/texts.py out/texts --more
    python benchmarks/bank_pays.py out/texts --encoder MODEL --seeds 0,1,2

SmolLM2-135M, frozen; eight texts of different kinds. Every side learns each passage twice and has as many parameters at
run time: one ``generic`` block; the ``bank``, a generic block first, which every cluster's own then goes on from; the
same from ``random`` values; and ``lora``, adapters on q, k, v and o. ``--encoder`` is all-MiniLM-L6-v2 as a hub id, a
folder or an artifact. What is in ``--work`` is gone on with. Writes ``results/bank-pays-DATE.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import shutil
import statistics
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpu import facts, model, numbers
from page import grid, save
from torch import Tensor

from memc.bank import Bank
from memc.bank.build import BankModel, BuildOptions, build_bank
from memc.bank.layout import Cluster
from memc.bank.learner import Learner, next_tokens
from memc.bank.sequences import PackedSequence, held_out, pack
from memc.bank.train import TrainOptions, train_bank
from memc.cli.console import Console
from memc.frontend import capture_source
from memc.program import Program
from memc.raising import raise_program
from memc.train.adapters import add_adapters, attention_projections
from memc.train.device import accelerator, products_on
from memc.train.loop import Schedule, optimiser, step_optimiser
from memc.weights import materialize

HERE = Path(__file__).parent
TEXTS = ("austen-emma", "austen-pride-and-prejudice", "bible", "devil", "foldoc", "jargon", "vera")
FIRST, BRANCH, HELD_OUT = 20_000, 16, 1 / 3
"""Where the part of a text begins, clusters, and the share of each text's passages that nothing learns."""

ARMS = ("generic", "bank", "random", "lora")
LORA_SCALE, MEASURED = 2.0, 4
"""What an adapter is multiplied by, and the most held-out sequences of a cluster."""


def sources(folder: Path, work: Path, characters: int) -> list[str]:
    """Write the part of each text, and of the modules of Python's library, one after the other, that is learned."""
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = {name: (folder / f"{name}.txt").read_text() for name in TEXTS}
    texts["python"] = "".join(path.read_text(errors="replace") for path in library)
    work.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (work / f"{name}.txt").write_text(text[FIRST : FIRST + characters])
    return [str(work / f"{name}.txt") for name in texts]


class Experiment:
    """What all sides share: the bank's tree, the model, and the passages that are held out."""

    def __init__(self, arguments: argparse.Namespace, units: int) -> None:
        """Build the bank, unless it is there, and load the model."""
        self.work, self.options, self.units = arguments.work / str(units), arguments, units
        data = sources(arguments.texts, arguments.work / "texts", arguments.characters)
        if not (self.work / "bank/bank.json").is_file():
            self.work.mkdir(parents=True, exist_ok=True)
            options = BuildOptions(ranks=(units,), branch=BRANCH, encoder=arguments.encoder)
            build_bank(BankModel.of(str(model())), data, self.work / "bank", options, progress=Console())
        self.bank = Bank.open(self.work / "bank")
        self.learner = Learner.load(str(model()), self.bank.manifest)
        self.device = accelerator()
        self.products = products_on(self.device)

    def sequences(self, chosen: np.ndarray, seed: int) -> list[PackedSequence]:
        """Return passages packed into sequences, in the order of their clusters."""
        return list(pack(self.bank.passages, self.bank.shape, chosen, self.learner.text.encode, 256, seed))

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        """Train and measure one side."""
        began, cpu = time.perf_counter(), time.process_time()
        if arm == "lora":
            found = self.lora(seed)
        else:
            bank = self.trained(arm, seed)
            found = self.measured(self.learner, lambda s: block(bank, s.cluster))
            bank.close()
        return {
            "arm": arm,
            "seed": seed,
            "units": self.units,
            "parameters": self.lora_size()[1] if arm == "lora" else self.bank.shape.units * self.per_unit(),
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - cpu,
            **found,
        }

    def original(self) -> dict[str, Any]:
        """Measure the model as it is."""
        done = self.options.work / "original.json"
        if not done.is_file():
            done.write_text(json.dumps(self.measured(self.learner, lambda _: None)))
        found: dict[str, Any] = json.loads(done.read_text())
        return found

    def per_unit(self) -> int:
        """Return the parameters of one unit of every layer."""
        return 3 * self.bank.shape.width * len(self.bank.shape.layers)

    def trained(self, arm: str, seed: int) -> Bank:
        """Return a copy of the bank in which a side's blocks have learned each passage twice."""
        folder = self.work / f"{arm}-{seed}"
        if not folder.is_dir():
            shutil.copytree(self.work / "bank", folder)
        bank = Bank.open(folder)
        twice = TrainOptions(epochs=2, held_out=HELD_OUT, seed=seed, rate=self.options.rate)
        once, learned = replace(twice, epochs=1), ~held_out(bank.passages, HELD_OUT)
        own = [(int(cluster),) for cluster in np.unique(bank.passages.clusters[learned, 0])]
        steps: dict[str, list[tuple[TrainOptions, Sequence[Cluster]]]] = {
            "generic": [(twice, [()])],
            "random": [(twice, own)],
            "bank": [(once, [()]), (replace(once, start="generic", rate=self.options.own_rate), own)],
        }
        for options, jobs in steps[arm]:
            train_bank(bank, self.learner, options, Console(), only=jobs, device=self.device, products=self.products)
        return bank

    def lora_size(self) -> tuple[int, int]:
        """Return the rank of adapters that have about as many parameters as a block, and how many they have."""
        ends = self.adapted(1, 0)
        each = sum(p.numel() for name, p in ends.module.named_parameters() if name.startswith("memc.adapters"))
        rank = max(1, round(self.units * self.per_unit() / each))
        return rank, rank * each

    def adapted(self, rank: int, seed: int) -> Program:
        """Return the model with adapters of a rank, everything else frozen."""
        captured = capture_source(str(model()))
        assert captured.weights is not None
        program = raise_program(materialize(captured.program, captured.weights)).program
        program.module.requires_grad_(False)
        return add_adapters(program, attention_projections(program), rank, LORA_SCALE, seed)[0]

    def lora(self, seed: int) -> dict[str, Any]:
        """Train adapters on what a generic block learns, in the same order, and measure."""
        rank, _ = self.lora_size()
        program = self.adapted(rank, seed)
        learner = replace(self.learner, program=program)
        sequences = self.sequences(~held_out(self.bank.passages, HELD_OUT), seed)
        trained = [p for name, p in program.module.named_parameters() if name.startswith("memc.adapters")]
        adam = optimiser([{"params": trained, "peak": self.options.lora_rate}])
        order = np.concatenate([np.random.default_rng([seed, 0, e]).permutation(len(sequences)) for e in range(2)])
        schedule = Schedule(len(order))
        with learner.learning(self.device, self.products) as narrow:
            for step, index in enumerate(order):
                sequence = sequences[int(index)]
                loss = narrow.loss(sequence, None) / next_tokens(sequence)
                loss.backward()
                step_optimiser(adam, schedule.share(step), "lora", step)
        return {"rank": rank, **self.measured(learner, lambda _: None)}

    @torch.no_grad()
    def measured(self, learner: Learner, own: Callable[[PackedSequence], Tensor | None]) -> dict[str, Any]:
        """Return the summed loss of held-out passages with their ``own`` block, and their tokens, by cluster.

        Products are as narrow as in training, for every side.
        """
        by_cluster: dict[int, list[PackedSequence]] = {}
        for sequence in self.sequences(held_out(self.bank.passages, HELD_OUT), 0):
            by_cluster.setdefault(sequence.cluster[0], []).append(sequence)
        chosen = {cluster: found[:MEASURED] for cluster, found in by_cluster.items()}
        with learner.learning(self.device, self.products) as narrow:
            losses = {cluster: sum(float(narrow.loss(s, own(s))) for s in found) for cluster, found in chosen.items()}
        return {
            "losses": {str(cluster): loss for cluster, loss in losses.items()},
            "tokens": {str(cluster): sum(map(next_tokens, found)) for cluster, found in chosen.items()},
        }


def block(bank: Bank, cluster: Cluster) -> Tensor:
    """Return the block of a cluster, the generic one where it has none."""
    return torch.from_numpy(bank.records.read(cluster if bank.records.trained(cluster) else ()).copy())


def perplexity(row: dict[str, Any]) -> float:
    """Return the perplexity over all clusters."""
    return math.exp(sum(row["losses"].values()) / sum(row["tokens"].values()))


def page(document: dict[str, Any]) -> str:
    """Write the page."""
    rows = document["rows"]
    original = perplexity(document["original"])
    lines, goals = [], []
    for units in sorted({row["units"] for row in rows}):
        found: dict[str, list[float]] = {}
        for arm in ARMS:
            mine = [row for row in rows if row["arm"] == arm and row["units"] == units]
            if not mine:
                continue
            found[arm] = [perplexity(row) / original for row in mine]
            cpu = statistics.median(row["cpu_seconds"] for row in mine)
            spread = ", ".join(f"{value:.4f}" for value in found[arm])
            size = f"{mine[0]['parameters']:,}"
            lines.append([str(units), arm, size, f"{statistics.mean(found[arm]):.4f}", spread, f"{cpu:.0f}"])
        for arm in ("generic", "lora"):
            if arm in found and "bank" in found:
                ratio = statistics.mean(found["bank"]) / statistics.mean(found[arm])
                goals.append(
                    [f"{units} units: bank over {arm}", "0.97", f"{ratio:.4f}", "yes" if ratio <= 0.97 else "no"]
                )
    parts = [
        "# Does fetching pay?",
        f"{document['cpu']}; memc at {document['commit']}. SmolLM2-135M, frozen; {BRANCH} clusters over"
        f" {document['characters']:,} characters of each of {len(TEXTS) + 1} texts ({', '.join((*TEXTS, 'python'))}), a"
        f" third of each held out; every side learns each passage twice, {document['trained_tokens']:,} tokens in all,"
        f" in sequences of 256. Rates: blocks {document['rate']}, in the clusters after a generic one"
        f" {document['own_rate']}, adapters {document['lora_rate']}. Perplexity of held-out passages over the"
        f" original's, {original:.2f}, with products in the type of training.",
        grid(["units a layer", "side", "parameters", "mean", "of each seed", "CPU s"], lines),
        "## Numbers to reach",
        grid(["number", "at most", "found", "reached"], goals),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Train, measure and write the results after every side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--work", type=Path, default=Path("out/bank-pays"))
    parser.add_argument("--units", type=numbers, default=[4], help="hidden units a layer; several may be given")
    parser.add_argument("--seeds", type=numbers, default=[0])
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--characters", type=int, default=30_000, help="of each text")
    parser.add_argument("--rate", type=float, default=0.003, help="of a generic block")
    parser.add_argument("--own-rate", type=float, default=0.003, help="of a cluster's block after a generic one")
    parser.add_argument("--lora-rate", type=float, default=0.003)
    name = f"bank-pays-{datetime.date.today()}.json"
    parser.add_argument("--results", type=Path, default=HERE / "results" / name)
    arguments = parser.parse_args()
    document: dict[str, Any] = {"schema": "memc.benchmark.bank-pays/1", **facts()}
    document |= {name: getattr(arguments, name) for name in ("characters", "rate", "own_rate", "lora_rate")}
    document["rows"] = []
    for units in arguments.units:
        experiment = Experiment(arguments, units)
        if "original" not in document:
            document["original"] = experiment.original()
            learned = experiment.sequences(~held_out(experiment.bank.passages, HELD_OUT), 0)
            document["trained_tokens"] = 2 * sum(map(next_tokens, learned))
        for seed in arguments.seeds:
            for arm in arguments.arms.split(","):
                done = experiment.work / f"{arm}-{seed}.json"
                if not done.is_file():
                    done.write_text(json.dumps(experiment.run(arm, seed)))
                document["rows"].append(json.loads(done.read_text()))
                save(arguments.results, document, page)
                row = document["rows"][-1]
                print(units, seed, arm, round(perplexity(row) / perplexity(document["original"]), 4), flush=True)


if __name__ == "__main__":
    main()
