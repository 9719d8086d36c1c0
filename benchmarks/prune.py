"""What pruning without training costs SmolLM2-135M in perplexity, beside the controls of the field.

    python benchmarks/texts.py texts
    python benchmarks/prune.py --texts texts

Calibrates on five Austen novels and the first part of the Jargon File, two to one, tests on the sixth novel and on the
end of the Jargon File, and writes ``results/prune-DATE.json`` and ``.md``. All variants of one amount have exactly the
same number of parameters but for biases, and see the same calibration text, which is run once for all.
"""

from __future__ import annotations

import argparse
import datetime
import resource
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_pruning_side as control
from cpu import facts as machine_facts
from cpu import model
from page import grid, save
from torch.fx import Node

from memc.analysis.stream import Stream
from memc.cli.console import Console
from memc.cost import demands
from memc.data import Corpus, TokenStream, read_tokens
from memc.evaluate.score import words_in
from memc.evaluate.tasks import parse_tasks
from memc.frontend import capture_source
from memc.passes.prune import Prune, measure, scores
from memc.passes.prune.allocate import allocate
from memc.passes.prune.draft import Draft
from memc.passes.prune.groups import Groups
from memc.passes.prune.rewrite import Cut, Pruner
from memc.pipeline import Calibration
from memc.program import Program
from memc.raising import raise_program
from memc.runtime.text import Text
from memc.target import get_target
from memc.verify.relations import perplexity
from memc.weights import materialize

Key = tuple[float, Prune]
"""An amount, and the options of what goes."""

HERE = Path(__file__).parent
NOVELS = ("emma", "mansfield-park", "persuasion", "pride-and-prejudice", "sense-and-sensibility")
HELD_OUT = "northanger-abbey"
AMOUNTS = (0.2, 0.25, 0.5)
HEADS = 0.08
"""The share of block parameters that heads alone give: of SmolLM2-135M's a third in every layer but the outer ones."""
LENGTH = 512
TASKS, RECALL = "copy,passkey,needle_single", 256
"""What is to be recalled, in so many tokens."""


CONTROL = "torch-pruning"
"""The score of the variant whose channels that package chooses."""


@dataclass(frozen=True)
class Variant:
    """One way to choose and to make up for what goes."""

    name: str
    score: str
    refits: bool
    options: Prune = field(default_factory=Prune)
    amount: float | None = None
    """The one amount that it is for, in place of those asked for."""


VARIANTS = (
    Variant("obs, refit", "obs", True),
    Variant("obs, refit, searched", "obs", True, Prune(allocate="search")),
    Variant("searched, no limit", "obs", True, Prune(allocate="search", most=0.0)),
    Variant("heads", "obs", True, Prune(unit="heads"), HEADS),
    Variant("heads, none protected", "obs", True, Prune(unit="heads", protect_heads="none"), HEADS),
    Variant("wanda", "wanda", False),
    Variant("flap, its bias", "flap", False),
    Variant("taylor", "taylor", False),
    Variant("torch-pruning, taylor", CONTROL, False),
)


class Bench:
    """The original, its calibration text and its test text."""

    def __init__(self, texts: Path, work: Path, sequences: int, rows: int) -> None:
        """Read the model and the texts."""
        self.console = Console()
        work.mkdir(parents=True, exist_ok=True)
        captured = capture_source(model())
        for path in captured.tokenizer_files:
            shutil.copyfile(path, work / path.name)
        assert captured.weights is not None
        self.original = materialize(raise_program(captured.program).program, captured.weights)
        tokenizer = Text(work).tokenizer
        novels = [read_tokens(texts / f"austen-{name}.txt", tokenizer) for name in NOVELS]
        jargon = read_tokens(texts / "jargon.txt", tokenizer).ids
        first = TokenStream.of([np.asarray(jargon[: len(jargon) * 8 // 10])], "jargon")
        corpus = Corpus([*novels, first], [*(2.0 / len(NOVELS) for _ in NOVELS), 1.0], guard=0.0)
        tokens, positions = (torch.from_numpy(part) for part in corpus.sequences(LENGTH).batch(0, sequences))
        self.calibration = Calibration(tokens, positions, "five novels and the Jargon File, two to one")
        novel = read_tokens(texts / f"austen-{HELD_OUT}.txt", tokenizer).ids
        self.words = words_in(tokenizer, self.original.model.vocab_size or tokenizer.get_vocab_size())
        self.tests = {"Austen": _rows(novel, rows), "Jargon File": _rows(jargon[len(jargon) * 9 // 10 :], rows)}

    def measure(self, program: Program) -> dict[str, float]:
        """Return the perplexity on each test text."""
        return {name: perplexity(program, rows) for name, rows in self.tests.items()}

    def recall(self, program: Program, samples: int) -> dict[str, float]:
        """Return the share of right answers to each task, ``samples`` of them for each depth."""
        found: dict[str, float] = {}
        for task in parse_tasks(TASKS) if samples else ():
            right = [
                bool((logits[q.start - 1 : q.stop - 1].argmax(-1) == ids[q.start : q.stop]).all())
                for sample in task.samples(self.words, RECALL, samples, 0)
                for ids in [torch.from_numpy(sample.ids)]
                for logits in [program.run(ids[None])[0]]
                for q in sample.questions
            ]
            found[task.spec] = sum(right) / len(right)
        return found

    def drafts(self, amounts: Sequence[float], variants: Sequence[Variant], protect: str) -> dict[Key, Draft]:
        """Settle how much goes where, for each amount and kind of cut."""
        found: dict[Key, Draft] = {}
        for amount, options in dict.fromkeys(
            (amount, variant.options)
            for variant in variants
            for amount in (amounts if variant.amount is None else [variant.amount])
        ):
            pass_, _ = replace(options, amount=amount, protect=protect).resolve(self.original, get_target("cpu"))
            found[amount, options] = pass_.draft(self.original)
        for options in dict.fromkeys(options for _, options in found if options.allocate == "search"):
            keys = [key for key in found if key[1] == options]
            with self.console.step("search " + ", ".join(f"{amount:.0%}" for amount, _ in keys)):
                spreads = [found[key].tasks for key in keys]
                sizes = options.round, options.length
                some = allocate(self.original, spreads, self.calibration, "obs", *sizes, most=options.most)
            found |= {key: replace(found[key], tasks=one.tasks) for key, one in zip(keys, some, strict=True)}
        return found

    def cuts(
        self, drafts: dict[Key, Draft], variants: Sequence[Variant], gated: int
    ) -> dict[tuple[float, str], list[Cut]]:
        """Make every variant's cuts at every amount in one run of the text; Taylor's gradients see ``gated`` rows."""
        made: dict[tuple[float, str], list[Cut]] = {}
        groups = {t.group.exit: t.group for draft in drafts.values() for t in draft.tasks}
        fewer = Calibration(self.calibration.tokens[:gated], self.calibration.positions[:gated], "")
        gates = dict[Node, torch.Tensor]()
        if any(variant.score == "taylor" for variant in variants):
            with self.console.step(f"gradients on {gated} sequences"):
                gates = dict(zip(groups, scores.taylor(self.original, list(groups.values()), fewer), strict=True))
        chosen = self.controlled(drafts, variants, fewer)
        stream = Stream(self.original, self.calibration)
        known, start = Groups(self.original), stream.fork()
        fitted = {variant.options for variant in variants if variant.refits}
        followers = {key: measure.Follower(known, start.fork()) for key in drafts if key[1] in fitted}
        with self.console.step(f"moments of {len(groups)} groups"):
            for exit_ in sorted(groups):
                own, *theirs = measure.moments_of(stream, groups[exit_], list(followers.values()), gram=False)
                after = dict(zip(followers, theirs, strict=True))
                for key, draft in drafts.items():
                    for task in (task for task in draft.tasks if task.group.exit is exit_ and task.count):
                        for variant in (variant for variant in variants if variant.options == key[1]):
                            if variant.score == CONTROL:
                                if key in chosen:
                                    cut = Cut(task.group, chosen[key][task.group.block.layer])
                                    made.setdefault((key[0], variant.name), []).append(cut)
                                continue
                            taylor = gates[exit_] if variant.score == "taylor" else None
                            found = after[key] if variant.refits else own
                            cut = measure.cut_by(
                                self.original, task, found, variant.score, taylor, refits=variant.refits
                            )
                            if variant.refits:
                                followers[key].apply(cut)
                            made.setdefault((key[0], variant.name), []).append(cut)
        return made

    def controlled(
        self, drafts: dict[Key, Draft], variants: Sequence[Variant], text: Calibration
    ) -> dict[Key, dict[int, tuple[int, ...]]]:
        """Let torch-pruning choose the channels of the drafts that it is asked for; raises where its model is another.

        Nothing where the package is missing, or for drafts that take heads: its graph does not see that query heads
        share key-value heads.
        """
        asked = {variant.options for variant in variants if variant.score == CONTROL}
        found: dict[Key, dict[int, tuple[int, ...]]] = {}
        if asked and not control.installed():
            self.console.note("torch-pruning is not installed: its variant is left out")
            return found
        for key, draft in drafts.items():
            tasks = [task for task in draft.tasks if task.count]
            if key[1] not in asked:
                continue
            if any(task.group.kind != "ffn_channels" for task in tasks):
                self.console.note(f"torch-pruning takes no key-value heads: left out at {key[0]:.0%}")
                continue
            with self.console.step(f"torch-pruning {key[0]:.0%}", len(text.tokens)) as advance:
                module = control.load(model())
                counts = {task.group.block.layer: task.count for task in tasks}
                found[key] = control.prune_channels(module, counts, text.tokens, advance)
                same = Pruner(self.original).run([Cut(t.group, found[key][t.group.block.layer]) for t in tasks])
                rows = text.tokens[:1, :64]
                torch.testing.assert_close(control.logits_of(module, rows), same.run(rows), rtol=0, atol=1e-2)
                size = sum(value.numel() for value in module.parameters())
                assert size == same.parameter_count, f"{size} parameters against {same.parameter_count}"
        return found


def _rows(ids: Any, count: int) -> torch.Tensor:
    """Return ``count`` rows spread evenly over a text."""
    starts = np.linspace(0, len(ids) - LENGTH, count).astype(int)
    return torch.from_numpy(np.stack([np.asarray(ids[start : start + LENGTH]) for start in starts]).astype(np.int64))


def demanded(program: Program) -> list[tuple[str, float]]:
    """Return what a token asks for after as many as a row has."""
    found = demands(program, [LENGTH])[LENGTH]
    return [("flops", found.flops), ("bytes_read", found.bytes_read)]


def page(document: dict[str, Any]) -> str:
    """Write the page of a run."""
    dense, names = document["dense"], list(document["dense"])
    lines = [
        [
            f"{row['amount']:.0%}",
            row["variant"],
            f"{row['removed_share']:.4f}",
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['flops']:.3f}",
            f"{row['bytes_read']:.3f}",
            *(f"{row['perplexity'][name] / dense[name]:.3f}" for name in names),
            *(f"{row['perplexity'][name]:.1f}" for name in names),
            *(f"{value:.3f}" for value in row["recall"].values()),
        ]
        for row in sorted(document["rows"], key=lambda row: float(row["amount"]))
    ]
    head = [
        "asked",
        "variant",
        "removed",
        "parameters",
        "FLOPs",
        "bytes read",
        *(f"{n}, ratio" for n in names),
        *names,
        *document["recall"],
    ]
    parts = [
        "# SmolLM2-135M pruned without training",
        f"{document['cpu']}, one thread; memc at {document['commit']}. {document['calibration_tokens']} tokens of"
        f" calibration text ({document['calibration']}), gradients on {document['gated_tokens']} of them; tested on"
        f" {document['test_tokens']} tokens of each text in rows of {LENGTH}. Dense: "
        + ", ".join(f"{name} {value:.2f}" for name, value in dense.items())
        + f"; {document['block_parameters'] / 1e6:.2f} M of {document['total_parameters'] / 1e6:.2f} M parameters"
        " are in blocks. Ratios are to dense in the same run; FLOPs and bytes read are those of a token after"
        f" {LENGTH}.",
        grid(head, lines),
        *recalled(document),
        f"{document['seconds']:.0f} s, peak memory {document['peak_rss_bytes'] / 2**30:.2f} GiB.",
    ]
    return "\n\n".join(parts) + "\n"


def recalled(document: dict[str, Any]) -> list[str]:
    """Say what the original recalls, where that was asked."""
    asked = ", ".join(f"{task} {value:.3f}" for task, value in document["recall"].items())
    return [f"Recall in {RECALL} tokens, dense: {asked}."] if asked else []


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every variant and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="folder that texts.py wrote")
    parser.add_argument("--work", type=Path, default=Path("prune-work"), help="folder for the tokenizer")
    parser.add_argument("--sequences", type=int, default=128, help=f"calibration sequences of {LENGTH} tokens")
    parser.add_argument("--gated", type=int, default=128, help="those of them that Taylor's gradients see")
    parser.add_argument("--rows", type=int, default=16, help=f"rows of {LENGTH} tokens of each test text")
    parser.add_argument("--samples", type=int, default=0, help="samples of each task of recall and depth")
    parser.add_argument("--only", action="append", choices=[one.name for one in VARIANTS], help="variant; repeatable")
    parser.add_argument("--amounts", type=float, nargs="*", default=AMOUNTS, help="shares of block parameters that go")
    parser.add_argument("--protect", default="ends", help="the pass's option")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start = time.perf_counter()
    bench = Bench(options.texts, options.work, options.sequences, options.rows)
    variants = [one for one in VARIANTS if not options.only or one.name in options.only]
    drafts = bench.drafts(options.amounts, variants, options.protect)
    first = next(iter(drafts.values()))
    document: dict[str, Any] = {
        **machine_facts(),
        "protect": options.protect,
        "calibration": bench.calibration.origin,
        "calibration_tokens": bench.calibration.tokens.numel(),
        "gated_tokens": min(options.gated, options.sequences) * LENGTH,
        "test_tokens": options.rows * LENGTH,
        "length": LENGTH,
        "block_parameters": first.parameters,
        "total_parameters": bench.original.parameter_count,
        "rows": [],
    }
    asks = [value for _, value in demanded(bench.original)]
    with bench.console.step("dense"):
        document["dense"] = bench.measure(bench.original)
        document["recall"] = bench.recall(bench.original, options.samples)
    made = bench.cuts(drafts, variants, options.gated)
    for (amount, name), cuts in sorted(made.items(), key=lambda item: (item[0][1] != VARIANTS[0].name, item[0][0])):
        with bench.console.step(f"{name} at {amount:.0%}"):
            program = Pruner(bench.original).run(cuts)
            found, recalled = bench.measure(program), bench.recall(program, options.samples)
        removed = sum(cut.parameters for cut in cuts)
        layers = {cut.group.block.layer for cut in cuts}
        row = {
            "amount": amount,
            "variant": name,
            "removed_share": removed / first.parameters,
            "removed_parameters": removed,
            "parameters": program.parameter_count,
            "perplexity": found,
            "recall": recalled,
            "layers": {str(n): sum(c.parameters for c in cuts if c.group.block.layer == n) for n in sorted(layers)},
            **{name: value / dense for (name, value), dense in zip(demanded(program), asks, strict=True)},
        }
        document["rows"].append(row)
        document["seconds"] = time.perf_counter() - start
        document["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        results = options.results / f"prune-{datetime.date.today().isoformat()}.json"
        save(results, document, page)


if __name__ == "__main__":
    main()
