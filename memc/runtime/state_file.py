"""States of sessions in files: one safetensors file, with the digest of the artifact that it belongs to."""

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

from memc.artifact import Manifest
from memc.errors import MemcError
from memc.runtime.inputs import Array

STATE_SCHEMA = "memc.state/1"


def write_state(path: str | Path, manifest: Manifest, arrays: Mapping[str, Array]) -> None:
    """Write a state's arrays by name. Raises ``MemcError`` E502 when they cannot be written."""
    made = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    try:
        save_file(made, path, metadata={"schema": STATE_SCHEMA, "artifact": _digest(manifest)})
    except (SafetensorError, OSError) as error:
        raise MemcError("E502", f"state cannot be written: {error}", str(path), "give another path") from error


def read_state(path: str | Path, manifest: Manifest) -> dict[str, npt.NDArray[Any]]:
    """Read what ``write_state`` wrote.

    Raises ``MemcError``: E309 when the file is missing or holds no state, E402 when another artifact made it.
    """
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise MemcError("E309", f"no session state here: {error}", str(path)) from error
    if metadata.get("schema") != STATE_SCHEMA or "lengths" not in arrays:
        schema = metadata.get("schema")
        raise MemcError("E309", f"file has schema {schema!r}, not {STATE_SCHEMA!r}", str(path))
    if metadata.get("artifact") != _digest(manifest):
        hint = "load it with the artifact that saved it, or prefill again"
        raise MemcError("E402", "the state was saved by another artifact", str(path), hint)
    return arrays


def _digest(manifest: Manifest) -> str:
    return hashlib.sha256(json.dumps(manifest.model_dump(by_alias=True), sort_keys=True).encode()).hexdigest()
