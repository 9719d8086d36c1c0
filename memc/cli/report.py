"""``memc report``, ``memc report diff`` and ``memc report compare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from memc.cli import completing
from memc.cli.console import Console
from memc.cli.options import NATURAL, declare, require_layer, write_file
from memc.errors import MemcError

if TYPE_CHECKING:
    from memc.report.files import PassReportFile
    from memc.report.models import ReportDocument


@declare(
    "report",
    "memc report out",
    "memc report out --pass linearize --layer 7 --why",
    "memc report compare out1 out2 out3 --html choice.html",
)
@click.argument(
    "arguments",
    nargs=-1,
    required=True,
    metavar="OUT | diff OUT1 OUT2 | compare OUT...",
    shell_complete=completing.folders,
)
@click.option("--html", is_flag=False, flag_value="", metavar="[FILE]", help="Write a page (OUT/report/report.html).")
@click.option("--pass", "pass_name", metavar="NAME", help="Show one pass: its layers, and the share of each branch.")
@click.option("--layer", type=NATURAL, help="Show one layer of that pass.")
@click.option("--why", is_flag=True, help="Say why blocks were left alone.")
def command(
    console: Console, arguments: tuple[str, ...], html: str | None, pass_name: str | None, layer: int | None, why: bool
) -> None:
    """Show what a conversion changed, what it cost and how far the outputs moved; or compare some.

    diff lists every fact that two disagree on. compare puts costs and quality of any number beside each other, and
    says which of them no other beats.

    Of a trained pass it shows the distance from the original with each branch (memory, window) off.

    Reads the report files alone. When OUT is missing, OUT.partial shows how far a conversion came.
    """
    from memc.report.read import read_report

    if arguments[0] == "diff" and len(arguments) == 3:
        _diff(console, *arguments[1:])
        return
    if arguments[0] == "compare" and len(arguments) > 2:
        _compare(console, arguments[1:], html)
        return
    if len(arguments) != 1:
        message = "give one OUT, or: diff OUT1 OUT2, or: compare OUT1 OUT2 ..."
        raise click.UsageError(message, click.get_current_context())
    if (layer is not None or why) and pass_name is None:
        raise MemcError("E200", "--layer and --why go with --pass", next="add --pass NAME")
    document = read_report(Path(arguments[0]))
    if html is not None:
        _write_html(console, document, html)
    elif pass_name is not None:
        _show_pass(console, _one_pass(document, pass_name), layer, why)
    else:
        from memc.report.terminal import report_view

        console.show(document, lambda: report_view(document))


def _show_pass(console: Console, item: PassReportFile, layer: int | None, why: bool) -> None:
    from memc.report.terminal import pass_view

    require_layer(layer, [*(site.layer for site in item.sites), *(left.layer for left in item.skipped)])
    console.show(item, lambda: pass_view(item, layer=layer, why=why))


def _one_pass(document: ReportDocument, name: str) -> PassReportFile:
    from memc.plugins import did_you_mean

    found = [item for item in document.passes if name in (item.name, item.spec)]
    if not found:
        raise MemcError(
            "E202",
            f"no pass {name!r} in this report",
            document.out,
            did_you_mean(name, [p.name for p in document.passes]),
        )
    return found[0]


def _write_html(console: Console, document: ReportDocument, html: str) -> None:
    if console.json:
        console.text(document.to_json() + "\n")
    write_file(console, html or str(Path(document.out) / "report" / "report.html"), document.to_html())


def _compare(console: Console, outs: Sequence[str], html: str | None) -> None:
    from memc.report.compare import compare, compare_view
    from memc.report.read import read_report

    if html == "":
        raise MemcError("E200", "a comparison belongs to no one OUT", "--html", "give a file: --html choice.html")
    document = compare([read_report(Path(out)) for out in outs])
    if html is not None:
        write_file(console, html, document.to_html())
    console.show(document, lambda: compare_view(document))


def _diff(console: Console, a: str, b: str) -> None:
    from memc.report.diff import diff, diff_view
    from memc.report.read import read_report

    document = diff(read_report(Path(a)), read_report(Path(b)))
    console.show(document, lambda: diff_view(document))
