"""``memc targets`` and ``memc targets calibrate``."""

from __future__ import annotations

import time
from pathlib import Path

import click

from memc.cli import completing
from memc.cli.console import Console
from memc.cli.options import declare, threads_option
from memc.errors import MemcError


@declare(
    "targets", "memc targets", "memc targets nvidia-sm90 --json", "memc targets calibrate --threads 1 -o mine.toml"
)
@click.argument("name", required=False, metavar="[NAME | calibrate]", shell_complete=completing.targets)
@threads_option
@click.option(
    "-o", "--out", "output", metavar="FILE", help="Where calibrate writes (default: the folder of your own targets)."
)
def command(console: Console, name: str | None, threads: int | None, output: str | None) -> None:
    """Show the hardware that can be converted for, and what is missing here where it cannot.

    A TOML file in ~/.config/memc/targets adds a target, or replaces one of that name. calibrate measures this machine
    in a minute or two and writes such a file for the target cpu: predictions are made with its rates from then on.
    """
    if name == "calibrate":
        _calibrate(console, threads, output)
        return
    if threads is not None or output is not None:
        raise MemcError("E200", "--threads and -o go with calibrate", next="memc targets calibrate")
    from memc.doctor import list_targets
    from memc.report.listings import targets_view
    from memc.target import get_target

    document = list_targets()
    if name is not None:
        get_target(name)
        document.targets = [row for row in document.targets if row.name == name]
    console.show(document, lambda: targets_view(document))


def _calibrate(console: Console, threads: int | None, output: str | None) -> None:
    from memc import machine
    from memc.calibrate import calibrate
    from memc.report.listings import calibrate_view
    from memc.report.tools import CalibrateDocument, TargetRates
    from memc.target import Target, get_target, user_folder, write_target

    def rates(target: Target) -> TargetRates:
        return TargetRates.model_validate(target.model_dump())

    before, began = get_target("cpu"), time.perf_counter()
    after = calibrate(threads=threads, progress=console)
    path = Path(output) if output is not None else user_folder() / "cpu.toml"
    write_target(after, path)
    document = CalibrateDocument(
        path=str(path),
        machine=machine.describe(),
        threads=threads or machine.cores(),
        seconds=time.perf_counter() - began,
        before=rates(before),
        after=rates(after),
    )
    console.show(document, lambda: calibrate_view(document))
