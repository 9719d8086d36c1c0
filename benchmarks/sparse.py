"""What ``sparsify`` costs in fidelity on SmolLM2-135M, and what its attention saves in time on a CPU.

    python benchmarks/texts.py texts
    python benchmarks/sparse.py --texts texts

Fidelity: rows of 2,048 and of 8,192 tokens of an Austen novel and of the Jargon File; the first ones read everything,
the last 1,024, or 256, choose. Recall: the tasks of ``memc eval``. Memory: the bytes of the states that an artifact
allocates. Time: one attention for one new token, sparse and dense; where a choice serves several, and by a tree search.
Writes ``results/sparse-DATE.json`` and ``.md``; ``--parts`` measures some of the five and keeps the others.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cpu import facts as machine_facts
from cpu import numbers
from page import write
from sparse_model import fidelity, memory, recall
from sparse_op import COMPILED, SEARCHED, SHAPES, times
from sparse_page import page

from memc.plugins import load_kernels

HERE = Path(__file__).parent
PARTS = ("times", "fidelity", "recall", "memory", "shared", "compiled")
CONTEXTS = [1024, 2048, 4096, 8192, 16384, 32768, 131072]


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="folder that texts.py filled")
    parser.add_argument("--rows", type=int, default=2, help="rows of each text")
    parser.add_argument("--samples", type=int, default=2, help="samples of each task and depth")
    parser.add_argument("--contexts", type=numbers, default=CONTEXTS, help="contexts of the timings")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure; the rest is left as it is")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load_kernels()
    path = arguments.results / f"sparse-{datetime.date.today()}.json"
    for part in arguments.parts.split(","):
        facts = {**machine_facts(), "rows": arguments.rows, "samples": arguments.samples}
        found: list[dict[str, Any]] = []
        for line in measured(part, arguments):
            found.append(line)
            print(json.dumps(line), flush=True)
            document = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps({**document, part: {**facts, "lines": found}}, indent=1) + "\n")
    write(path, json.loads(path.read_text()), page)


def measured(part: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the lines of one part."""
    match part:
        case "times":
            for shape in SHAPES:
                yield from times(shape, arguments.contexts)
        case "shared":
            for shape in SHAPES:
                yield from times(shape, arguments.contexts, SEARCHED)
        case "compiled":
            for shape in SHAPES:
                yield from times(shape, arguments.contexts, COMPILED, ("onnx", "tvm"))
        case "fidelity":
            yield from fidelity(arguments.texts, arguments.rows)
        case "memory":
            yield from memory()
        case _:
            yield from recall(arguments.samples)


if __name__ == "__main__":
    main()
