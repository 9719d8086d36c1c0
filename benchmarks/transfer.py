"""How near blocks come to the softmax that they replace: memc's transfer beside the recipe of LoLCATs, SmolLM2-135M.

    python benchmarks/texts.py texts
    python benchmarks/transfer.py --texts texts --tokens 65536

Both sides have a window of the same tokens, see the same batches for as many steps with the same schedule, and are
measured on the same held-out text: the squared error of every layer's attention over the square of what it should give,
past what the window makes exact. The other side is written here from the paper (Zhang et al. 2024, arXiv 2410.10254,
equation 7 and section 3.1; their feature maps start as the identity, the weight of the window at 0.1, and learn by the
squared error at a rate of 1e-2). Its maps are those of query heads, so that it holds a memory for each of them: once as
published, and once with as few features as make the state of memc, which has one memory to a key-value head.

Writes ``results/transfer-DATE.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpu import facts as machine_facts
from linearize import HELD_OUT, Bench
from page import grid, save
from torch import Tensor, nn

from memc.dialect import arguments
from memc.objective import Values, relative_error
from memc.pipeline import parse_spec
from memc.program import Program
from memc.train.blocks import Teacher
from memc.train.loop import Checkpoints, Schedule, optimiser, step_optimiser
from memc.train.transfer import Transfer

HERE = Path(__file__).parent
WINDOW, SINKS, FEATURES, LENGTH, RATE = 64, 4, 128, 512, 1e-2
INITIAL = 8
"""Sequences that memc sets first values from."""


class Lolcats(nn.Module):
    """The layer of LoLCATs on queries and keys that are rotated: window and memory under one denominator.

    ``features`` to either side of a softmax of a linear map of its own for each query head, so that a memory holds
    twice as many.
    """

    def __init__(self, heads: int, size: int, features: int, window: int, scale: float) -> None:
        """Start as published; ``size`` channels to a head."""
        super().__init__()
        self.window, self.scale = window, scale
        start = torch.eye(size, features).expand(heads, -1, -1)
        self.query_map, self.key_map = nn.Parameter(start.clone()), nn.Parameter(start.clone())
        self.window_weight = nn.Parameter(torch.full((heads, 1, 1), -2.197))  # a sigmoid of 0.1

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return ``[B,H,T,E]`` of ``query [B,H,T,D]``, ``key [B,G,T,D]`` and ``value [B,G,T,E]``."""
        share = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
        place = torch.arange(query.shape[2])
        distance = place[:, None] - place
        near, far = (distance >= 0) & (distance < self.window), distance >= self.window
        scores = (self.scale * query @ key.mT).masked_fill(~near, -torch.inf)
        held = (scores - scores.amax(-1, keepdim=True)).exp() * self.window_weight.sigmoid()
        remembered = (self._features(query, self.query_map) @ self._features(key, self.key_map).mT).masked_fill(~far, 0)
        weights = held + remembered
        return (weights @ value) / weights.sum(-1, keepdim=True)

    @staticmethod
    def _features(x: Tensor, weight: Tensor) -> Tensor:
        mapped = x @ weight
        return torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], -1).clamp_min(1e-12)


@dataclass(frozen=True)
class Layer:
    """A block that learns: what it reads of the original and what it has to give, as names of nodes."""

    run: Callable[[Values], Tensor]
    reads: tuple[str, ...]
    target: str


def lolcats(original: Program, targets: Sequence[str], features: int) -> tuple[list[Layer], list[Lolcats]]:
    """Return LoLCATs' layers in place of the attentions that give ``targets``."""
    nodes = {node.name: node for node in original.module.graph.nodes}
    layers, modules = [], []
    for target in targets:
        given = arguments(nodes[target].all_input_nodes[0])
        _, heads, _, size = given["query"].meta["val"].shape
        made = Lolcats(heads, size, features, WINDOW + SINKS, given["scale"])
        reads = tuple(given[name].name for name in ("query", "key", "value"))
        layers.append(Layer(lambda values, made=made, reads=reads: made(*(values[x] for x in reads)), reads, target))
        modules.append(made)
    return layers, modules


def learn(bench: Bench, layers: Sequence[Layer], modules: Sequence[Lolcats], steps: int, rate: float) -> None:
    """Train as published: the squared error of the heads' outputs, a thousandfold."""
    made = [optimiser([{"params": list(module.parameters()), "peak": rate}]) for module in modules]
    teacher = teacher_of(bench, layers)
    schedule = Schedule(steps)
    with bench.console.step("LoLCATs", steps) as advance:
        for step in range(steps):

            def one(index: int, values: dict[str, Tensor], step: int = step) -> None:
                layer = layers[index]
                loss = 1000 * (layer.run(values) - values[layer.target].float()).square().mean()
                loss.backward()
                step_optimiser(made[index], schedule.share(step), f"layer {index}", step)

            teacher.run(*bench.trainer.batches(step), one)
            advance(1)


def teacher_of(bench: Bench, layers: Sequence[Layer]) -> Teacher:
    """Return the original, which gives each layer what it reads and what it has to give."""
    wanted = [tuple(dict.fromkeys((*layer.reads, layer.target))) for layer in layers]
    return Teacher(bench.original, wanted, bench.trainer.products)


@torch.no_grad()
def errors(bench: Bench, layers: Sequence[Layer], rows: Tensor) -> list[float]:
    """Return every layer's relative squared error on ``rows [N,T]``, past what either side's window makes exact."""
    found, positions = [0.0] * len(layers), torch.arange(rows.shape[1])[None]

    def one(index: int, values: dict[str, Tensor]) -> None:
        layer = layers[index]
        with torch.no_grad():
            error = relative_error(layer.run(values), values[layer.target], WINDOW + SINKS)
        found[index] += float(error) / len(rows)

    teacher = teacher_of(bench, layers)
    for row in rows:
        teacher.run(row[None], positions, one)
    return found


def page(document: dict[str, Any]) -> str:
    """Write the page of a run."""
    sides, texts = document["sides"], list(HELD_OUT)
    base = document["sides"][document["memc"]]

    def mean(side: dict[str, Any], text: str) -> float:
        return float(np.mean(side["errors"][text]))

    lines = [
        [
            name,
            str(side["state"]),
            *(f"{mean(side, text):.4f}" for text in texts),
            *(f"{mean(base, text) / mean(side, text):.2f}" for text in texts),
            f"{side['cpu_seconds']:.0f}",
        ]
        for name, side in sides.items()
    ]
    head = ["side", "numbers of state a layer", *texts, *(f"memc's over it, {text}" for text in texts), "CPU, s"]
    by_layer = [
        [str(layer), *(f"{side['errors'][texts[0]][layer]:.4f}" for side in sides.values())]
        for layer in range(len(base["errors"][texts[0]]))
    ]
    parts = [
        "# Transfer beside LoLCATs' recipe, SmolLM2-135M",
        f"{document['cpu']}, {document['threads']} thread; memc at {document['commit']}. Every layer, a window of"
        f" {WINDOW} and {SINKS} sinks, in theirs one of {WINDOW + SINKS}; {document['tokens']} tokens of five Austen"
        f" novels and of text sampled from the model, in sequences of {LENGTH}, one a step, the same for all sides, at"
        f" a peak rate of {RATE:g} where no other is said. Measured on {document['rows']} rows of {LENGTH} tokens of"
        " each text that nothing was trained on.",
        "Mean over the layers of the squared error of what attention gives over the square of what it should give,"
        " past the window:",
        grid(head, lines),
        f"By layer, {texts[0]}:",
        grid(["layer", *sides], by_layer),
    ]
    return "\n\n".join(parts) + "\n"


def main(given: Sequence[str] | None = None) -> None:
    """Train all sides and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="folder that texts.py wrote")
    parser.add_argument("--work", type=Path, default=Path("out/transfer"), help="folder for what is kept")
    parser.add_argument("--tokens", type=int, default=65_536, help="tokens that each side is trained on")
    parser.add_argument("--rates", type=float, nargs="*", default=[], help="further rates for the other side")
    parser.add_argument("--rows", type=int, default=8, help=f"rows of {LENGTH} tokens of each text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    steps = options.tokens // LENGTH
    bench = Bench(options.work, options.texts, options.tokens, 0)
    rows = {name: bench.rows(options.texts / file, options.rows, LENGTH) for name, file in HELD_OUT.items()}
    document: dict[str, Any] = {
        **machine_facts(),
        "threads": options.threads,
        "tokens": steps * LENGTH,
        "rows": options.rows,
        "memc": "memc, linearize",
        "sides": {},
    }

    def note(name: str, state: int, layers: Sequence[Layer], began: float) -> None:
        used = time.process_time() - began
        found = {text: errors(bench, layers, some) for text, some in rows.items()}
        document["sides"][name] = {"state": state, "errors": found, "cpu_seconds": used}
        save(options.results / f"transfer-{datetime.date.today().isoformat()}.json", document, page)

    began = time.process_time()
    pass_ = parse_spec(f"linearize:window={WINDOW},sinks={SINKS},feature_size={FEATURES},keep=none")
    _, after, report = bench.apply(pass_)
    transfer = Transfer(bench.original, after, report.objectives, bench.trainer.products)
    tokens, positions = zip(*(bench.trainer.batches(step) for step in range(INITIAL)), strict=True)
    transfer.initialise(torch.cat(tokens), torch.cat(positions))
    transfer.train(bench.trainer.batches, Schedule(steps), RATE, 0, Checkpoints(None, {}), bench.console)
    blocks = transfer.blocks
    own = [Layer(lambda values, b=b: b(values)[0], b.inputs, b.objective.target) for b in blocks]
    _, heads, _, size = (
        bench.original.module.graph.find_nodes(op="call_function", target=torch.ops.memc.attention.default)[0]
        .args[0]
        .meta["val"]
        .shape
    )
    groups = transfer.blocks[0].states[0].shape[1]
    note(document["memc"], groups * FEATURES * (size + 1), own, began)
    for rate in (RATE, *options.rates):
        for name, features in (("LoLCATs", FEATURES // 2), ("LoLCATs, as much state", FEATURES * groups // heads // 2)):
            began = time.process_time()
            layers, modules = lolcats(bench.original, [b.objective.target for b in blocks], features)
            learn(bench, layers, modules, steps, rate)
            rated = name if rate == RATE else f"{name}, rate {rate:g}"
            note(rated, heads * 2 * features * (size + 1), layers, began)


if __name__ == "__main__":
    main()
