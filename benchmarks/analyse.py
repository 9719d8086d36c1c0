"""What makes up the bigram of SmolLM2-135M, and which of its heads carry the context.

    python benchmarks/analyse.py
    python benchmarks/analyse.py --document heads.json --document bigram.json

Runs both analyses, or takes what ``memc analyse -o FILE`` wrote, and writes ``results/analyse-DATE.json`` and ``.md``:
effects of the strongest heads, and how near the subnetwork comes to the bigram beside its controls.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpu import facts as machine_facts
from cpu import model
from page import grid, save

from memc import api
from memc.cli.console import Console
from memc.report.models import AnalysisDocument

HERE = Path(__file__).parent
METHODS = ("heads", "bigram")
SHOWN = 12
"""Heads of either side that the page lists."""

FITS = {
    "the whole model": "kl_whole",
    "the subnetwork": "kl_kept",
    "as many random units of each block": "kl_random",
    "no unit": "kl_none",
}


def page(document: dict[str, Any]) -> str:
    """Write the page of a run."""
    parts = ["# Which units of SmolLM2-135M make something up", f"{document['cpu']}; memc at {document['commit']}."]
    for found in map(AnalysisDocument.model_validate, document["analyses"]):
        parts += _heads(found) if found.mediation is not None else _bigram(found)
        parts.append(f"{found.timing.seconds:.0f} s.")
    return "\n\n".join(parts) + "\n"


def _heads(found: AnalysisDocument) -> list[str]:
    """Show the heads of the most and of the least preference for the context."""
    answers = found.mediation
    assert answers is not None
    heads = [(units, head) for units in found.units for head in range(len(units.scores))]
    heads.sort(key=lambda pair: pair[0].context[pair[1]] - pair[0].memory[pair[1]], reverse=True)
    lines = [
        [
            f"{units.layer}.{head}",
            f"{units.context[head]:.3f} ± {units.context_error[head]:.3f}",
            f"{units.memory[head]:.3f} ± {units.memory_error[head]:.3f}",
            "kept" if head in units.kept else "",
        ]
        for units, head in [*heads[:SHOWN], *heads[-SHOWN:]]
    ]
    said = (
        f"{answers.prompts} prompts, {found.text}; {answers.answered_context:.0%} answered from the context,"
        f" {answers.answered_memory:.0%} from memory. Nats of log-probability that either answer loses when the path of"
        f" one head is patched, with standard errors; the {SHOWN} of {len(heads)} heads that prefer the context most,"
        f" and the {SHOWN} that prefer memory most."
    )
    return ["## Heads of the context and of memory", said, grid(["head", "context", "memory", ""], lines)]


def _bigram(found: AnalysisDocument) -> list[str]:
    """Show how near the subnetwork comes to the bigram, and where it lies."""
    facts = found.bigram
    assert facts is not None
    said = (
        f"A mask learned in {facts.steps} steps at a penalty of {facts.penalty:g} nats ({found.text}) keeps"
        f" {facts.share:.2%} of the block parameters. KL to the model's bigram on {facts.tokens} held-out tokens, nats"
        f" a token; correlation of the subnetwork's surprisals with the bigram's {facts.correlation:.3f}. KL of the"
        f" model to itself without the subnetwork {facts.kl_without:.3f}, without as many random units"
        f" {facts.kl_without_random:.3f}."
    )
    fits = [[name, f"{getattr(facts, field):.3f}"] for name, field in FITS.items()]
    kept = [
        [str(units.layer), units.kind.replace("_", "-"), f"{len(units.kept)} of {len(units.scores)}"]
        for units in found.units
        if units.kept
    ]
    return ["## The bigram subnetwork", said, grid(["", "KL"], fits), grid(["layer", "block", "kept"], kept)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the analyses, or read their documents, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", action="append", help="analysis with its options; repeatable")
    parser.add_argument("--document", action="append", type=Path, help="what memc analyse wrote; repeatable")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args(arguments)
    found = [AnalysisDocument.model_validate_json(path.read_text()) for path in options.document or ()]
    for method in options.method or (() if found else METHODS):
        found.append(api.analyse(model(), method, progress=Console()))
    document = {**machine_facts(), "analyses": [one.model_dump(mode="json") for one in found]}
    save(options.results / f"analyse-{datetime.date.today().isoformat()}.json", document, page)


if __name__ == "__main__":
    main()
