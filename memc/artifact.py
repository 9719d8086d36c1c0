"""The artifact: its manifest, its digests, and writing it in one step."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memc.errors import MemcError
from memc.partial import partial_of

MANIFEST = "memc.json"
SCHEMA = "memc.artifact/1"


@lru_cache(maxsize=8)
def _zeros(shape: tuple[int, ...], dtype: str) -> npt.NDArray[np.generic]:
    """Make zeros once for all inputs of one shape, which are as many as layers and come with every token."""
    return np.zeros(shape, dtype)


class Port(BaseModel):
    """One input or output of the lowered program. Sizes are numbers or symbols (``B``, ``T``, ``S``, ``K``)."""

    model_config = ConfigDict(extra="forbid")

    name: str
    role: Literal["tokens", "positions", "fetched", "keep", "other", "logits"]
    dtype: str
    shape: list[int | str]
    parts: dict[str, int] = Field(default_factory=dict, description="inputs of the file, and places of axis 1 in each")

    def cut(self, array: npt.NDArray[np.generic]) -> dict[str, npt.NDArray[np.generic]]:
        """Return what the file is fed for an array of the port's shape, by name.

        The parts of one ``[B,n,...]`` have its first two axes in the other order; they lie in one piece each where the
        array is as :meth:`laid_out` has it.
        """
        if not self.parts:
            return {self.name: array}
        turned, found, start = array.swapaxes(0, 1), {}, 0
        for name, size in self.parts.items():  # np.split takes 20 microseconds, with every token and layer
            found[name] = turned[start : start + size]
            start += size
        return found

    def laid_out(self, array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """Return an array of the port's shape so that the file reads it where it lies; a copy only where it does not.

        One of a single sequence does in any case.
        """
        if not self.parts:
            return np.ascontiguousarray(array)
        return np.ascontiguousarray(array.swapaxes(0, 1)).swapaxes(0, 1)

    def nothing(self, batch: int) -> npt.NDArray[np.generic]:
        """Return what ``batch`` sequences are given that nothing is fetched for: zeros, which are not to be written."""
        shape = [batch if size == "B" else int(size) for size in self.shape]
        if not self.parts:
            return _zeros(tuple(shape), self.dtype)
        return _zeros((shape[1], shape[0], *shape[2:]), self.dtype).swapaxes(0, 1)


class State(BaseModel):
    """One state of the lowered program: feed ``output`` back as ``input``.

    ``update`` swap: two buffers take turns; alias: input and output may be the same memory. ``grows`` is the axis that
    gets longer with every token, or None.
    """

    model_config = ConfigDict(extra="forbid")

    input: str
    output: str
    dtype: str
    shape: list[int | str]
    init: float = 0.0
    update: Literal["swap", "alias"] = "swap"
    grows: int | None = None


class Table(BaseModel):
    """A weight of the lowered program of which each token reads a few rows: where it lies in the file of weights."""

    model_config = ConfigDict(extra="forbid")

    name: str
    file: str = Field(description="path below the artifact's folder")
    offset: int
    dtype: str
    shape: list[int]


def held(size: int | str, tokens: Any) -> Any:
    """Return a fixed size as it is, and ``S`` or ``S/n`` at ``tokens`` held ones: their number, or that of their pages.

    ``tokens`` may be symbolic.
    """
    if isinstance(size, int):
        return size
    symbol, _, page = size.partition("/")
    assert symbol == "S", f"{size} is no size of a state"
    return (tokens + int(page) - 1) // int(page) if page else tokens


class Manifest(BaseModel):
    """``memc.json``: everything that is needed to run the artifact, in plain onnxruntime too."""

    model_config = ConfigDict(extra="forbid")

    schema_: str = Field(default=SCHEMA, alias="schema")
    version: str
    source: str
    source_digest: str
    family: str
    target: str
    backend: str
    weights: str
    lowered: str = Field(description="path of the lowered program's main file")
    inputs: list[Port]
    outputs: list[Port]
    states: list[State]
    tables: list[Table] = Field(default_factory=list)
    symbols: dict[str, str] = Field(default_factory=dict)
    capacity: int | None = Field(default=None, description="most tokens one sequence may have; None is unlimited")
    longest_call: int | None = Field(
        default=None, description="most tokens of a call up to which any split is the same; None is unlimited"
    )
    vocab_size: int | None = None
    trained_positions: int | None = Field(
        default=None, description="positions that the model was trained on, where it can go past them and that matters"
    )
    decoder: bool = True
    how_to_run: str = ""
    files: dict[str, str] = Field(default_factory=dict, description="sha256 of every file but reports")


def beyond_trained(what: str, positions: int) -> str:
    """Return the warning of ``what``, with its verb, that goes past the positions of the training."""
    return f"beyond_trained: {what} past the {positions} positions that the model was trained on"


def sha256(path: Path) -> str:
    """Return the hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def check_digest(folder: Path, manifest: Manifest, path: Path) -> None:
    """Compare a file with the manifest, which has no digests while an artifact is being made.

    Raises ``MemcError`` E402 where the file is gone or another.
    """
    name = path.relative_to(folder).as_posix()
    if manifest.files and (not path.is_file() or sha256(path) != manifest.files.get(name)):
        raise MemcError("E402", f"digest of {name} does not match the manifest", str(folder), "convert again")


def seal(folder: Path, manifest: Manifest) -> None:
    """Write the manifest with the digest of every other file except those under ``report``."""
    named = {
        str(path.relative_to(folder)): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST and path.relative_to(folder).parts[0] not in ("report", "log")
    }
    sealed = manifest.model_copy(update={"files": {name: sha256(path) for name, path in named.items()}})
    text = json.dumps(sealed.model_dump(by_alias=True), indent=1)
    partial = folder / (MANIFEST + ".partial")
    partial.write_text(text + "\n")
    partial.replace(folder / MANIFEST)


def read_manifest(folder: Path, *, verify: bool = False, unread: str = "") -> Manifest:
    """Read and check ``memc.json``.

    Raises ``MemcError``: E309 when the folder is no artifact, is incomplete or has another schema; E402 when ``verify``
    finds a file whose digest differs, of all but those in the folder ``unread``, which the caller does not read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        partial = partial_of(folder)
        hint = "run the same memc convert again: it resumes" if partial.is_dir() else "memc convert MODEL -o OUT"
        raise MemcError("E309", "no artifact here", where=str(folder), next=hint)
    try:
        data = json.loads(path.read_text())
        if data.get("schema") != SCHEMA:
            raise MemcError(
                "E309", f"artifact has schema {data.get('schema')!r}, this memc reads {SCHEMA!r}", str(path)
            )
        manifest = Manifest.model_validate(data)
    except (json.JSONDecodeError, ValidationError, AttributeError) as error:
        raise MemcError("E309", f"manifest does not parse: {str(error).splitlines()[0]}", str(path)) from error
    for name, digest in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise MemcError("E309", f"artifact lacks the file {name}", str(folder), "convert again")
        if verify and not (unread and name.startswith(f"{unread}/")) and sha256(file) != digest:
            raise MemcError("E402", f"digest of {name} does not match the manifest", str(folder), "convert again")
    return manifest
