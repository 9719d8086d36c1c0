"""``memc bench``."""

from __future__ import annotations

from contextlib import ExitStack

import click

from memc.cli import completing
from memc.cli.console import Console
from memc.cli.options import (
    POSITIVE,
    Numbers,
    declare,
    html_option,
    out_argument,
    seed_option,
    threads_option,
    write_page,
)
from memc.cli.sessions import open_sessions


@declare(
    "bench",
    "memc bench out",
    "memc bench out --against dense --contexts 512,4096,32768",
    "memc bench out --threads 1 --html bench.html",
)
@out_argument
@click.option("--contexts", type=Numbers(), default="512,4096,32768", show_default=True, help="Prompt lengths.")
@click.option(
    "--against", metavar="OUT|MODEL", help="Time another artifact or model, in turns.", shell_complete=completing.files
)
@click.option("--steps", type=POSITIVE, default=24, show_default=True, metavar="N", help="Decode steps to time.")
@html_option("Write a page with curves over the contexts.")
@seed_option
@threads_option
def command(
    console: Console,
    out: str,
    contexts: list[int],
    against: str | None,
    steps: int,
    html: str | None,
    seed: int | None,
    threads: int | None,
) -> None:
    """Time prefill and decode after prompts of several lengths.

    With --against the two take turns, so that what else the machine does hits both.
    """
    from memc.bench import bench
    from memc.report.listings import bench_view

    with ExitStack() as stack:
        sources = {"a": out} if against is None else {"a": out, "b": against}
        sides = open_sessions(sources, console, stack, threads=threads)
        document = bench(
            sides, contexts, threads=threads, steps=steps, seed=seed or 0, sources=sources, progress=console
        )
    if html is not None:
        write_page(console, html, document.to_html())
    console.show(document, lambda: bench_view(document))
