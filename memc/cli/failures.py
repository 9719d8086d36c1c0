"""The one table from an exception to a line, an exit code and a log."""

from __future__ import annotations

import errno
import os
import shlex
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import click

from memc.cli.invocation import Invocation
from memc.errors import Exit, MemcError

INTERNAL = 1
"""Exit code of an error that is memc's own fault."""

KEPT_LOGS = 20

_PLACES = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)
"""What the system refuses because of where a file is, or whose."""


def fail(error: BaseException, invocation: Invocation) -> int:
    """Print one line about ``error`` (and with ``--json`` a document), keep its traceback, return the exit code."""
    match error:
        case SystemExit():
            return error.code if isinstance(error.code, int) else INTERNAL
        case click.exceptions.Exit():
            return error.exit_code
    code, known = classify(error)
    if isinstance(known, MemcError) and known.code == "E502" and not known.where and invocation.out is not None:
        known = replace(known, where=str(invocation.out))  # the system names no file when writing to one fails
    log = "" if code in (Exit.USAGE, Exit.INTERRUPTED) else write_log(error, invocation)
    line = str(known) if isinstance(known, MemcError) else known
    if code == INTERNAL:
        line += f" [{log or 'the log could not be written'}] Next: MEMC_DEBUG=1 shows the traceback; please report it"
    _say(line, error=True)
    if os.environ.get("MEMC_DEBUG") == "1":
        traceback.print_exception(error, file=sys.stderr)
    if invocation.json:
        _say(document(known, code, log))
    return int(code)


def _say(line: str, *, error: bool = False) -> None:
    """Write a line where anybody reads it: what failed may be the very output."""
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    with suppress(OSError, ValueError):
        click.echo(line, err=error)


def classify(error: BaseException) -> tuple[int, MemcError | str]:
    """Return the exit code and what to say."""
    match error:
        case MemcError():
            known = error
        case click.UsageError():
            path = error.ctx.command_path if error.ctx else "memc"
            message = error.format_message().rstrip(".")
            known = MemcError("E200", message[:1].lower() + message[1:], path, f"{path} --help")
        case KeyboardInterrupt() | click.Abort():
            return Exit.INTERRUPTED, "interrupted"
        case MemoryError():
            known = MemcError("E501", "out of memory", next="free some, or use a smaller --context or --weights int4")
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            known = MemcError("E502", "no space left on the disk", str(error.filename or ""), "free some, then again")
        case OSError() if error.errno in _PLACES:
            where, other = str(error.filename or ""), "give another place, or one that may be read and written"
            known = MemcError("E200", f"file cannot be used: {error.strerror}", where, other)
        case RuntimeError() if "can't allocate memory" in str(error):  # how torch on a CPU says it
            return classify(MemoryError())
        case _:
            text = " ".join(str(error).split())[:200]
            return INTERNAL, f"E100 internal error: {type(error).__name__}: {text}"
    return known.exit_code, known


def document(known: MemcError | str, code: int, log: str) -> str:
    """Render the error document."""
    from memc.report.models import ErrorDocument

    if isinstance(known, MemcError):
        return ErrorDocument.of(known, log).to_json()
    name = "E130" if code == Exit.INTERRUPTED else "E100"
    return ErrorDocument(code=name, message=known.removeprefix("E100 "), exit_code=int(code), log=log).to_json()


def write_log(error: BaseException, invocation: Invocation) -> str:
    """Write the traceback to a new file and return its path, empty when it cannot be written."""
    folder = invocation.log_folder
    path = folder / f"memc-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    lines = [f"$ memc {shlex.join(invocation.argv)}\n", *traceback.format_exception(error)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
        _prune(folder)
    except OSError:
        return ""
    return str(path)


def _prune(folder: Path) -> None:
    for old in sorted(folder.glob("memc-*.log"))[:-KEPT_LOGS]:
        old.unlink(missing_ok=True)
