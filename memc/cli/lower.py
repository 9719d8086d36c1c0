"""``memc lower``."""

from __future__ import annotations

from pathlib import Path

import click

from memc.cli import completing
from memc.cli.console import Console
from memc.cli.convert import WEIGHTS
from memc.cli.options import POSITIVE, declare, invocation, out_argument, threads_option, tune_option


@declare(
    "lower",
    "memc lower out --target cpu --weights int4 -o out-int4",
    "memc lower out --target cpu --backend tvm --tune 16",
    "memc lower out --target x86-64-v3 --json",
)
@out_argument
@click.option(
    "--target", required=True, help="Hardware to lower for (memc targets).", shell_complete=completing.targets
)
@click.option("-o", "--output", metavar="OUT2", help="Folder of the new artifact. [default: OUT-TARGET]")
@click.option("--backend", help="Backend, instead of the target's own.", shell_complete=completing.backends)
@click.option("--weights", type=click.Choice(WEIGHTS), help="Type of the lowered weights.")
@click.option("--context", type=POSITIVE, metavar="N", help="Capacity of growing states, in tokens.")
@click.option("--force", is_flag=True, help="Replace an artifact that exists.")
@threads_option
@tune_option
def command(
    console: Console,
    out: str,
    target: str,
    output: str | None,
    backend: str | None,
    weights: str | None,
    context: int | None,
    force: bool,
    threads: int | None,
    tune: int,
) -> None:
    """Lower a converted model for another target, backend or weight type, from the same rewritten program."""
    from memc.conversion.again import lower_again
    from memc.report.listings import lower_view

    made = Path(output or f"{out.rstrip('/')}-{target}")
    invocation().out = made
    document = lower_again(
        Path(out),
        made,
        target=target,
        backend=backend,
        weights=weights,
        context=context,
        threads=threads,
        force=force,
        tune=tune,
        progress=console,
    )
    console.show(document, lambda: lower_view(document))
