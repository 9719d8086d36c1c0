"""``memc inspect``."""

from __future__ import annotations

import click

from memc.cli.console import Console
from memc.cli.options import NATURAL, declare, model_argument, remote_code_option, require_layer


@declare(
    "inspect",
    "memc inspect HuggingFaceTB/SmolLM2-135M-Instruct",
    "memc inspect ./my-model --why --layer 3",
    "memc inspect model.gguf --json",
)
@model_argument
@click.option("--why", is_flag=True, help="Explain what was nearly a block: what differs, and where in the source.")
@click.option("--layer", type=NATURAL, help="Show one layer only.")
@remote_code_option
def command(console: Console, model: str, why: bool, layer: int | None, remote_code: bool) -> None:
    """Show what is in a model: blocks, masks, heads, work and state per token.

    Reads the configuration alone; no weights are loaded where there is one.
    """
    from memc import api
    from memc.report.inspection import inspect_view

    with console.step(f"inspecting {model}"):
        document = api.inspect(model, remote_code=remote_code)
    require_layer(layer, (block.layer for block in document.blocks))
    console.show(document, lambda: inspect_view(document, layer=layer, why=why))
