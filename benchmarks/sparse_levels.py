"""Pages ranked in two levels of bounds beside one: what is held of the softmax, and the time of a step.

    python benchmarks/texts.py texts
    python benchmarks/sparse_levels.py --texts texts

Rows of 8,192 tokens of an Austen novel and of the Jargon File run through SmolLM2-135M; every 97th token from 4,096 on
chooses in every layer, from the queries and keys of that run. Then one attention for one new token through the onnx
backend and through tvm, the sides taking turns; and what the whole model loses. Writes
``results/sparse-levels-DATE.json`` and ``.md``; ``--parts`` measures some of the four and keeps the others.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cpu import facts
from page import grid, save
from sparse_mass import SINKS, WINDOW, attended, of_softmax
from sparse_model import TEXTS, Rows, fidelity, original, rows
from sparse_op import LEVELS, SHAPES, times
from sparse_page import conditions, fidelity_page, sides_page
from torch import Tensor

from memc.dialect.sparse_attention import SPAN, SparseAttention
from memc.kernels.sparse_attention.choose import Rule, candidates, describe, narrowed
from memc.kernels.sparse_attention.levels import joined
from memc.plugins import load_kernels

LENGTH, FIRST, EVERY = 8192, 4096, 97
CONTEXTS = (8192, 32768, 131072)
BEAMS = (1, 2, 4, 8)
CHOICES: list[dict[str, Any]] = [
    {"method": "bounds", "page": 16, "budget": 256, "rerank": LENGTH // 256},
    *(
        {"method": method, "page": 16, "budget": budget, "rerank": rerank, **beam}
        for budget, rerank in ((256, 1), (256, 2), (512, 2))
        for method, beam in (("bounds", {}), *(("bounds2", {"beam": beam}) for beam in BEAMS))
    ),
]
WHOLE = Rows(
    LENGTH,
    256,
    (256, 512, 1024),
    ("method=bounds,rerank=2", *(f"method=bounds,levels=2,beam={beam},rerank=2" for beam in BEAMS[1:])),
)


def read_by(query: Tensor, key: Tensor, at: Tensor, rule: Rule) -> Tensor:
    """Mark the tokens ``[1,G,T,L]`` that queries ``[1,H,T,D]``, times the scale, at ``at [1,T]`` read."""
    pages = describe(key.unflatten(2, (-1, rule.page)), rule.method)
    if rule.by_level:
        pages = joined(pages, torch.ones(1, pages.shape[2] // SPAN, dtype=torch.bool))
    return narrowed(query, key, candidates(query, pages, at, rule), at, rule)


def bytes_read(choice: dict[str, Any], key: Tensor, context: int) -> float:
    """Return the bytes that a token reads at a context, over those of all keys and values."""
    nothing, none = key[:, :, :0], torch.zeros(1, 0, dtype=torch.int64)
    sizes = {"scale": 1.0, "sinks": SINKS, "window": WINDOW, "channels": 1}
    call = SparseAttention(key, key, key, none, nothing, nothing, none, nothing, **sizes, **choice)
    return call.cost(context).bytes / (2 * context * key.shape[1] * key.shape[3] * key.dtype.itemsize)


@torch.no_grad()
def held(texts: Path, count: int) -> Iterator[dict[str, Any]]:
    """Yield what each choice holds, over ``count`` rows of each text."""
    with tempfile.TemporaryDirectory() as folder:
        program, text = original(Path(folder))
        tokens = [row for file in TEXTS.values() for row in rows(texts / file, text, LENGTH, count)]
    at, shares, same = torch.arange(FIRST, LENGTH, EVERY)[None], [[] for _ in CHOICES], [[] for _ in CHOICES]
    for row in tokens:
        for query, key, scale in attended(program, row):
            asking = query[:, :, at[0]] * scale
            flat: dict[tuple[int, int], Tensor] = {}
            for n, choice in enumerate(CHOICES):
                read = read_by(asking, key, at, Rule(scale=scale, sinks=SINKS, window=WINDOW, **choice))
                shares[n].append(of_softmax(asking, key, read, at))
                like = flat.setdefault((choice["budget"], choice["rerank"]), read)
                same[n].append((read & like).sum(-1) / like.sum(-1))
    for n, choice in enumerate(CHOICES):
        share, alike = torch.stack(shares[n]).double(), torch.stack(same[n]).double()
        yield {
            "choice": ",".join(f"{name}={value}" for name, value in choice.items()),
            "bytes": {context: bytes_read(choice, key, context) for context in CONTEXTS},
            "mass": float(share.mean()),
            "mass_p5": float(share.flatten().quantile(0.05)),
            "alike": float(alike.mean()),
            "asked": share.numel(),
        }


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="folder that texts.py filled")
    parser.add_argument("--rows", type=int, default=1, help="rows of each text")
    parser.add_argument("--parts", default="held,kl,onnx,tvm", help="what to measure; the rest is left as it is")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    load_kernels()
    path = given.results / f"sparse-levels-{datetime.date.today()}.json"
    document = json.loads(path.read_text()) if path.exists() else {}
    for part in given.parts.split(","):
        found = {**facts(), "rows": given.rows, "lines": []}
        for line in measured(part, given):
            found["lines"].append(line)
            print(json.dumps(line), flush=True)
        document[part] = found
        save(path, document, page)


def measured(part: str, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the lines of one part."""
    match part:
        case "held":
            return held(given.texts, given.rows)
        case "kl":
            return fidelity(given.texts, given.rows, (WHOLE,))
        case _:
            return times(SHAPES[1], CONTEXTS, LEVELS, (part,))


def page(document: dict[str, Any]) -> str:
    """Write the page of the parts that were measured."""
    parts = ["# Two levels of bounds", "See [README](../README.md)."]
    if "held" in document:
        parts += held_page(document["held"])
    if "kl" in document:
        parts += fidelity_page(document["kl"])
    for backend in ("onnx", "tvm"):
        if backend in document:
            parts += sides_page(document[backend], f"Through the {backend} backend", "")
    return "\n\n".join(parts) + "\n"


def held_page(part: dict[str, Any]) -> list[str]:
    """Write the section on what choices hold."""
    lines = [
        [
            one["choice"].replace(",", ", "),
            *(f"{share:.3f}" for share in one["bytes"].values()),
            f"{one['mass']:.3f}",
            f"{one['mass_p5']:.3f}",
            f"{one['alike']:.3f}",
        ]
        for one in part["lines"]
    ]
    head = ["choice", *(f"bytes read / dense, {context} tokens" for context in CONTEXTS)]
    return [
        f"## What choices hold of the softmax, SmolLM2-135M, {LENGTH} tokens",
        conditions(part),
        f"{part['rows']} row(s) of each text, every {EVERY}th token from {FIRST} on, all layers and heads:"
        f" {part['lines'][0]['asked']} softmaxes. Sinks {SINKS}, window {WINDOW}. `bounds2` is `bounds` with"
        " `levels=2`. Bytes are those of keys, values and descriptions for one token, as they are predicted. The last"
        " column is the share of what one level reads that is read. The first choice is the oracle: every token ranked"
        " by its own key.",
        grid([*head, "mass held, mean", "5th percentile", "as one level"], lines),
    ]


if __name__ == "__main__":
    main()
