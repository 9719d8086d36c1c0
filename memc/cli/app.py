"""The ``memc`` command: its commands by name, imported when asked for, and what happens when one fails."""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

import click

from memc import __version__
from memc.cli.failures import fail
from memc.cli.invocation import Invocation

# In the order of a user's work. The summaries stand here so that --help imports no command.
COMMANDS = {
    "inspect": "What is in a model: blocks, masks, heads, cost per token.",
    "analyse": "Which heads and channels of a model make something up.",
    "convert": "Rewrite a model, lower it for a target, verify it.",
    "report": "What a conversion changed, cost and moved; diff compares two.",
    "generate": "Continue a prompt with a converted model.",
    "eval": "Perplexity of a text, and how far two models are apart.",
    "bench": "Time prefill and decode over contexts, two sides interleaved.",
    "serve": "Serve a converted model through OpenAI's HTTP interface.",
    "lower": "Lower a converted model again, for another target or backend.",
    "edit": "Teach a converted model facts that change nothing else.",
    "export": "Write a converted model as a Hugging Face folder.",
    "bank": "Build, train and inspect a bank of blocks fetched by a prompt's text.",
    "passes": "The rewrites, with their options.",
    "recipes": "The recipes that have a name.",
    "targets": "The hardware that can be converted for.",
    "completion": "Completion for a shell, as a script of its own.",
    "doctor": "What is installed here and what works; model coverage.",
}


class Group(click.Group):
    """The top level: knows every command by name and imports only the one that runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of ``COMMANDS``."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command's module."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"memc.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; an unknown one is a usage error with a suggestion."""
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise click.UsageError(f"no such command {args[0]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


EXAMPLES = """\
\b
Examples:
  memc inspect HuggingFaceTB/SmolLM2-135M-Instruct
  memc convert model.gguf -o out --target cpu --recipe long-context
  memc generate out --prompt "Gravity is" --max-new-tokens 32
"""


@click.command(cls=Group, no_args_is_help=False, invoke_without_command=True, epilog=EXAMPLES)
@click.version_option(__version__, message="memc %(version)s")
@click.pass_context
def memc(ctx: click.Context) -> None:
    """A compiler that gives pretrained transformers memory of constant size.

    MODEL is a hub id, a local Hugging Face folder, a .gguf file, a .pt2 file, or python:package.module:factory.
    Results go to stdout (--json: one JSON document), everything else to stderr.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; an error becomes one line on stderr."""
    args = list(sys.argv[1:] if argv is None else argv)
    invocation = Invocation(args)
    try:
        with warnings.catch_warnings():
            if os.environ.get("MEMC_DEBUG") != "1":
                warnings.simplefilter("ignore")  # libraries warn their callers, not the user
            result = memc.main(args=args, prog_name="memc", standalone_mode=False, obj=invocation)
    except BaseException as error:  # noqa: BLE001 - the process ends here: whatever it was becomes one line
        return fail(error, invocation)
    return result if isinstance(result, int) else 0
