"""States of sessions in files: one safetensors file, with digests of its arrays and of the artifact it belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from memc.arguments import path_of
from memc.artifact import Manifest
from memc.errors import MemcError
from memc.partial import replacing
from memc.runtime.inputs import Array

STATE_SCHEMA = "memc.state/2"
"""Files of schema 1 had no digest of the arrays, and are refused: nothing tells a whole one from a damaged one."""


def write_state(path: str | Path, manifest: Manifest, arrays: Mapping[str, Array]) -> None:
    """Write a state's arrays by name, the file whole or not at all.

    Raises ``MemcError``: E502 when they cannot be written, E200 for what is no path.
    """
    place = path_of("path", path)
    made = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    metadata = {"schema": STATE_SCHEMA, "artifact": _artifact(manifest), "arrays": _content(made)}
    try:
        with replacing(place) as beside:
            save_file(made, beside, metadata=metadata)
    except (SafetensorError, OSError) as error:
        raise MemcError("E502", f"state cannot be written: {error}", str(place), "give another path") from error


def read_state(path: str | Path, manifest: Manifest) -> dict[str, npt.NDArray[Any]]:
    """Read what ``write_state`` wrote.

    Raises ``MemcError``: E309 when the file is missing or holds no state, E402 when it is not as it was written or
    another artifact made it, E200 for what is no path.
    """
    place = path_of("path", path)
    try:
        with safe_open(place, framework="np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise MemcError("E309", f"no session state here: {error}", str(place), "give a file that save wrote") from error
    if metadata.get("schema") != STATE_SCHEMA or "lengths" not in arrays:
        schema = metadata.get("schema")
        hint = "prefill again, and save that"
        raise MemcError("E309", f"file has schema {schema!r}, not {STATE_SCHEMA!r}", str(place), hint)
    if metadata.get("arrays") != _content(arrays):
        raise MemcError("E402", "the state's file was changed since it was saved", str(place), "prefill again")
    if metadata.get("artifact") != _artifact(manifest):
        hint = "load it with the artifact that saved it, or prefill again"
        raise MemcError("E402", "the state was saved by another artifact", str(place), hint)
    return arrays


def _content(arrays: Mapping[str, Array]) -> str:
    """Return the sha256 of arrays with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _artifact(manifest: Manifest) -> str:
    return hashlib.sha256(json.dumps(manifest.model_dump(by_alias=True), sort_keys=True).encode()).hexdigest()
