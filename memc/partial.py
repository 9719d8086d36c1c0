"""Where what is not whole yet lies: beside its place, so that one rename puts it there."""

from __future__ import annotations

from pathlib import Path


def partial_of(path: Path, ending: str = ".partial") -> Path:
    """Return where what becomes ``path`` is made; for one without a name (``.``) a place that is never there."""
    return path.with_name(path.name + ending) if path.name else path / ending
