"""Tiles that were tuned: read from ``tiles.toml``, by GPU, kernel and shape."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from memc.kernels.launch import Tile


@cache
def tiles_of(gpu: str) -> Mapping[str, Mapping[str, Tile]]:
    """Return the tiles tuned on a GPU by kernel and then by shape; none for a GPU that nobody tuned on."""
    return parse(tomllib.loads((files("memc.kernels") / "tiles.toml").read_text(encoding="utf-8")).get(gpu, {}))


def parse(table: Mapping[str, Any]) -> dict[str, dict[str, Tile]]:
    """Read the tiles of one GPU."""
    return {
        kernel: {shape: Tile(entry["sizes"], entry["warps"], entry["stages"]) for shape, entry in shapes.items()}
        for kernel, shapes in table.items()
    }
