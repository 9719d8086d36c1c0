"""``memc doctor``."""

from __future__ import annotations

import click

from memc.cli.console import Console
from memc.cli.options import declare


@declare("doctor", "memc doctor", "memc doctor --coverage", "memc doctor --json")
@click.option("--coverage", is_flag=True, help="Show how far each model family comes.")
def command(console: Console, coverage: bool) -> None:
    """Show what is installed here and what works: versions, backends, kernels."""
    from memc.doctor import examine
    from memc.report.listings import doctor_view

    document = examine(coverage=coverage)
    console.show(document, lambda: doctor_view(document))
