"""``memc convert``."""

from __future__ import annotations

from pathlib import Path

import click

from memc.cli import completing
from memc.cli.console import Console
from memc.cli.options import (
    NATURAL,
    POSITIVE,
    declare,
    invocation,
    model_argument,
    remote_code_option,
    seed_option,
    threads_option,
    tune_option,
)
from memc.errors import MemcError

WEIGHTS = ("fp32", "fp16", "bf16", "int8", "int4")


@declare(
    "convert",
    "memc convert model.gguf -o out --recipe long-context --data book.txt --tokens 200000",
    "memc convert ./my-model -o out --pass window:window=512 --weights int8",
    "memc convert ./my-model -o out --fit 'state<=0.25x,ppl<=1.05x' --data book.txt --dry-run",
)
@model_argument
@click.option(
    "-o", "--out", required=True, metavar="OUT", help="Folder of the artifact.", shell_complete=completing.folders
)
@click.option(
    "--target",
    default="cpu",
    show_default=True,
    help="Hardware to convert for (memc targets).",
    shell_complete=completing.targets,
)
@click.option(
    "--recipe", metavar="NAME|FILE", help="Recipe by name (memc recipes) or file.", shell_complete=completing.recipes
)
@click.option(
    "--pass",
    "passes",
    multiple=True,
    metavar="SPEC",
    help="A pass, after those of the recipe; repeatable.",
    shell_complete=completing.passes,
)
@click.option("--backend", help="Backend, instead of the target's own.", shell_complete=completing.backends)
@click.option("--weights", type=click.Choice(WEIGHTS), help="Type of the lowered weights.")
@click.option("--context", type=POSITIVE, metavar="N", help="Capacity of growing states, in tokens.")
@click.option(
    "--data",
    multiple=True,
    metavar="FILE",
    help="Text, or .npy of token ids, to train what passes add, and to verify; repeatable.",
)
@click.option(
    "--tokens",
    type=NATURAL,
    metavar="N",
    help="Tokens to train on (0: only verify).  [default: 200000, or what there is]",
)
@click.option("--fit", metavar="LIMITS", help="Choose the passes to keep limits: state, decode, ppl, kl (see below).")
@click.option("--dry-run", is_flag=True, help="Print the plan; write nothing.")
@click.option("--fresh", is_flag=True, help="Start over instead of resuming.")
@click.option("--force", is_flag=True, help="Replace an OUT that exists.")
@seed_option
@threads_option
@tune_option
@remote_code_option
def command(
    console: Console,
    model: str,
    out: str,
    target: str,
    recipe: str | None,
    passes: tuple[str, ...],
    backend: str | None,
    weights: str | None,
    context: int | None,
    data: tuple[str, ...],
    tokens: int | None,
    fit: str | None,
    dry_run: bool,
    fresh: bool,
    force: bool,
    seed: int | None,
    threads: int | None,
    tune: int,
    remote_code: bool,
) -> None:
    """Rewrite a model, lower it for a target, and verify the result.

    Without recipe and passes the recipe is long-context. With --data, what the passes add is trained to imitate the
    original, and a part of the text is held out to measure on. Run again after an interruption it goes on from the
    last verified pass, and within a training from the last checkpoint.

    --fit takes limits in place of passes: state[@N]<=SIZE or Rx, decode[@N]>=Rx or <=Tms, ppl<=Rx, kl<=NATS, with
    commas between; N is a context in tokens (32k, or --context), Rx is times the original. Every block is measured
    with what the passes offer for it (once, it is kept), and without --weights their types too; the choice that loses
    least, or without limits of cost is quickest, is converted. Nothing that needs training is among them.
    """
    if tokens is not None and not data:
        raise MemcError("E200", "--tokens goes with --data, which is not given", next="add --data FILE")
    from memc.doctor import require_backend
    from memc.fit.limits import read_limits
    from memc.recipe import Recipe, load_recipe
    from memc.target import get_target

    chosen = load_recipe(recipe or "long-context") if recipe or not (passes or fit) else Recipe(recipe=1)
    resolved = chosen.resolved(passes=passes, data=data, tokens=tokens, context=context, fit=fit)
    read_limits(resolved)
    found = get_target(target)
    require_backend(found, backend)
    resolved.build()  # an error in a spec is told before the model is read
    invocation().out = Path(out)

    from memc import api
    from memc.report.terminal import convert_view
    from memc.train.parallel import launched

    document = api.convert(
        model,
        out,
        target=target,
        recipe=resolved,
        backend=backend,
        weights=weights,
        context=context,
        data=list(data),
        tokens=tokens,
        fit=fit,
        dry_run=dry_run,
        fresh=fresh,
        force=force,
        seed=seed,
        threads=threads,
        tune=tune,
        remote_code=remote_code,
        progress=console,
    )
    if launched().leads:
        console.show(document, lambda: convert_view(document))
