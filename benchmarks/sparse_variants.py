"""What forms of sparse attention that no pass offers cost SmolLM2-135M, beside those that are offered.

    python benchmarks/texts.py texts
    python benchmarks/sparse_variants.py --texts texts [--parts token,heads,groups,channels]

Rows of 2,048 tokens of an Austen novel and of the Jargon File: the first 1,536 read everything, KL to the original is
that of the last 512. Writes ``results/sparse-variants-DATE.json`` and ``.md``; lines that are there already stay.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from cpu import facts
from page import save
from sparse_model import TEXTS, Rows, applied, original, rows, started
from sparse_variants_forms import (
    Attend,
    Choosing,
    Layer,
    Narrowed,
    Split,
    Streaming,
    dense,
    energy,
    fitted,
    rotated,
    weakest,
)
from sparse_variants_page import page
from torch import Tensor
from torch.fx import Interpreter, Node

from memc.analysis.heads import head_roles, repeated_tokens
from memc.dialect import arguments
from memc.kernels.sparse_attention.choose import Rule
from memc.plugins import load_kernels
from memc.program import Program
from memc.runtime.text import Text
from memc.sites import Group, attention_blocks
from memc.verify.execute import positions_of, run
from memc.verify.inputs import token_limit

LENGTH, FIRST, RECENT = 2048, 1536, 32
LEARNED = ("austen-emma.txt", "foldoc.txt")
"""Texts that numbers are fitted to, and heads ranked on."""

Line = dict[str, Any]
Measurement = tuple[Line, Callable[[], list[float]]]
"""What is measured, and what gives the divergence of each row."""


class Patched(Interpreter):
    """Runs a program with every ``memc::attention`` computed by ``attend``."""

    def __init__(self, program: Program, attend: Attend) -> None:
        """Take the place of the program's attentions."""
        super().__init__(program.module)
        self.attend = attend
        self.blocks = {block.attention.name: block for block in attention_blocks(program)}

    def run_node(self, n: Node) -> Any:
        """Run a node; of an attention what stands for it."""
        if n.target is not torch.ops.memc.attention.default:
            return super().run_node(n)
        a, block = arguments(n), self.blocks[n.name]
        query, key, value = (self.env[a[name]] for name in ("query", "key", "value"))
        key, value = (torch.cat([self.env[a[f"past_{name}"]], x], 2) for name, x in (("key", key), ("value", value)))
        frequencies = self.fetch_attr(str(arguments(block.key)["inv_freq"].target))
        layer = Layer(block.layer, query[0], key[0], value[0], a["scale"], frequencies)
        return self.attend(layer)[None], key, value, self.env[a["positions"]]


@dataclass(frozen=True)
class Row:
    """A row of a text: its tokens, the states after the first, and what the original predicts at the others.

    Of each layer the energies ``[G,D]`` of the first tokens' key channels, by their last queries and by all of them.
    """

    tokens: Tensor
    held: Mapping[str, Tensor]
    expected: Tensor
    asked: Mapping[int, Tensor]
    overall: Mapping[int, Tensor]


@dataclass
class Bench:
    """The original, and rows that forms are measured on."""

    program: Program
    text: Text
    folder: Path
    count: int

    @cached_property
    def rows(self) -> list[Row]:
        """The rows of each text."""
        return [
            self.row(one) for file in TEXTS.values() for one in rows(self.folder / file, self.text, LENGTH, self.count)
        ]

    @cached_property
    def learned(self) -> list[Row]:
        """The rows of other texts, that something is fitted to."""
        return self.read(LEARNED, 1)

    def read(self, files: Iterable[str], count: int) -> list[Row]:
        """Run the original over rows of texts."""
        return [self.row(one) for file in files for one in rows(self.folder / file, self.text, LENGTH, count)]

    @torch.no_grad()
    def row(self, tokens: Tensor) -> Row:
        """Run the original over a row."""
        held, asked, overall = self.held(tokens, FIRST)
        return Row(tokens, held, self.predicted(tokens, held, dense), asked, overall)

    @torch.no_grad()
    def held(self, tokens: Tensor, first: int) -> tuple[dict[str, Tensor], dict[int, Tensor], dict[int, Tensor]]:
        """Return the states after the first tokens, and the energies of their key channels."""
        asked, overall = dict[int, Tensor](), dict[int, Tensor]()

        def score(layer: Layer) -> Tensor:
            asked[layer.number] = energy(layer.query[:, -RECENT:], layer.key)
            overall[layer.number] = energy(layer.query, layer.key)
            return dense(layer)

        part = tokens[None, :first]
        state = Patched(self.program, score).run(part, positions_of(part, 0), *self.program.new_state(1))[1:]
        return dict(zip((spec.name for spec in self.program.states), state, strict=True)), asked, overall

    @torch.no_grad()
    def predicted(self, tokens: Tensor, held: Mapping[str, Tensor], attend: Attend, first: int = FIRST) -> Tensor:
        """Return the log-probabilities of the tokens from ``first`` on."""
        part, state = tokens[None, first:], [held[spec.name] for spec in self.program.states]
        return Patched(self.program, attend).run(part, positions_of(part, first), *state)[0][0].log_softmax(-1)

    def kl(self, attend: Attend) -> list[float]:
        """Return the divergence, in nats a token, of each row."""
        return [divergence(row, self.predicted(row.tokens, row.held, attend)) for row in self.rows]

    @cached_property
    def rankings(self) -> dict[str, dict[Group, float]]:
        """Scores of the key-value heads by each way to rank them, the highest to retrieve."""
        known = sorted(self.roles)
        texts, tokens = (self.seen(row) for row in self.learned), repeated_tokens(token_limit(self.program), None)[0]
        made = {
            "echo and induction": self.roles,
            "positional decay": decay(texts),
            "positional decay, on random tokens": decay(self.whole(row) for row in tokens),
        }
        both = [ranks(scores) for scores in made.values()][::2]
        made["echo and induction and decay on random tokens"] = {
            group: sum(one[group] for one in both) for group in known
        }
        made["mass missed"] = missed(self, 256)
        for seed in (0, 1):
            order = random.Random(seed).sample(known, len(known))
            made[f"random, seed {seed}"] = {group: -float(order.index(group)) for group in known}
        return made

    def narrowed(self, share: float, prompt: int | None) -> list[float]:
        """Return the divergence of each row with fewer channels of each key-value head's keys."""
        found = []
        for row in self.rows:
            gone = {number: weakest(rank, share) for number, rank in row.asked.items()}
            found.append(divergence(row, self.predicted(row.tokens, row.held, Narrowed(gone, RECENT, prompt))))
        return found

    def seen(self, row: Row) -> dict[int, Layer]:
        """Return what the attention of each layer is given in a run of the original."""
        found: dict[int, Layer] = {}

        def keep(layer: Layer) -> Tensor:
            found[layer.number] = layer
            return dense(layer)

        self.predicted(row.tokens, row.held, keep)
        return found

    @torch.no_grad()
    def whole(self, tokens: Tensor) -> dict[int, Layer]:
        """Return what the attention of each layer is given in a run of the original over a sequence from its start."""
        found: dict[int, Layer] = {}

        def keep(layer: Layer) -> Tensor:
            found[layer.number] = layer
            return dense(layer)

        Patched(self.program, keep).run(tokens[None], positions_of(tokens[None], 0), *self.program.new_state(1))
        return found

    @torch.no_grad()
    def kl_of(self, spec: str) -> list[float]:
        """Return the divergence of each row under a pass."""
        program, found = applied(self.program, spec), []
        at = Rows(LENGTH, LENGTH - FIRST, (), ())
        for row in self.rows:
            part = row.tokens[None, FIRST:]
            logits = run(program, (part, positions_of(part, FIRST)), started(program, row.tokens, row.held, at))[0]
            found.append(divergence(row, logits[0].log_softmax(-1)))
        return found

    @cached_property
    def roles(self) -> dict[Group, float]:
        """The retrieval score of every key-value head, by ``memc.analysis.heads``."""
        layers = head_roles(self.program).layers
        return {(one.layer, group): score for one in layers for group, score in enumerate(one.of_groups)}


def divergence(row: Row, found: Tensor) -> float:
    """Return the mean divergence of log-probabilities from what the original predicts."""
    return float((row.expected.exp() * (row.expected - found)).sum(-1).mean())


def best(scores: Mapping[Group, float], share: float) -> dict[int, list[int]]:
    """Return a share of the key-value heads, of the highest scores, by layer."""
    kept: dict[int, list[int]] = {}
    for layer, group in sorted(sorted(scores, key=lambda one: (-scores[one], one))[: round(share * len(scores))]):
        kept.setdefault(layer, []).append(group)
    return kept


TOKENS = (
    (0.5, 64, ("none", "mean", "affine", "true", "true, first order", "normal", "edge")),
    (0.5, 256, ("none", "mean", "affine")),
    (0.25, 256, ("none", "mean", "affine")),
    (0.25, 64, ("none", "mean", "affine")),
)
"""Shares of heads that retrieve, windows, and tokens that stand for what was dropped."""


def token(bench: Bench) -> Iterator[Measurement]:
    """Yield what one token for all that streaming heads dropped is worth."""
    layers = [bench.seen(row) for row in bench.learned]
    for share, window, names in TOKENS:
        kept = best(bench.roles, share)
        for name in names:
            weights = None
            if name == "affine":
                weights = {number: fitted([one[number] for one in layers], window) for number in layers[0]}
            form = Streaming(window, name.split(",")[0], "first order" in name, fitted=weights)
            yield {"kept": share, "window": window, "token": name}, partial(bench.kl, Split(kept, form))


def decay(calls: Iterable[Mapping[int, Layer]], length: int = 500) -> dict[Group, float]:
    """Score key-value heads by how far the mean query reaches into mean keys, as kvpress does on the fly.

    The mean query and key of each call before rotation, at ``length`` positions; the softmax of the last query, summed
    from the first key on, and the mean of these sums.
    """
    scores: dict[Group, float] = {}
    at = torch.arange(length)
    for call in calls:
        for number, layer in call.items():
            query = rotated(layer.query, -layer.at, layer.inv_freq).mean(1, keepdim=True)
            keys = rotated(layer.key[:, layer.at], -layer.at, layer.inv_freq).mean(1, keepdim=True)
            q, k = (rotated(x.expand(-1, length, -1), at, layer.inv_freq) for x in (query, keys))
            weight = (q[:, -1:] @ layer.over_heads(k).mT * layer.scale).softmax(-1)[:, 0]
            area = weight.cumsum(-1).mean(-1).unflatten(0, (len(layer.key), -1)).mean(1)
            for group, score in enumerate(area.tolist()):
                scores[number, group] = scores.get((number, group), 0.0) + score
    return scores


def ranks(scores: Mapping[Group, float]) -> dict[Group, int]:
    """Return how many heads each is ranked above."""
    return {group: place for place, group in enumerate(sorted(scores, key=lambda one: (scores[one], one)))}


def missed(bench: Bench, window: int) -> dict[Group, float]:
    """Score key-value heads by the share of the softmax of their query heads that sinks and window do not hold."""
    scores: dict[Group, float] = {}
    form = Streaming(window, "true")
    for row in bench.learned:
        for number, layer in bench.seen(row).items():
            at = torch.arange(layer.key.shape[1])
            gone = (at >= form.sinks) & (at <= layer.at[:, None] - window)
            weight = layer.scores().masked_fill(at > layer.at[:, None], -torch.inf).softmax(-1)
            lost = (weight * gone).sum(-1).mean(1).unflatten(0, (len(layer.key), -1)).amax(1)
            for group, score in enumerate(lost.tolist()):
                scores[number, group] = scores.get((number, group), 0.0) + score
    return scores


def heads(bench: Bench) -> Iterator[Measurement]:
    """Yield what streaming costs the heads that each ranking leaves to it."""
    for share in (0.5, 0.25):
        for name, scores in bench.rankings.items():
            yield {"kept": share, "ranking": name}, partial(bench.kl, Split(best(scores, share), Streaming(256)))


RULES: dict[str, dict[str, Any]] = {
    "lowbit": {"method": "lowbit", "page": 64, "channels": 8},
    "bounds": {"method": "bounds", "page": 16},
    "moments": {"method": "moments", "page": 16},
}


def groups(bench: Bench) -> Iterator[Measurement]:
    """Yield what choices cost by how the heads of a group are joined."""
    for budget, names in ((256, ("bounds", "lowbit", "moments")), (512, ("bounds",))):
        for name in names:
            for reduce in ("max", "sum", "share"):
                rule = Rule(scale=1.0, budget=budget, sinks=4, window=48, rerank=2, **RULES[name])
                line = {"method": name, "budget": budget, "rerank": 2, "joined": reduce}
                yield line, partial(bench.kl, Choosing(rule, reduce))


def channels(bench: Bench) -> Iterator[Measurement]:
    """Yield what keys without some channels cost, beside keys and values in few bits, all of them read."""
    forms = (("of all keys", 0.4, None), ("of all keys", 0.2, None), ("of the prompt", 0.4, FIRST))
    for form, share, prompt in forms[:1]:
        yield _line(form, share), partial(bench.narrowed, share, prompt)
    for bits in (8, 4):
        spec = f"sparsify:method=bounds,bits={bits},page=64,budget={LENGTH},dense_below={FIRST}"
        held = applied(bench.program, spec).state_bytes(LENGTH) / bench.program.state_bytes(LENGTH)
        yield {"form": f"bits={bits}", "held": held}, partial(bench.kl_of, spec)
    for form, share, prompt in forms[1:]:
        yield _line(form, share), partial(bench.narrowed, share, prompt)
    overall = [one.overall for one in bench.learned]
    gone = {number: weakest(sum(one[number] for one in overall), 0.4) for number in overall[0]}
    yield _line("settled on other texts", 0.4), partial(bench.kl, Narrowed(gone, RECENT))


def _line(form: str, share: float) -> Line:
    return {"form": form, "share": share, "held": 1 - share / 2}


PARTS: dict[str, Callable[[Bench], Iterator[Measurement]]] = {
    "token": token,
    "heads": heads,
    "groups": groups,
    "channels": channels,
}


def main() -> None:
    """Measure, and write the results after each line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="folder that texts.py filled")
    parser.add_argument("--rows", type=int, default=1, help="rows of each text")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure, of lines that are not there")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    load_kernels()
    path = given.results / f"sparse-variants-{datetime.date.today()}.json"
    with tempfile.TemporaryDirectory() as folder:
        program, text = original(Path(folder))
        bench = Bench(program, text, given.texts, given.rows)
        for part in given.parts.split(","):
            document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
            made = document.setdefault(part, {**facts(), "rows": given.rows, "lines": []})
            for line, measure in PARTS[part](bench):
                if any(line.items() <= one.items() for one in made["lines"]):
                    continue
                made["lines"].append(line | {"kl": measure()})
                print(json.dumps({"part": part, **made["lines"][-1]}), flush=True)
                save(path, document, page)


if __name__ == "__main__":
    main()
