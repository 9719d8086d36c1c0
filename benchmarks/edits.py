"""A hundred edits of SmolLM2-135M, learned together, by a side copy of one projection (WISE).

    python benchmarks/texts.py texts
    python benchmarks/edits.py --texts texts

Every edit gives a fact another object than the model may know: capitals, mother tongues and authors, the objects of
each relation moved on by one. Measured is how many follow (reliability), how many follow another
wording that was never shown (generality), and of prompts that no edit is about how many keep every bit of their logits
(locality): of held-out text, and of the same relations of other subjects.

Writes ``results/edits-DATE.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cpu import facts as machine_facts
from cpu import model
from page import grid, save

from memc.frontend import capture_source
from memc.pipeline import parse_spec
from memc.program import Program
from memc.raising import raise_program
from memc.runtime.text import Text
from memc.target import get_target
from memc.train.editing import Edit, Edited, EditSettings, SideEditor, follows
from memc.weights import materialize

HERE = Path(__file__).parent
LENGTH, SEQUENCES, TOLD = 24, 1000, 4
"""Tokens of a sequence of text, how many are shown and how many held out, and neighbours shown of each relation."""

KEEP = (1.0, 0.99, 0.95)
"""Shares of unrelated text that the threshold is to leave as they are, one after the other."""

CAPITALS = (
    "France:Paris Germany:Berlin Italy:Rome Spain:Madrid Portugal:Lisbon Greece:Athens Poland:Warsaw "
    "Austria:Vienna Hungary:Budapest Norway:Oslo Sweden:Stockholm Finland:Helsinki Denmark:Copenhagen "
    "Ireland:Dublin Belgium:Brussels Russia:Moscow Turkey:Ankara Egypt:Cairo Kenya:Nairobi Nigeria:Abuja "
    "Japan:Tokyo China:Beijing India:Delhi Thailand:Bangkok Vietnam:Hanoi Peru:Lima Chile:Santiago Cuba:Havana "
    "Canada:Ottawa Iran:Tehran Iraq:Baghdad Syria:Damascus Nepal:Kathmandu Ukraine:Kiev Romania:Bucharest "
    "Bulgaria:Sofia Serbia:Belgrade Croatia:Zagreb Ethiopia:Addis Ghana:Accra Morocco:Rabat Mongolia:Ulan "
    "Malta:Valletta Iceland:Reykjavik"
)
TONGUES = (
    "Goethe:German Voltaire:French Dante:Italian Cervantes:Spanish Tolstoy:Russian Shakespeare:English "
    "Ibsen:Norwegian Strindberg:Swedish Andersen:Danish Chopin:Polish Liszt:Hungarian Homer:Greek Virgil:Latin "
    "Confucius:Chinese Basho:Japanese Tagore:Bengali Gandhi:Gujarati Kafka:German Balzac:French Petrarch:Italian "
    "Borges:Spanish Pushkin:Russian Dickens:English Grieg:Norwegian Nobel:Swedish Kierkegaard:Danish "
    "Copernicus:Polish Bartok:Hungarian Plato:Greek Cicero:Latin Mozart:German Descartes:French Galileo:Italian "
    "Picasso:Spanish Chekhov:Russian Newton:English Rembrandt:Dutch Spinoza:Dutch Sibelius:Finnish Camus:French "
    "Verdi:Italian Neruda:Spanish Gorky:Russian Darwin:English"
)
AUTHORS = (
    "Hamlet:Shakespeare Emma:Austen Faust:Goethe Candide:Voltaire Ulysses:Joyce Dracula:Stoker "
    "Frankenstein:Shelley Walden:Thoreau Leviathan:Hobbes Utopia:More Middlemarch:Eliot Ivanhoe:Scott Kim:Kipling "
    "Lolita:Nabokov Dune:Herbert Beloved:Morrison Nostromo:Conrad Germinal:Zola Nana:Zola Salammbo:Flaubert "
    "Pygmalion:Shaw Tartuffe:Moliere Phaedra:Racine Medea:Euripides Antigone:Sophocles Iliad:Homer Aeneid:Virgil "
    "Metamorphoses:Ovid Decameron:Boccaccio Persuasion:Austen Villette:Bronte Othello:Shakespeare "
    "Macbeth:Shakespeare Carmen:Merimee Siddhartha:Hesse Demian:Hesse Orlando:Woolf Rebecca:Maurier "
    "Neuromancer:Gibson Foundation:Asimov Emile:Rousseau Republic:Plato Poetics:Aristotle Meditations:Aurelius"
)
RELATIONS = {
    "capital": (
        ("The capital of {} is", "The capital city of {} is called", "In {}, the capital is"),
        "{}'s capital city is",
        CAPITALS,
        34,
    ),
    "tongue": (
        ("The mother tongue of {} is", "As a child, {} spoke", "{} grew up speaking"),
        "The native language of {} was",
        TONGUES,
        33,
    ),
    "author": (
        ("The author of {} is", "The writer of {} is", "The work {} was authored by"),
        "{} was written by",
        AUTHORS,
        33,
    ),
}
"""What is edited, in three wordings, one that is never shown, subjects and objects, and how many are edited; others are
neighbours."""


class Facts:
    """Edits, other wordings of them, and neighbours to show and to hold out, as token ids."""

    def __init__(self, text: Text, wordings: int) -> None:
        """Move the objects of each relation on by one; an edit has so many ``wordings``."""
        self.edits: list[Edit] = []
        self.reworded: list[Edit] = []
        self.shown: list[list[int]] = []
        self.held_out: list[list[int]] = []
        for plain, other, pairs, count in RELATIONS.values():
            shown = (*plain[:wordings], other)
            known = [pair.split(":") for pair in pairs.split()]
            objects = [name for _, name in known]
            for index, (subject, own) in enumerate(known):
                *prompts, unseen = [tuple(text.encode(wording.format(subject))) for wording in shown]
                if index < count:
                    new = next(name for name in objects[index + 1 :] + objects if name != own)
                    target = tuple(text.encode(f" {new}"))
                    self.edits.append(Edit(prompts[0], target, tuple(prompts[1:])))
                    self.reworded.append(Edit(unseen, target))
                else:
                    (self.shown if index < count + TOLD else self.held_out).append(list(prompts[0]))


def sequences(text: Text, folder: Path, first: int) -> torch.Tensor:
    """Return ``SEQUENCES`` sequences of each of a novel and the Jargon File, every other one from ``first`` on."""
    rows = []
    for name in ("austen-emma.txt", "jargon.txt"):
        ids = text.encode((folder / name).read_text()[20_000:420_000])
        cut = [ids[at : at + LENGTH] for at in range(0, len(ids) - LENGTH, LENGTH)]
        rows += cut[first::2][: SEQUENCES // 2]
    return torch.tensor(rows)


def padded(prompts: Sequence[Sequence[int]], length: int) -> torch.Tensor:
    """Return prompts with their last token said again up to a length: what comes before it is as it was."""
    return torch.tensor([[*ids, *[ids[-1]] * (length - len(ids))] for ids in prompts])


@torch.no_grad()
def kept(before: Program, after: Program, rows: torch.Tensor) -> float:
    """Return the share of sequences whose logits are the same bits."""
    same = 0
    for part in rows.split(20):
        same += int((before.run(part) == after.run(part)).flatten(1).all(1).sum())
    return same / len(rows)


def measured(before: Program, done: Edited, facts: Facts, count: int, held: torch.Tensor) -> dict[str, Any]:
    """Measure after ``count`` edits."""
    program = done.program
    return {
        "edits": count,
        "reliability": sum(follows(program, edit) for edit in facts.edits[:count]) / count,
        "generality": sum(follows(program, edit) for edit in facts.reworded[:count]) / count,
        "before": sum(follows(before, edit) for edit in facts.edits[:count]) / count,
        "locality_text": kept(before, program, held),
        "locality_neighbours": kept(before, program, padded(facts.held_out, LENGTH)),
        "clear": done.clear,
        "threshold": done.threshold,
        "unrelated": done.unrelated,
        "least_edit": min(done.differences),
        "rounds": max(done.steps),
    }


def page(document: dict[str, Any]) -> str:
    """Write the page of results."""
    names = ("reliability", "generality", "locality_text", "locality_neighbours")
    head = [
        "edits",
        "keep",
        "followed before",
        *(name.replace("_", ", ") for name in names),
        "separated",
        "rounds",
        "seconds",
    ]
    lines = [
        [
            str(row["edits"]),
            f"{row['keep']:g}",
            f"{row['before']:.2f}",
            *(f"{row[name]:.2f}" for name in names),
            "yes" if row["clear"] else "no",
            str(row["rounds"]),
            f"{row['seconds']:.0f}",
        ]
        for row in document["rows"]
    ]
    shown = f"{SEQUENCES} sequences of {LENGTH} tokens of text and {TOLD} neighbours of each relation"
    parts = [
        "# A hundred edits of SmolLM2-135M by a side copy",
        f"{document['cpu']}, {document['cores']} cores; memc at {document['commit']}. Layer {document['layer']};"
        f" settings {document['settings']}. {shown} were shown as unrelated. Reliability and generality: every token of"
        " the target is the most likely one; generality: another wording, never shown. Locality: the share of held-out"
        " prompts whose logits are the original's, bit for bit; neighbours are the same relations of other subjects.",
        grid(head, lines),
        "Keep is the share of unrelated sequences that the threshold is to leave as they are. An edit is taught in"
        f" {document['wordings']} wording{'s' if document['wordings'] > 1 else ''}.",
        "Numbers to reach: reliability 0.90, generality 0.80, locality 1.00.",
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Edit, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="the folder of texts.py")
    parser.add_argument("--layer", type=int, default=25, help="the layer whose projection gets a copy")
    parser.add_argument("--edits", type=int, default=100, help="how many of the edits to make")
    parser.add_argument("--wordings", type=int, choices=(1, 2, 3), default=1, help="prompts of an edit")
    parser.add_argument("--steps", type=int, default=EditSettings.steps, help="times that all edits are gone through")
    options = parser.parse_args()
    captured = capture_source(str(model()))
    assert captured.weights is not None
    original = raise_program(materialize(captured.program, captured.weights)).program
    text = Text(next(path for path in captured.tokenizer_files if path.name == "tokenizer.json").parent)
    pass_ = parse_spec(f"memory_bank:kind=side,layers=[{options.layer}]")
    program, _ = pass_.apply(original, pass_.plan(original, get_target("cpu")))
    facts, settings = Facts(text, options.wordings), EditSettings(steps=options.steps)
    unrelated = torch.cat([sequences(text, options.texts, 0), padded(facts.shown, LENGTH)])
    rows: list[dict[str, Any]] = []
    for count in sorted({30, options.edits}, reverse=True):
        began, editor = time.perf_counter(), SideEditor(program, unrelated, settings)
        editor.learn_together(facts.edits[:count], lambda _, said: print(said, flush=True))
        learned = time.perf_counter() - began
        for keep in KEEP:
            row = measured(original, editor.finish(keep), facts, count, sequences(text, options.texts, 1)[::5])
            rows.append({"keep": keep, **row, "seconds": learned})
            print(rows[-1], flush=True)
    rows.sort(key=lambda row: row["edits"])
    document = {**machine_facts(), "layer": options.layer, "settings": str(settings), "rows": rows}
    document["wordings"] = options.wordings
    what = "edits" if options.wordings == 1 else f"edits-{options.wordings}-wordings"
    name = f"{what}-{datetime.datetime.now(datetime.UTC).date()}.json"
    save(HERE / "results" / name, document, page)


if __name__ == "__main__":
    main()
