"""``memc passes``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from memc.cli.console import Console
from memc.cli.options import declare
from memc.errors import MemcError
from memc.plugins import did_you_mean, load_plugin, registered
from memc.report.listings import passes_view
from memc.report.models import OptionFacts, PassesDocument, PassRow

if TYPE_CHECKING:
    from memc.pipeline import Pass


@declare("passes", "memc passes", "memc passes window", "memc passes --json")
@click.argument("name", required=False)
def command(console: Console, name: str | None) -> None:
    """Show the rewrites that are there, those of other packages included, with their options."""
    known = registered("memc.passes")
    if name is not None and name not in known:
        raise MemcError("E202", f"unknown pass {name!r}", next=did_you_mean(name, known))
    document = PassesDocument(passes=[describe(each) for each in ([name] if name else sorted(known))])
    console.show(document, lambda: passes_view(document))


def describe(name: str) -> PassRow:
    """Describe one registered pass from its class: docstring and options."""
    try:
        cls: type[Pass] = load_plugin("memc.passes", name)
    except MemcError as error:
        return PassRow(name=name, available=False, reason=error.message)
    summary, unhandled = split_docstring(cls.__doc__ or "")
    options = [_option(field) for field in dataclasses.fields(cls)]
    return PassRow(name=name, summary=summary, options=options, does_not_handle=unhandled)


def split_docstring(docstring: str) -> tuple[str, list[str]]:
    """Return the first sentence and the items of the list headed "Does not handle"."""
    lines = [line.strip() for line in docstring.strip().splitlines()]
    items: list[str] = []
    inside = False
    for line in lines[1:]:
        if line.lower().startswith("does not handle"):
            inside = True
        elif inside and line.startswith(("- ", "* ")):
            items.append(line[2:])
        elif inside and line and items:
            items[-1] += " " + line
        elif inside and items:
            break
    summary = lines[0] if lines else ""
    return summary.replace("``", ""), [item.replace("``", "") for item in items]


def _option(field: dataclasses.Field[Any]) -> OptionFacts:
    facts = field.metadata
    return OptionFacts(
        name=field.name,
        type=type(field.default).__name__,
        default=field.default,
        help=facts.get("help", ""),
        unit=facts.get("unit", ""),
        min=facts.get("min"),
        max=facts.get("max"),
        choices=list(facts.get("choices", ())),
    )
