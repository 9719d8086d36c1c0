"""What the shell is offered for an argument: names of memc, or the shell's own files and folders."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from click import Context, Parameter
from click.shell_completion import CompletionItem


def folders(ctx: Context, param: Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete folders."""
    return [CompletionItem(incomplete, type="dir")]


def files(ctx: Context, param: Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete files and folders."""
    return [CompletionItem(incomplete, type="file")]


def targets(ctx: Context, param: Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the targets."""
    from memc.target import targets as known

    return _starting(incomplete, known())


def passes(ctx: Context, param: Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the passes."""
    from memc.plugins import registered

    return _starting(incomplete, registered("memc.passes"))


def backends(ctx: Context, param: Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the backends."""
    from memc.plugins import registered

    return _starting(incomplete, registered("memc.backends"))


def recipes(ctx: Context, param: Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the recipes that have a name; where none fits it is a file."""
    from memc.recipe import recipe_paths

    return _starting(incomplete, recipe_paths()) or files(ctx, param, incomplete)


def _starting(incomplete: str, names: Iterable[Any]) -> list[CompletionItem]:
    return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]
