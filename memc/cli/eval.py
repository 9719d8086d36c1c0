"""``memc eval``."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from memc.cli import completing
from memc.cli.console import Console
from memc.cli.options import (
    NATURAL,
    POSITIVE,
    Numbers,
    declare,
    html_option,
    out_argument,
    seed_option,
    threads_option,
    write_file,
)
from memc.cli.sessions import open_sessions
from memc.errors import MemcError

if TYPE_CHECKING:
    from memc.runtime import Session

CONTEXT = 512


@declare(
    "eval",
    "memc eval out --text book.txt --against dense --contexts 32,128,512,2048",
    "memc eval out --task passkey,mqar:pairs=8,gap=256 --lengths 512,1024",
    "memc eval out --text notes.jsonl --against ./my-model --json",
)
@out_argument
@click.option(
    "--text",
    metavar="FILE",
    help="Predict a text file, .jsonl with a text on each line, or .npy of token ids.",
    shell_complete=completing.files,
)
@click.option("--context", type=POSITIVE, metavar="N", help=f"Tokens of each window of the text.  [default: {CONTEXT}]")
@click.option("--contexts", type=Numbers(), help="Several windows in one go.")
@click.option("--tokens", type=POSITIVE, metavar="N", help="Most tokens of the text to use.")
@click.option("--task", metavar="NAME,...", help="Recall tasks, each with options: mqar:pairs=8,gap=256.")
@click.option("--lengths", type=Numbers(), default="512", show_default=True, help="Tokens of a task's sequences.")
@click.option(
    "--samples", type=POSITIVE, default=10, show_default=True, metavar="N", help="Sequences a task, length and depth."
)
@click.option(
    "--against",
    metavar="OUT|MODEL",
    help="Compare with another artifact or model, the reference.",
    shell_complete=completing.files,
)
@click.option(
    "--free-run", type=NATURAL, metavar="N", help="Tokens both go on by from the text, greedily.  [default: 256]"
)
@click.option(
    "--bank",
    metavar="BANK",
    help="Fetch for OUT the blocks that each window or question belongs to.",
    shell_complete=completing.folders,
)
@html_option("Write a page with pictures.")
@seed_option
@threads_option
def command(
    console: Console,
    out: str,
    text: str | None,
    context: int | None,
    contexts: list[int] | None,
    tokens: int | None,
    task: str | None,
    lengths: list[int],
    samples: int,
    against: str | None,
    free_run: int | None,
    bank: str | None,
    html: str | None,
    seed: int | None,
    threads: int | None,
) -> None:
    """Measure how well a converted model predicts a text and recalls, and how far it is from another.

    OUT may also be a model, which is then taken as it is. Divergences are of OUT from what it is compared against.
    Tasks need no data: mqar, joint_recall, copy, passkey, needle_single, needle_multikey, needle_multivalue,
    needle_multiquery, variable_tracking, common_words, frequent_words.

    With a bank each window of the text is looked up whole, as a document is that is known before it is read.
    """
    from memc.data import holds_ids, read_documents, read_ids, tokenize
    from memc.evaluate.measure import measure_tasks, measure_text
    from memc.evaluate.tasks import parse_tasks
    from memc.report.evaluation import eval_view
    from memc.report.models import EvalDocument, EvalSide

    if text is None and task is None:
        raise MemcError("E200", "there is nothing to measure", next="give --text FILE, --task NAME, or both")
    if text is None and (context or contexts):
        reason = "windows are those of a text, and none is given"
        raise MemcError("E200", reason, "--contexts" if contexts else "--context", "write --lengths for tasks")
    windows = _windows(context, contexts)
    tasks = [] if task is None else parse_tasks(task)
    ids_given = text is not None and holds_ids(text)
    if text is not None:  # what cannot be used is told before a model is loaded
        next(iter(read_ids(text) if ids_given else read_documents(text)))
    with ExitStack() as stack:
        sources = {"a": out} if against is None else {"a": out, "b": against}
        sides = open_sessions(sources, console, stack, threads=threads)
        for side in sides.values():
            side.require_decoder()
        if bank is not None:
            sides["a"] = _with_bank(sides["a"], bank, threads)
        document = EvalDocument(sides={name: EvalSide(source=source) for name, source in sources.items()})
        if against is not None:
            _check_tokenizers(sides["a"], sides["b"], against, needed=text is not None and not ids_given)
        if text is not None:
            if not (context or contexts):
                windows = [min([CONTEXT, *(side.capacity for side in sides.values() if side.capacity)])]
            document.text = text
            ids = tokenize([text], None if ids_given else sides["a"].text.tokenizer, limit=tokens)
            measure_text(document, sides, ids, windows, free_run, console)
        if tasks:
            measure_tasks(document, sides, tasks, lengths, samples, seed or 0, console)
        for name, side in sides.items():
            measured = document.sides[name]
            longest = [*(row.context for row in measured.by_context), *(cell.length for cell in measured.cells)]
            if warning := side.beyond_trained(max(longest)):
                document.warnings.append(warning if against is None else f"{warning} ({sources[name]})")
    if html is not None:
        write_file(console, html, document.to_html())
    console.show(document, lambda: eval_view(document))


def _with_bank(session: Session, folder: str, threads: int | None) -> Session:
    from memc.bank import Bank
    from memc.bank.session import BankSession

    return BankSession(session, Bank.open(folder, threads=threads))


def _windows(context: int | None, contexts: list[int] | None) -> list[int]:
    if context is not None and contexts is not None:
        raise MemcError("E200", "--context and --contexts exclude each other", next="give one of them")
    windows = contexts or [context or CONTEXT]
    if min(windows) < 2:
        where = "--contexts" if contexts else "--context"
        raise MemcError("E200", "a window has at least 2 tokens", where, "give 2 or more")
    return windows


def _check_tokenizers(a: Session, b: Session, against: str, *, needed: bool) -> None:
    """Refuse two sides that cut text differently; where no text is needed, both may do without a tokenizer."""
    if not needed and not any((side.folder / "tokenizer.json").is_file() for side in (a, b)):
        return
    if not b.text.cuts_like(a.text):
        raise MemcError("E208", "the two have different tokenizers: their results do not compare", against)
