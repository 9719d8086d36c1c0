"""SmolLM2-135M with fewer key channels: chosen by what, alike for all heads or not, refitted or not.

``python benchmarks/prune_keys.py --texts FOLDER``, where ``benchmarks/texts.py FOLDER`` wrote the texts. What is chosen
for each key-value head alone cannot be cut out, as one table of frequencies rotates all: there the queries' weights are
zero instead, which computes the same.
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cpu import facts as machine_facts
from page import grid, save
from prune import HERE, LENGTH, Bench
from torch import Tensor

from memc.analysis.stream import Stream
from memc.blocks import AttentionBlock
from memc.passes.prune import Prune
from memc.passes.prune.choice import Task
from memc.passes.prune.scores import head_energies
from memc.pipeline import Calibration
from memc.program import Program, get_tensor, set_tensor
from memc.target import get_target

AMOUNTS = (0.25, 0.5)
BASE = Prune(unit="key_channels", protect_heads="none", sequences=1 << 20)
ALONE = "think, each key-value head alone"
VARIANTS = {
    "think": replace(BASE, refit=False),
    ALONE: replace(BASE, refit=False),
    "think, refit": BASE,
    "magnitude": replace(BASE, refit=False, score="magnitude"),
    "taylor": replace(BASE, refit=False, score="taylor"),
}


def pruned(bench: Bench, options: Prune) -> tuple[Program, float]:
    """Return the pruned program, and the share of the block parameters that went."""
    plan = options.plan(bench.original, get_target("cpu"))
    program, report = options.apply(bench.original, replace(plan, calibration=bench.calibration))
    return program, report.details["total"]["removed_share"]


def alone(program: Program, tasks: Sequence[Task], calibration: Calibration) -> Program:
    """Return the program with the queries' weights of what each key-value head loses at zero."""
    stream, changed = Stream(program, calibration), program.copy()
    for task in tasks:
        block = task.group.block
        assert isinstance(block, AttentionBlock)
        total: Tensor | None = None
        for seen in stream.advance(max(block.query, block.key), {block.query, block.key}):
            found = head_energies(task.group, seen[block.query], seen[block.key])
            total = found if total is None else total + found
        assert total is not None
        grouped = total.unflatten(0, (block.num_kv_heads, -1)).sum(1)
        gone = torch.zeros(grouped.shape, dtype=torch.bool).scatter(1, grouped.argsort(1)[:, : task.count], True)
        rows = gone[:, task.group.keys].repeat_interleave(block.num_heads // block.num_kv_heads, 0).flatten()
        name = block.projections["query"].weight
        weight = get_tensor(program.module, name).detach()
        set_tensor(changed.module, name, torch.where(rows[:, None], 0, weight))
    return changed


def page(document: dict[str, Any]) -> str:
    """Write the page of a run."""
    dense, names = document["dense"], list(document["dense"])
    lines = [
        [
            f"{row['amount']:.0%}",
            row["variant"],
            f"{row['state_bytes'] / document['state_bytes']:.3f}",
            f"{row['removed_share']:.4f}",
            *(f"{row['perplexity'][name] / dense[name]:.3f}" for name in names),
        ]
        for row in sorted(document["rows"], key=lambda row: float(row["amount"]))
    ]
    head = [
        "key channels removed",
        "variant",
        "state bytes",
        "block parameters removed",
        *(f"{n}, ratio" for n in names),
    ]
    parts = [
        "# SmolLM2-135M with fewer key channels, without training",
        f"{document['cpu']}, one thread; memc at {document['commit']}. {document['calibration_tokens']} tokens of"
        f" calibration text ({document['calibration']}); tested on {document['test_tokens']} tokens of each text in"
        f" rows of {LENGTH}. Dense: "
        + ", ".join(f"{name} {value:.2f}" for name, value in dense.items())
        + "; ratios are to"
        " it, in the same run. The first and the last layer stay. What is chosen for each key-value head alone is at"
        " zero, not cut out.",
        grid(head, lines),
        f"{document['seconds']:.0f} s.",
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every variant and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="folder that texts.py wrote")
    parser.add_argument("--work", type=Path, default=Path("prune-work"), help="folder for the tokenizer")
    parser.add_argument("--sequences", type=int, default=16, help=f"calibration sequences of {LENGTH} tokens")
    parser.add_argument("--rows", type=int, default=8, help=f"rows of {LENGTH} tokens of each test text")
    parser.add_argument("--only", action="append", choices=list(VARIANTS), help="variant; repeatable")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start = time.perf_counter()
    bench = Bench(options.texts, options.work, options.sequences, options.rows)
    document: dict[str, Any] = {
        **machine_facts(),
        "calibration": bench.calibration.origin,
        "calibration_tokens": bench.calibration.tokens.numel(),
        "test_tokens": options.rows * LENGTH,
        "state_bytes": bench.original.state_bytes(LENGTH),
        "dense": bench.measure(bench.original),
        "rows": [],
    }
    for name in options.only or VARIANTS:
        for amount in AMOUNTS:
            chosen = replace(VARIANTS[name], amount=amount)
            with bench.console.step(f"{name} at {amount:.0%}"):
                if name == ALONE:
                    program = alone(bench.original, chosen.draft(bench.original).tasks, bench.calibration)
                    share = 0.0
                else:
                    program, share = pruned(bench, chosen)
                found = bench.measure(program)
            row = {"amount": amount, "variant": name, "perplexity": found, "removed_share": share}
            document["rows"].append({**row, "state_bytes": program.state_bytes(LENGTH)})
            document["seconds"] = time.perf_counter() - start
            save(options.results / f"prune-keys-{datetime.date.today().isoformat()}.json", document, page)


if __name__ == "__main__":
    main()
