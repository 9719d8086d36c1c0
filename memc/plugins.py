"""Passes, backends and kernels by name: what the outer rooms and third parties register through entry points."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from memc.errors import MemcError

# What this package itself provides, so that an uninstalled checkout works as an installed one does.
BUILTIN = {
    "memc.passes": {
        "window": "memc.passes.window:Window",
        "sparsify": "memc.passes.sparsify:Sparsify",
        "linearize": "memc.passes.linearize:Linearize",
        "prune": "memc.passes.prune:Prune",
        "memory_bank": "memc.passes.memory_bank:MemoryBank",
    },
    "memc.backends": {
        "eager": "memc.backends.eager:EagerBackend",
        "onnx": "memc.backends.onnx:OnnxBackend",
        "triton": "memc.backends.triton:TritonBackend",
        "tvm": "memc.backends.tvm:TvmBackend",
    },
}


@cache
def registered(group: str) -> dict[str, EntryPoint]:
    """Return the entry points of ``memc.passes`` or ``memc.backends`` by name; built-ins win over others."""
    found = {point.name: point for point in entry_points(group=group)}
    own = {name: EntryPoint(name, value, group) for name, value in BUILTIN.get(group, {}).items()}
    return {**found, **own}


def load_plugin(group: str, name: str) -> Any:
    """Import what is registered under ``name``.

    Raises ``MemcError`` E202 for an unknown name and E602 when it is there but cannot be imported.
    """
    points = registered(group)
    kind = group.rpartition(".")[2].removesuffix("es") if group.endswith("passes") else group.rpartition(".")[2][:-1]
    if name not in points:
        raise MemcError("E202", f"unknown {kind} {name!r}", next=did_you_mean(name, points))
    try:
        return points[name].load()
    except (ImportError, AttributeError) as error:
        raise MemcError("E602", f"{kind} {name!r} cannot be imported: {error}", where=points[name].value) from error


def load_kernels() -> None:
    """Register the implementations of the dialect's ops with torch; needed before a program runs."""
    import_module("memc.kernels")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Suggest the nearest known word, or list them."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names) or 'none'}"
