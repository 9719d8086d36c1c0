"""The one exception type that users see, and the table of its codes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of the command line."""

    OK = 0
    USAGE = 2
    MODEL = 3
    VERIFICATION = 4
    RESOURCE = 5
    BACKEND = 6
    INTERRUPTED = 130


# Code -> (exit code, what it means). The hundreds follow the exit code, so that a reader can tell one from the other.
CODES: dict[str, tuple[Exit, str]] = {
    "E200": (Exit.USAGE, "command line used wrongly"),
    "E201": (Exit.USAGE, "recipe has an unknown or invalid key"),
    "E202": (Exit.USAGE, "unknown pass, target, backend or recipe"),
    "E203": (Exit.USAGE, "pass option unknown, malformed or out of range"),
    "E204": (Exit.USAGE, "output exists"),
    "E205": (Exit.USAGE, "prompt is empty"),
    "E206": (Exit.USAGE, "prompt or context is past the capacity"),
    "E207": (Exit.USAGE, "text or data file cannot be used"),
    "E208": (Exit.USAGE, "the artifact cannot do what was asked"),
    "E209": (Exit.USAGE, "no choice keeps the limits"),
    "E301": (Exit.MODEL, "model not found"),
    "E302": (Exit.MODEL, "model file unreadable, truncated or corrupt"),
    "E303": (Exit.MODEL, "configuration and weights disagree"),
    "E304": (Exit.MODEL, "checkpoint is pickled, or needs remote code"),
    "E305": (Exit.MODEL, "model cannot be captured"),
    "E306": (Exit.MODEL, "model cannot be raised to the calling convention"),
    "E307": (Exit.MODEL, "a pass matched nothing"),
    "E308": (Exit.MODEL, "tokenizer missing"),
    "E309": (Exit.MODEL, "artifact missing, incomplete or of another schema"),
    "E310": (Exit.MODEL, "memory bank missing, cut short, of another schema or of another model"),
    "E401": (Exit.VERIFICATION, "verification failed"),
    "E402": (Exit.VERIFICATION, "digest does not match"),
    "E403": (Exit.VERIFICATION, "non-finite values"),
    "E501": (Exit.RESOURCE, "out of memory"),
    "E502": (Exit.RESOURCE, "out of disk"),
    "E503": (Exit.RESOURCE, "a process of the training is gone"),
    "E601": (Exit.BACKEND, "backend cannot lower this program"),
    "E602": (Exit.BACKEND, "backend or tool missing or of the wrong version"),
}


@dataclass
class MemcError(Exception):
    """Anything that a user can cause: one line with a code, what happened, where, and what to type next.

    Raises ``KeyError`` at construction when ``code`` is not in ``CODES``.
    """

    code: str
    message: str
    where: str = ""
    next: str = ""

    def __post_init__(self) -> None:
        """Check the code and set the exception's text."""
        CODES[self.code]
        super().__init__(str(self))

    @property
    def exit_code(self) -> Exit:
        """Exit code of the process when this error ends it."""
        return CODES[self.code][0]

    def __str__(self) -> str:
        """Render the one line that is printed."""
        where = f" [{self.where}]" if self.where else ""
        hint = f" Next: {self.next}" if self.next else ""
        return " ".join(f"{self.code} {self.message}{where}{hint}".split())
