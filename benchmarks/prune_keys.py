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
VARIANTS = {
    "think, refit": BASE,
    "think": replace(BASE, refit=False),
    "magnitude": replace(BASE, refit=False, score="magnitude"),
    "taylor": replace(BASE, refit=False, score="taylor"),
}
ALONE = "think, each key-value head alone"


def pruned(bench: Bench, options: Prune) -> tuple[Program, dict[str, Any]]:
    """Return the pruned program and what its report says in all."""
    plan = options.plan(bench.original, get_target("cpu"))
    program, report = options.apply(bench.original, replace(plan, calibration=bench.calibration))
    return program, report.details["total"]


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
        for row in document["rows"]
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
    for amount in AMOUNTS:
        for name in (ALONE, *VARIANTS):
            with bench.console.step(f"{name} at {amount:.0%}"):
                if name == ALONE:
                    tasks = replace(BASE, amount=amount).draft(bench.original).tasks
                    program = alone(bench.original, tasks, bench.calibration)
                else:
                    program, total = pruned(bench, replace(VARIANTS[name], amount=amount))
                row = {"amount": amount, "variant": name, "perplexity": bench.measure(program)}
            row |= {"state_bytes": program.state_bytes(LENGTH)}
            row |= {"removed_share": 0.0 if name == ALONE else total["removed_share"]}
            document["rows"].append(row)
            document["seconds"] = time.perf_counter() - start
            save(options.results / f"prune-keys-{datetime.date.today().isoformat()}.json", document, page)


if __name__ == "__main__":
    main()
