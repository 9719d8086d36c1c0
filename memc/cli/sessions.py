"""Opening what a command is given: artifacts, or models as they are."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from memc.artifact import MANIFEST
from memc.cli.console import Console
from memc.errors import MemcError
from memc.llamacpp import PREFIX

if TYPE_CHECKING:
    from memc.runtime import Session


def open_sessions(
    sources: Mapping[str, str], console: Console, stack: ExitStack, *, threads: int | None = None
) -> dict[str, Session]:
    """Load the artifact of each side; a model is first converted as it is, into a folder that ``stack`` removes.

    Artifacts come first, so that one that is not there is told before the minutes of a conversion. A folder is an
    artifact when it, or its ``.partial``, has or lacks a manifest but no model configuration; errors are those of
    ``memc.runtime.load`` and ``memc.convert``, and E208 for a file that llama.cpp is to run.
    """
    from memc import runtime

    if foreign := next((source for source in sources.values() if source.startswith(PREFIX)), None):
        hint = f"memc bench OUT --against {foreign}"
        raise MemcError("E208", "llama.cpp can only be timed, and only against an artifact", foreign, hint)
    models = {source for source in sources.values() if not (Path(source) / MANIFEST).is_file() and _is_model(source)}
    opened = {
        source: runtime.load(source, threads=threads, verify=True)
        for source in dict.fromkeys(sources.values())
        if source not in models
    }
    for source in sorted(models):
        opened[source] = runtime.load(_converted(source, console, stack, threads), threads=threads)
    return {name: opened[source] for name, source in sources.items()}


def _converted(source: str, console: Console, stack: ExitStack, threads: int | None) -> Path:
    from memc import api

    made = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="memc-"))) / "dense"
    console.note(
        f"{source} is a model: it is first converted as it is, into {made.parent}, which is removed at the end"
    )
    console.note("to spare that the next time: memc convert MODEL -o OUT --recipe dense")
    api.convert(source, str(made), target="cpu", recipe="dense", threads=threads, progress=console)
    gc.collect()  # graphs are full of cycles: what the conversion held must not count as memory of the measurement
    return made


def _is_model(source: str) -> bool:
    """Tell a model from an artifact that is not there: by its ending, its configuration, or the form of a hub id."""
    path = Path(source)
    if path.is_dir():
        return (path / "config.json").is_file()
    if source.startswith("python:") or path.suffix in (".gguf", ".pt2"):
        return True
    return source.count("/") == 1 and not path.parent.is_dir()
