"""Inputs that are given to an artifact by name, checked against its manifest; numpy only."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from memc.artifact import Manifest, Port
from memc.errors import MemcError

Array = npt.NDArray[np.generic]

Fetched = Mapping[str, npt.ArrayLike]
"""What is fetched for each sequence of a batch, by input name: ``[B,...]`` each, shapes as in the manifest.

Arrays of the right type and layout are held as they are, not copied.
"""


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


def fetched_inputs(manifest: Manifest, fetched: Fetched, batch: int) -> dict[str, Array]:
    """Return what is fetched for ``batch`` sequences as :func:`named_inputs` does.

    Raises ``MemcError`` E200 for a name that is none of what the model has fetched, and for a wrong type or shape.
    """
    ports = {port.name: port for port in manifest.inputs if port.role == "fetched"}
    known = list(ports)
    if unknown := sorted(set(fetched) - set(known)):
        has = (
            f"it fetches {known[0]} to {known[-1]}" if len(known) > 1 else f"it fetches {', '.join(known) or 'nothing'}"
        )
        raise MemcError("E200", f"the model fetches no {unknown[0]!r}", next=has)
    named = named_inputs(manifest, fetched, {"B": batch})
    return {name: ports[name].laid_out(array) for name, array in named.items()}


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
