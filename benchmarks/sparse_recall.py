"""What sparse attention leaves of recall, on small decoders that were trained until they recall everything.

    python benchmarks/sparse_recall.py       # ten minutes of one core

Trains the decoder of ``examples/recall.py`` twice, on associative recall and on recall by two keys together, rewrites
it with every method at a quarter of the sequence, and asks token by token. Pages by their means, not ranked again, are
the weak choice that has to be worse: if it is not, this measures nothing. Writes ``results/sparse-recall-DATE.json``
and ``.md``.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from cpu import facts
from page import grid, save

import memc
from memc.evaluate.tasks import Task, parse_tasks

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from recall import Setting, measure, train

LENGTH, SHARE = 128, 4
SIZES = f"budget={LENGTH // SHARE},page=4,sinks=1,window=8,dense_below=0"
WEAK = "hcam,rerank=1"
CHOICES = (
    "lowbit,channels=8",
    "lowbit,channels=4",
    "bounds",
    "bounds,rerank=1",
    "bounds,levels=2",
    "moments",
    "moments,rerank=1",
    "hip",
    "em,longest=16",
    "hcam",
    WEAK,
)
ENOUGH = 0.99
"""What a decoder has to recall of its task for anything to be measured with it."""


@dataclass(frozen=True)
class Asked(Setting):
    """A setting whose task is given by its specification."""

    spec: str = ""

    @property
    def task(self) -> Task:
        """See ``Setting``."""
        return parse_tasks(self.spec)[0]


def settings(steps: int, samples: int) -> dict[str, Asked]:
    """Return the two tasks; recall by two keys takes longer to learn."""
    common: dict[str, Any] = {"length": LENGTH, "asked": samples}
    return {
        "mqar": Asked(spec="mqar:pairs=8,gap=64,vocab=64", steps=steps, **common),
        "joint_recall": Asked(spec="joint_recall:contexts=4,keys=4,queries=8,vocab=64", steps=4 * steps, **common),
    }


def rows(setting: Asked, folder: Path) -> list[dict[str, Any]]:
    """Train, and ask the original and every choice."""
    began = time.process_time()
    model = train(setting)
    example = torch.arange(7).expand(2, 7).contiguous()
    program = memc.capture(model, (example, example))
    trained = time.process_time() - began
    found = [asdict(measure("dense", setting, program, folder))]
    if found[0]["recall"] < ENOUGH:
        raise RuntimeError(f"the decoder recalls {found[0]['recall']:.3f} of {setting.spec}: give more --steps")
    for choice in CHOICES:
        spec = f"sparsify:method={choice},{SIZES}"
        found.append(asdict(measure(choice.replace(",", "-").replace("=", "-"), setting, program, folder, spec)))
    return [{**row, "choice": choice, "trained_s": trained} for row, choice in zip(found, ("", *CHOICES), strict=True)]


def page(document: dict[str, Any]) -> str:
    """Write the page."""
    tasks: dict[str, list[dict[str, Any]]] = document["tasks"]
    lines = []
    for index, row in enumerate(next(iter(tasks.values()))):
        name = f"method={row['choice']}".replace(",", ", ") if row["choice"] else "everything read"
        name += " (the weak choice)" if row["choice"] == WEAK else ""
        lines.append([name, *(f"{100 * found[index]['recall']:.2f}" for found in tasks.values())])
    said = "; ".join(f"{name}: `{document['specs'][name]}`" for name in tasks)
    parts = [
        "# Recall of small decoders with sparse attention",
        "See [README](../README.md).",
        f"{document['cpu']}, {document['cores']} cores, load {document['load_before']:.1f} before the start; memc at"
        f" {document['commit']}. Percent of what was asked, {document['samples']} sequences of {LENGTH} tokens, one"
        f" token at a time through the onnx backend. {said}. Every choice has `{SIZES}`: {LENGTH // SHARE} of up to"
        f" {LENGTH} tokens are read. Two blocks of two heads of 32; the decoders were trained for their task.",
        grid(["choice", *tasks], lines),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="steps of training, four times as many of two keys")
    parser.add_argument("--samples", type=int, default=100, help="sequences asked")
    parser.add_argument("--tasks", default="mqar,joint_recall")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = given.results / f"sparse-recall-{datetime.date.today()}.json"
    asked = {name: one for name, one in settings(given.steps, given.samples).items() if name in given.tasks.split(",")}
    document: dict[str, Any] = {**facts(), "samples": given.samples, "specs": {n: s.spec for n, s in asked.items()}}
    document["tasks"] = {}
    for name, setting in asked.items():
        with tempfile.TemporaryDirectory() as folder:
            document["tasks"][name] = rows(setting, Path(folder))
    save(path, document, page)


if __name__ == "__main__":
    main()
