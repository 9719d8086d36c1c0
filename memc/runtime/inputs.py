"""Inputs that are given to an artifact by name, checked against its manifest; numpy only."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from memc.artifact import Manifest, Port
from memc.errors import MemcError

Array = npt.NDArray[np.generic]


def named_inputs(manifest: Manifest, inputs: Mapping[str, npt.ArrayLike], sizes: dict[str, int]) -> dict[str, Array]:
    """Return the inputs as arrays of the types that the manifest says.

    ``sizes`` holds the symbolic sizes known so far; those that the inputs settle are added. Raises ``MemcError`` E200
    for a name that the manifest does not have, and for a type or shape that is not the manifest's.
    """
    ports = {port.name: port for port in manifest.inputs if port.role != "keep"}
    found: dict[str, Array] = {}
    for name, value in inputs.items():
        port = ports.get(name)
        if port is None:
            raise MemcError("E200", f"the model has no input {name!r}", next=f"it takes {', '.join(ports)}")
        found[name] = _typed(port, np.asarray(value))
        _check_shape(port, found[name].shape, sizes)
    return found


def _typed(port: Port, array: Array) -> Array:
    kind = np.dtype("float32" if port.dtype == "bfloat16" else port.dtype)  # numpy has no bfloat16
    if not np.can_cast(array.dtype, kind, "same_kind"):
        raise MemcError("E200", f"input {port.name!r} is of type {port.dtype}, not {array.dtype}")
    return array.astype(kind, copy=False)


def _check_shape(port: Port, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    fits = len(shape) == len(port.shape)
    for size, want in zip(shape, port.shape, strict=False):
        fits &= size > 0 and size == (sizes.setdefault(want, size) if isinstance(want, str) else want)
    if not fits:
        known = ", ".join(f"{name} = {size}" for name, size in sizes.items())
        hint = f"where {known}" if known else ""
        raise MemcError("E200", f"input {port.name!r} has shape {list(shape)}, not {port.shape}", next=hint)
