"""``memc analyse``."""

from __future__ import annotations

import click

from memc.cli import completing
from memc.cli.console import Console
from memc.cli.options import declare, html_option, model_argument, remote_code_option, require_place, write_file


@declare(
    "analyse",
    "memc analyse model.gguf --method heads -o heads.json",
    "memc analyse model.gguf --method bigram:penalty=2 --data book.txt -o bigram.json",
    "memc analyse ./my-model --method heads:favour=memory,share=0.1 --html heads.html",
)
@model_argument
@click.option(
    "--method",
    required=True,
    metavar="NAME",
    help="bigram or heads, with options: heads:favour=memory,share=0.1.",
)
@click.option(
    "--data",
    multiple=True,
    metavar="FILE",
    help="Text to look at (repeatable).  [default: text that the model makes]",
    shell_complete=completing.files,
)
@click.option(
    "-o",
    "--out",
    "output",
    metavar="FILE",
    callback=require_place,
    help="Write the document, for prune:analysis=FILE.",
    shell_complete=completing.files,
)
@html_option("Write a page with pictures.")
@remote_code_option
def command(
    console: Console,
    model: str,
    method: str,
    data: tuple[str, ...],
    output: str | None,
    html: str | None,
    remote_code: bool,
) -> None:
    """Find the heads and channels of a model that make something up.

    bigram finds the subnetwork that predicts the next token by the current one alone: a mask over heads, channels and
    blocks, learned with frozen weights (options penalty, steps, batch, sequences, length).

    heads tells heads that carry what was read in the context from those that carry what the model remembers, by
    patching the path of each to the prediction on prompts in which the two disagree (options favour, share, prompts).

    What is found can stay, or go, when the model is pruned: --pass prune:analysis=FILE protects it, and with
    score=analysis what is found least goes first.
    """
    from memc import api
    from memc.report.analysis import analysis_view

    document = api.analyse(model, method, data=data, remote_code=remote_code, progress=console)
    if output is not None:
        write_file(console, output, document.to_json() + "\n")
    if html is not None:
        write_file(console, html, document.to_html())
    console.show(document, lambda: analysis_view(document))
