"""A whole report, an error, and what two reports disagree on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from memc.errors import MemcError
from memc.report.facts import Document, Facts, Shown
from memc.report.files import CaptureReport, PassReportFile, RaiseReport, VerifyReport
from memc.report.models.conversion import ConvertDocument
from memc.report.models.measuring import EvalDocument


class ErrorDocument(Document):
    """What ``--json`` prints instead of a command's own document when it fails. ``log`` holds the traceback."""

    schema_: Literal["memc.error/1"] = Field(default="memc.error/1", alias="schema")
    code: str
    message: str
    where: str = ""
    next: str = ""
    exit_code: int
    log: str = ""

    @classmethod
    def of(cls, error: MemcError, log: str = "") -> ErrorDocument:
        """Describe an error."""
        return cls(
            code=error.code,
            message=error.message,
            where=error.where,
            next=error.next,
            exit_code=int(error.exit_code),
            log=log,
        )


class ReportDocument(Shown):
    """``memc report``: all the report files of one artifact, finished or not.

    ``convert`` is ``report/convert.json`` (there once the conversion is planned), ``quality`` ``report/quality.json``
    (of trained artifacts: a is the artifact, b the original, on held-out text), ``error`` ``report/error.json`` (there
    when it failed).
    """

    schema_: Literal["memc.report/1"] = Field(default="memc.report/1", alias="schema")
    out: str
    finished: bool
    convert: ConvertDocument | None = None
    capture: CaptureReport | None = None
    raising: RaiseReport | None = None
    passes: list[PassReportFile] = Field(default_factory=list)
    verify: VerifyReport | None = None
    quality: EvalDocument | None = None
    error: ErrorDocument | None = None

    def to_html(self) -> str:
        """Render the report as one page, which needs no network."""
        from memc.report.html import render

        return render(self)


class Difference(Facts):
    """One fact that two artifacts disagree on; ``ratio`` is b over a where both are numbers."""

    topic: str
    name: str
    a: str | int | float | bool | None
    b: str | int | float | bool | None
    ratio: float | None = None


class DiffDocument(Document):
    """``memc report diff``."""

    schema_: Literal["memc.diff/1"] = Field(default="memc.diff/1", alias="schema")
    a: str
    b: str
    differences: list[Difference]
