"""``memc lower``."""

from __future__ import annotations

from pathlib import Path

import click

from memc.cli import completing
from memc.cli.console import Console
from memc.cli.convert import WEIGHTS
from memc.cli.options import POSITIVE, declare, invocation, out_argument, threads_option, tune_option
from memc.errors import MemcError


@declare(
    "lower",
    "memc lower out --weights int4",
    "memc lower out --backend tvm --tune 16 -o out-tvm",
    "memc lower out --target x86-64-v3 --json",
)
@out_argument
@click.option(
    "--target", help="Hardware to lower for (memc targets).  [default: OUT's]", shell_complete=completing.targets
)
@click.option(
    "-o", "--out", "output", metavar="OUT2", help="Folder of the new artifact.  [default: OUT and what changes]"
)
@click.option(
    "--backend",
    help="Backend.  [default: OUT's, or the own of --target]",
    shell_complete=completing.backends,
)
@click.option("--weights", type=click.Choice(WEIGHTS), help="Type of the lowered weights.")
@click.option("--context", type=POSITIVE, metavar="N", help="Capacity of growing states, in tokens.")
@click.option("--force", is_flag=True, help="Replace an artifact that exists.")
@threads_option
@tune_option
def command(
    console: Console,
    out: str,
    target: str | None,
    output: str | None,
    backend: str | None,
    weights: str | None,
    context: int | None,
    force: bool,
    threads: int | None,
    tune: int,
) -> None:
    """Lower a converted model for another target, backend or weight type, from the same rewritten program.

    What is not given stays as it is in OUT, as far as the backend takes it.
    """
    from memc.conversion.again import lower_again
    from memc.report.listings import lower_view

    asked = (target, backend, weights, str(context or ""), "tuned" if tune else None)
    changes = [one for one in asked if one]
    if not changes:
        hint = "give --target, --backend, --weights, --context or --tune"
        raise MemcError("E200", "nothing is to be different from what is there", out, hint)
    made = Path(output or "-".join([out.rstrip("/"), *changes]))
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
