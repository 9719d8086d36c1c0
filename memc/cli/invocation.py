"""What one run of the command line knows, shared by the commands and by the handling of errors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from memc.machine import cache_folder
from memc.partial import partial_of


@dataclass
class Invocation:
    """One command line. ``out`` is the folder that it makes, whose ``OUT.partial`` takes the log of a failure."""

    argv: list[str]
    out: Path | None = None

    @property
    def json(self) -> bool:
        """Whether stdout takes one JSON document; told from the text, as it counts when the rest does not parse."""
        options = self.argv[: self.argv.index("--")] if "--" in self.argv else self.argv
        return "--json" in options

    @property
    def log_folder(self) -> Path:
        """Folder for the traceback of a failure."""
        if self.out is not None:
            partial = partial_of(self.out)
            if partial.is_dir():
                return partial / "log"
        return cache_folder() / "log"
