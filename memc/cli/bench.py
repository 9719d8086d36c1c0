"""``memc bench``."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from memc import machine
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
    write_file,
)
from memc.cli.sessions import open_sessions
from memc.llamacpp import PREFIX, LlamaCpp

if TYPE_CHECKING:
    from memc.bench import Timed
    from memc.runtime import Session


@declare(
    "bench",
    "memc bench out",
    "memc bench out --against dense --contexts 512,4096,32768",
    "memc bench out --against llama.cpp:model.gguf --threads 1 --html bench.html",
)
@out_argument
@click.option("--contexts", type=Numbers(), default="512,4096,32768", show_default=True, help="Prompt lengths.")
@click.option(
    "--against",
    metavar="OUT|MODEL|llama.cpp:FILE",
    help="Time another artifact or model, or a GGUF file in llama.cpp, in turns.",
    shell_complete=completing.files,
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

    With --against the two take turns, so that what else the machine does hits both. llama.cpp runs a GGUF file with the
    types of weights that it has, on as many threads, through its Python binding (pip install llama-cpp-python).
    """
    from memc.bench import bench, room_for
    from memc.report.listings import bench_view

    other: dict[str, Timed] = {}
    if against is not None and against.startswith(PREFIX):
        used = threads or machine.cores()
        other["b"] = LlamaCpp(against.removeprefix(PREFIX), room_for(contexts, steps), used)
    with ExitStack() as stack:
        sources = {"a": out} if against is None or other else {"a": out, "b": against}
        sides: dict[str, Session | Timed] = {**open_sessions(sources, console, stack, threads=threads), **other}
        document = bench(
            sides, contexts, threads=threads, steps=steps, seed=seed or 0, sources=sources, progress=console
        )
    if html is not None:
        write_file(console, html, document.to_html())
    console.show(document, lambda: bench_view(document))
