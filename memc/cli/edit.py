"""``memc edit``."""

from __future__ import annotations

from pathlib import Path

import click

from memc.cli import completing
from memc.cli.console import Console
from memc.cli.options import POSITIVE, declare, invocation, out_argument, seed_option, threads_option


@declare(
    "edit",
    "memc edit out --edits facts.jsonl --data notes.txt -o out-edited",
    "memc edit out --edits facts.jsonl --data notes.txt --steps 80 --keep 0.99",
    "memc edit out --edits facts.jsonl --data a.txt --data b.txt --json",
)
@out_argument
@click.option(
    "--edits",
    required=True,
    metavar="FILE",
    help='JSON lines, each with a "prompt", or a list of wordings, and the "target" that is to follow.',
    shell_complete=completing.files,
)
@click.option(
    "--data",
    multiple=True,
    required=True,
    metavar="TEXT",
    help="Text that no edit is about and that is to stay as it is; may come several times.",
    shell_complete=completing.files,
)
@click.option("-o", "--out", "output", metavar="OUT2", help="Folder of the new artifact. [default: OUT-edited]")
@click.option("--steps", type=POSITIVE, default=40, show_default=True, help="Most steps to an edit.")
@click.option(
    "--rate", type=click.FloatRange(0, 1, min_open=True), default=0.005, show_default=True, help="Learning rate."
)
@click.option(
    "--keep",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Share of unrelated text that keeps every bit; a little less lets more edits and wordings through.",
)
@click.option("--force", is_flag=True, help="Replace an artifact that exists.")
@seed_option
@threads_option
def command(
    console: Console,
    out: str,
    edits: str,
    data: tuple[str, ...],
    output: str | None,
    steps: int,
    rate: float,
    keep: float,
    force: bool,
    seed: int | None,
    threads: int | None,
) -> None:
    """Teach a model facts that change no bit of what is not about them.

    OUT was converted with --pass memory_bank:kind=side. Text that no edit is about keeps its very logits, as far as
    the result says.
    """
    from memc.conversion.edits import edit_artifact
    from memc.report.listings import edit_view
    from memc.train.editing import EditSettings

    made = Path(output or f"{out.rstrip('/')}-edited")
    invocation().out = made
    document = edit_artifact(
        Path(out),
        made,
        Path(edits),
        data,
        settings=EditSettings(steps=steps, rate=rate, keep=keep),
        threads=threads,
        seed=seed or 0,
        force=force,
        progress=console,
    )
    console.show(document, lambda: edit_view(document))
