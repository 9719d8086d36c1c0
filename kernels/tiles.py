"""Tiles that were tuned: read from ``tiles.toml``, by GPU, kernel and shape."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from memc.kernels.launch import Tile


class Asked(dict[str, Any]):
    """Tiles as a launcher has them, that remember which were asked for, by kernel and shape, and return what is set."""

    def __init__(self, tiles: Mapping[str, Mapping[str, Tile]] | None = None) -> None:
        """Begin with what is set in ``tiles``."""
        super().__init__()
        self.asked: dict[tuple[str, str], Tile] = {}
        self.set = {(kernel, shape): tile for kernel, shapes in (tiles or {}).items() for shape, tile in shapes.items()}
        self.last: dict[str, str] = {}
        """The shape that each kernel was last asked for with."""

    def get(self, kernel: str, default: Any = None) -> Any:
        """Return the tiles of a kernel by shape."""
        return _Shapes(self, kernel)


@dataclass(frozen=True)
class _Shapes:
    owner: Asked
    kernel: str

    def get(self, shape: str, default: Tile) -> Tile:
        self.owner.last[self.kernel] = shape
        chosen = self.owner.set.get((self.kernel, shape), default)
        self.owner.asked[self.kernel, shape] = chosen
        return chosen


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
