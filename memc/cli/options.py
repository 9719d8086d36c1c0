"""What the commands share: options, arguments, examples, and how a command is declared."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import click

from memc.arguments import LARGEST, LARGEST_SEED, MOST_THREADS
from memc.cli import completing
from memc.cli.console import Console
from memc.cli.invocation import Invocation
from memc.errors import Exit, MemcError
from memc.partial import write_whole

P = ParamSpec("P")
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Command(click.Command):
    """A command whose help ends with examples that can be typed."""

    def __init__(self, *args: Any, examples: tuple[str, ...] = (), **kwargs: Any) -> None:
        """Make the command; ``examples`` are whole command lines."""
        super().__init__(*args, **kwargs)
        self.examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, a line each."""
        formatter.write("\nExamples:\n")
        for example in self.examples:
            formatter.write(f"  {example}\n")


def declare(name: str, *examples: str) -> Callable[[Callable[Concatenate[Console, P], int | None]], Command]:
    """Declare a command: its name, three examples, and the options that all have. The function gets its console first.

    The function's docstring is the help text.
    """

    def decorate(function: Callable[Concatenate[Console, P], int | None]) -> Command:
        @functools.wraps(function)
        def call(*args: Any, json: bool, no_color: bool, quiet: bool, **kwargs: Any) -> int | None:
            try:
                return function(Console(json=json, color=not no_color, quiet=quiet), *args, **kwargs)
            except BrokenPipeError:  # whoever read the output has seen enough; click would call it a failure
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return int(Exit.OK)

        made = click.command(name, cls=Command, examples=examples)(call)
        # After a command's own, in its help.
        made.params += [
            click.Option(["--json"], is_flag=True, help="One JSON document on stdout."),
            click.Option(["--no-color"], is_flag=True, help="No colour (NO_COLOR does the same)."),
            click.Option(["-q", "--quiet"], is_flag=True, help="No progress and notes."),
        ]
        return made

    return decorate


def invocation() -> Invocation:
    """Return the running command's invocation, a fresh one outside of ``memc`` itself."""
    found = click.get_current_context().find_object(Invocation)
    return found if found is not None else Invocation([])


class Whole(click.IntRange):
    """A whole number from ``min`` to ``most``, of which help tells only the first."""

    def __init__(self, min: int, most: int = LARGEST) -> None:
        """Say what it is between."""
        super().__init__(min=min)
        self.most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read and check."""
        number: int = super().convert(value, param, ctx)
        if number > self.most:
            self.fail(f"{_shortened(value)} is out of range: at most {self.most}", param, ctx)
        return number


class Numbers(click.ParamType[list[int]]):
    """Whole numbers from ``least`` on, separated by commas; in the order given where ``ordered``, else sorted, once."""

    name = "N,N,..."

    def __init__(self, least: int = 1, *, ordered: bool = False, example: str = "512,4096") -> None:
        """Say which numbers are taken."""
        self.least, self.ordered, self.example = least, ordered, example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """Split and check."""
        if isinstance(value, list):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        if not all(part.isdecimal() for part in parts):
            self.fail(f"{_shortened(value)!r} is not a list of numbers like {self.example}", param, ctx)
        each = Whole(self.least)
        numbers = [each.convert(part, param, ctx) for part in parts]
        return numbers if self.ordered else sorted(set(numbers))


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def require_place(context: click.Context, parameter: click.Parameter, path: str | None) -> str | None:
    """Return the file that a result is to be written to, as the callback of its option: told before any work.

    Raises ``MemcError`` E200 where its folder does not exist or takes no file, or the file is a folder.
    """
    place = Path(path or "")
    if path is not None and place.is_dir():
        raise MemcError("E200", "the file is a folder", path, "give the name of a file in it")
    if path is not None and not _is_special(place):
        if not place.parent.is_dir():
            raise MemcError("E200", "folder of the file does not exist", path, "make it, or give another file")
        if not os.access(place.parent, os.W_OK | os.X_OK):
            raise MemcError("E200", "folder of the file cannot be written to", path, "give another file")
    return path


def html_option(help: str) -> Decorator:
    """Return the option ``--html FILE`` of a command whose result has a page."""
    return click.option("--html", metavar="FILE", help=help, callback=require_place, shell_complete=completing.files)


def write_file(console: Console, path: str, text: str) -> None:
    """Write what a command made, whole or not at all, and say so. Raises ``MemcError`` E200 without its folder."""
    place = Path(path)
    try:
        if _is_special(place):
            place.write_text(text, encoding="utf-8")
        else:
            write_whole(place, text)
    except FileNotFoundError:
        hint = "make it, or give another file"
        raise MemcError("E200", "folder of the file does not exist", path, hint) from None
    console.note(f"wrote {path}")


def _is_special(place: Path) -> bool:
    """Tell whether a path is a pipe, a device, or a link like /dev/stdout: written to, and not replaced."""
    return place.is_symlink() or (place.exists() and not place.is_file())


POSITIVE = Whole(1)
NATURAL = Whole(0)

model_argument = click.argument("model", metavar="MODEL", shell_complete=completing.files)
out_argument = click.argument("out", metavar="OUT", shell_complete=completing.folders)
remote_code_option = click.option("--remote-code", is_flag=True, help="Run code that comes with the model.")
tune_option = click.option(
    "--tune",
    type=NATURAL,
    default=0,
    metavar="TRIALS",
    help="Time so many other tiles for each kind of product, and keep what is faster (backend tvm).",
)
threads_option = click.option("--threads", type=Whole(1, MOST_THREADS), help="Threads of the runtime.")
seed_option = click.option("--seed", type=Whole(0, LARGEST_SEED), help="Seed of everything random.")


def require_layer(layer: int | None, known: Iterable[int]) -> None:
    """Raise ``MemcError`` E200 for a layer that is not among those that there are; any will do where there are none."""
    from memc.report.text import layers

    if layer is not None and (found := set(known)) and layer not in found:
        raise MemcError("E200", f"there is no layer {layer}", "--layer", f"give one of {layers(found)}")
