"""``memc targets``."""

from __future__ import annotations

import click

from memc.cli.console import Console
from memc.cli.options import declare


@declare("targets", "memc targets", "memc targets nvidia-sm90 --json", "memc targets --json")
@click.argument("name", required=False)
def command(console: Console, name: str | None) -> None:
    """Show the hardware that can be converted for, and what is missing here where it cannot.

    A TOML file in ~/.config/memc/targets adds a target.
    """
    from memc.doctor import list_targets
    from memc.report.listings import targets_view
    from memc.target import get_target

    document = list_targets()
    if name is not None:
        get_target(name)
        document.targets = [row for row in document.targets if row.name == name]
    console.show(document, lambda: targets_view(document))
