"""``memc export``."""

from __future__ import annotations

from pathlib import Path

import click

from memc.cli.console import Console
from memc.cli.options import declare, out_argument


@declare(
    "export",
    "memc export out -o folder",
    "memc export out -o folder --force",
    "memc export out -o folder --json",
)
@out_argument
@click.option("-o", "--out", "output", required=True, metavar="FOLDER", help="Folder of the Hugging Face model.")
@click.option("--force", is_flag=True, help="Replace a folder that exists.")
def command(console: Console, out: str, output: str, force: bool) -> None:
    """Write a converted model as an ordinary Hugging Face folder.

    from_pretrained loads it without memc. Only what transformers has a model for can be: a pruned model whose layers
    are all of one size can, linear memory cannot. The configuration's fields are changed where the shapes ask for it.
    """
    from memc.conversion.export import export
    from memc.report.listings import export_view

    document = export(Path(out), Path(output), force=force, progress=console)
    console.show(document, lambda: export_view(document))
