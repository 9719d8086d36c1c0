"""Reading the report files of an artifact, finished or not, into one document."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from memc.artifact import MANIFEST
from memc.errors import MemcError
from memc.partial import partial_of
from memc.report import facts as f
from memc.report import files
from memc.report import models as m

FOLDER = "report"
CAPTURE, RAISE, VERIFY = "00-capture.json", "01-raise.json", "verify.json"
CONVERT, QUALITY, ERROR = "convert.json", "quality.json", "error.json"

D = TypeVar("D", bound=f.Document)


def report_folder(out: Path) -> Path:
    """Return the artifact, or ``OUT.partial`` when it is missing.

    Raises ``MemcError`` E309 when neither has a report.
    """
    partial = partial_of(out)
    for folder in (out, partial):
        if (folder / FOLDER).is_dir():
            return folder
    raise MemcError("E309", "no report here", str(out), f"memc convert MODEL -o {out}")


def read_report(out: Path) -> m.ReportDocument:
    """Read every report file of ``OUT`` or ``OUT.partial``; files that are not there yet are None.

    Raises ``MemcError`` E309 for no report, or a report file that does not parse.
    """
    folder = report_folder(out)
    home = folder / FOLDER
    passes = sorted(path for path in home.glob("*.json") if re.match(r"\d\d+-", path.name))
    own = [path for path in passes if path.name not in (CAPTURE, RAISE)]
    return m.ReportDocument(
        out=str(folder),
        finished=(folder / MANIFEST).is_file(),
        convert=_read(home / CONVERT, m.ConvertDocument),
        capture=_read(home / CAPTURE, files.CaptureReport),
        raising=_read(home / RAISE, files.RaiseReport),
        passes=[found for path in own if (found := _read(path, files.PassReportFile))],
        verify=_read(home / VERIFY, files.VerifyReport),
        quality=_read(home / QUALITY, m.EvalDocument),
        error=_read(home / ERROR, m.ErrorDocument),
    )


def _read(path: Path, kind: type[D]) -> D | None:
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        reason = _other_schema(path, kind) or str(error).splitlines()[0]
        raise MemcError("E309", f"report file does not parse: {reason}", str(path), "convert again") from error


def _other_schema(path: Path, kind: type[f.Document]) -> str:
    """Say which schema a file has, where it is another one than is read here."""
    try:
        found = json.loads(path.read_bytes())["schema"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return ""
    known = kind.model_fields["schema_"].default
    return "" if found == known else f"it has schema {found!r}, this memc reads {known!r}"
