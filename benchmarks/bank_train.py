"""What blocks of a memory bank are worth on passages that were held out: SmolLM2-135M, a novel and the Jargon File.

    python benchmarks/texts.py out/texts
    python benchmarks/bank_train.py out/texts --encoder MODEL            # an hour of one core
    python benchmarks/bank_train.py out/texts --encoder MODEL --only 0,2 # some of the clusters

``--encoder`` is all-MiniLM-L6-v2 as a hub id, a folder or an artifact. What is in ``--work`` is gone on with. Writes
``results/bank-train-DATE.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from typing import Any

import numpy as np
from cpu import facts, model
from page import grid, save

from memc.bank import Bank
from memc.bank.build import BankModel, BuildOptions, build_bank
from memc.bank.learner import Learner
from memc.bank.measure import measure_bank
from memc.bank.train import TrainOptions, parse_job, train_bank
from memc.cli.console import Console
from memc.report.models.banks import BankTrainDocument

HERE = Path(__file__).parent
TEXTS = ("austen-northanger-abbey.txt", "jargon.txt")
CHARACTERS = 200_000
RANKS, BRANCH = (12, 4), 4
OPTIONS = TrainOptions(held_out=0.1)
GOALS = {"austen": 0.80, "jargon": 0.64}
WRONG, APART = 1.10, 0.15


def bank_of(texts: Path, work: Path, encoder: str, console: Console) -> Bank:
    """Build the bank from the first part of each text, unless it is there."""
    folder = work / "bank"
    if not (folder / "bank.json").is_file():
        work.mkdir(parents=True, exist_ok=True)
        for name in TEXTS:
            (work / name).write_text((texts / name).read_text()[:CHARACTERS])
        options = BuildOptions(ranks=RANKS, branch=BRANCH, encoder=encoder)
        build_bank(BankModel.of(str(model())), [str(work / name) for name in TEXTS], folder, options, progress=console)
    return Bank.open(folder)


def rows(bank: Bank, document: BankTrainDocument) -> list[dict[str, Any]]:
    """Return what was measured of each cluster, and of which text most of its passages are."""
    found = []
    for row in document.held_out:
        members = bank.passages.members(0, int(row.cluster))
        counts = np.bincount(bank.passages.sources[members], minlength=len(bank.manifest.sources))
        text, share = bank.manifest.sources[int(counts.argmax())], float(counts.max() / counts.sum())
        found.append({**row.model_dump(), "text": text, "share": share, "passages": len(members)})
    return found


def page(document: dict[str, Any]) -> str:
    """Write the page."""
    lines, goals = [], []
    for row in document["rows"]:
        ratios = {side: row[side] and row[side] / row["original"] for side in ("block", "generic", "wrong")}
        said = {side: f"{value:.3f}" if value else "-" for side, value in ratios.items()}
        where = f"{row['cluster']}: {row['text']}, {100 * row['share']:.0f} %"
        lines.append([where, str(row["tokens"]), f"{row['original']:.1f}", *said.values()])
        goal = next(value for name, value in GOALS.items() if row["text"].startswith(name))
        checks = [
            ("its own block", ratios["block"], goal),
            ("a wrong block", ratios["wrong"], WRONG),
            ("its own over a wrong one", ratios["wrong"] and ratios["block"] / ratios["wrong"], 1 - APART),
        ]
        goals += [
            [f"{row['cluster']}: {what}", f"at most {limit:.2f}", f"{value:.3f}", "yes" if value <= limit else "no"]
            for what, value, limit in checks
            if value
        ]
    jobs = [[job["job"], str(job["steps"]), str(job["tokens"]), f"{job['seconds']:.0f}"] for job in document["jobs"]]
    parts = [
        "# What blocks of a bank are worth",
        f"{document['cpu']}; memc at {document['commit']}. SmolLM2-135M, frozen; a tree of {len(RANKS)} levels of"
        f" {BRANCH} over the first {CHARACTERS:,} characters of each text; {sum(RANKS)} units a layer ({RANKS});"
        f" sequences of {OPTIONS.length} tokens, {OPTIONS.epochs} epoch, rate {OPTIONS.rate}, one seed. Held out are"
        " the last tenth of each text's passages, which find their cluster by their own text. A wrong block is that of"
        " the next cluster of the first level that is trained.",
        "## Perplexity over the original's, by block",
        grid(["cluster and its text", "tokens", "original", "its own", "generic", "a wrong one"], lines),
        "## Training",
        grid(["job", "steps", "tokens", "seconds"], jobs),
        "## Numbers to reach",
        grid(["number", "goal", "found", "reached"], goals),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Build, train, measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--work", type=Path, default=Path("out/bank-train"))
    parser.add_argument("--only", help="jobs: clusters of the first level, or generic")
    name = f"bank-train-{datetime.date.today()}.json"
    parser.add_argument("--results", type=Path, default=HERE / "results" / name)
    arguments = parser.parse_args()
    console = Console()
    document: dict[str, Any] = {"schema": "memc.benchmark.bank-train/1", **facts()}
    bank = bank_of(arguments.texts, arguments.work, arguments.encoder, console)
    jobs = [parse_job(text, bank) for text in arguments.only.split(",")] if arguments.only else None
    learner = Learner.load(str(model()), bank.manifest)
    done = train_bank(bank, learner, OPTIONS, console, only=jobs)
    measured = measure_bank(bank, learner, OPTIONS, done, console)
    document |= {"jobs": [job.model_dump() for job in done], "rows": rows(bank, measured)}
    save(arguments.results, document, page)
    print(arguments.results.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
