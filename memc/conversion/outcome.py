"""How a conversion ends: refused by a check that failed, or with what to type next."""

from __future__ import annotations

import shlex
from pathlib import Path

from memc.errors import MemcError
from memc.program import Program
from memc.train.editing import has_side_copy
from memc.verify import CheckResult

MEASURED = "memc report, on the folder OUT, shows what was measured"
NOTHING_KEPT = "nothing was written; please report it"


def next_commands(out: str | Path, program: Program, folder: Path, *, runs: bool = True) -> list[str]:
    """Return what to type next: only a decoder generates, and from a text where ``folder`` has a tokenizer.

    ``runs``: whether this machine runs what was lowered; else the same program may be lowered for it.
    """
    out = shlex.quote(str(out))
    generates = program.model.decoder and (folder / "tokenizer.json").is_file()
    if not runs:
        return [f"memc report {out}", f"memc lower {out} -o OUT --target cpu"]
    edits = [f"memc edit {out} --edits FILE --data TEXT"] if generates and has_side_copy(program) else []
    return [*([f"memc generate {out} --prompt TEXT"] if generates else []), *edits, f"memc report {out}"]


def require_passed(checks: list[CheckResult], hint: str = MEASURED) -> None:
    """Raise ``MemcError`` E401 for the first check that failed, E403 when its value is not finite."""
    for check in checks:
        if not check.passed:
            budget = f", over its budget of {check.budget:.3g}" if check.budget is not None else ""
            code = "E401" if check.value - check.value == 0 else "E403"
            reason = f"check {check.name} failed: {check.value:.3g}{budget}"
            raise MemcError(code, reason, check.detail, hint)
