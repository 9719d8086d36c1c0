"""Opening what a command is given: an artifact, or a model as it is."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from memc.artifact import MANIFEST
from memc.cli.console import Console

if TYPE_CHECKING:
    from memc.runtime import Session


def open_session(source: str, console: Console, stack: ExitStack, *, threads: int | None = None) -> Session:
    """Load an artifact; a model is first converted as it is, into a folder that ``stack`` removes.

    A folder is an artifact when it, or its ``.partial``, has or lacks a manifest but no model configuration; errors are
    those of ``memc.runtime.load`` and ``memc.convert``.
    """
    from memc import runtime

    folder = Path(source)
    if (folder / MANIFEST).is_file() or not _is_model(source):
        return runtime.load(folder, threads=threads)
    from memc import api

    made = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="memc-"))) / "dense"
    console.note(f"{source} is a model: it is converted as it is first")
    api.convert(source, str(made), target="cpu", recipe="dense", threads=threads, progress=console)
    return runtime.load(made, threads=threads)


def _is_model(source: str) -> bool:
    """Tell a model from an artifact that is not there: by its ending, its configuration, or the form of a hub id."""
    path = Path(source)
    if path.is_dir():
        return (path / "config.json").is_file()
    if source.startswith("python:") or path.suffix in (".gguf", ".pt2"):
        return True
    return source.count("/") == 1 and not path.parent.is_dir()
