"""``memc completion``."""

from __future__ import annotations

import click

from memc.cli.console import Console
from memc.cli.options import declare

SHELLS = ("bash", "zsh", "fish")


@declare(
    "completion",
    "memc completion bash > ~/.local/share/bash-completion/completions/memc",
    "memc completion zsh > ~/.zfunc/_memc",
    "memc completion fish > ~/.config/fish/completions/memc.fish",
)
@click.argument("shell", type=click.Choice(SHELLS))
def command(console: Console, shell: str) -> None:
    """Print a script with which a shell completes memc's commands, options, and names of passes, recipes and targets.

    The script asks memc itself, through _MEMC_COMPLETE, so that it need not be written anew with another version.
    """
    from click.shell_completion import get_completion_class

    from memc.cli.app import memc
    from memc.report.tools import CompletionDocument

    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(memc, {}, "memc", "_MEMC_COMPLETE").source()
    console.text(CompletionDocument(shell=shell, script=script).to_json() + "\n" if console.json else script)
