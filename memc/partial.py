"""Where what is not whole yet lies: beside its place, so that one rename puts it there."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def partial_of(path: Path, ending: str = ".partial") -> Path:
    """Return where what becomes ``path`` is made; for one without a name (``.``) a place that is never there."""
    return path.with_name(path.name + ending) if path.name else path / ending


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all: what was there stays until the new one is. Raises as writing does."""
    partial = partial_of(path)
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except (OSError, UnicodeError):
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
