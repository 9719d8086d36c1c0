"""Find how kernels are best cut on this GPU: ``python benchmarks/gpu.py --tune`` writes ``kernels/tiles.toml``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from memc.kernels.launch import Launcher, Tile, launching
from memc.kernels.tiles import Asked

Timer = Callable[[Callable[[], Any]], float]
"""Returns what a side takes, in any unit."""


@dataclass
class Tuner:
    """Tries tiles around the default ones, a kernel at a time, and keeps those that made a side faster."""

    launcher: Any
    timer: Timer
    best: dict[tuple[str, str], Tile] = field(default_factory=dict)

    def tune(self, side: Callable[[], Any]) -> None:
        """Settle the tiles of every kernel that a side launches; what was settled before stays."""
        chosen = Asked()
        chosen.set.update(self.best)
        launcher: Launcher = replace(self.launcher, tiles=chosen)
        with launching(launcher):
            least = self.timer(side)
            for key, default in list(chosen.asked.items()):
                if key in self.best:
                    continue
                self.best[key] = default
                for candidate in candidates(default):
                    chosen.set[key] = candidate
                    taken = self._try(side)
                    if taken is not None and taken < least:
                        least, self.best[key] = taken, candidate
                chosen.set[key] = self.best[key]

    def _try(self, side: Callable[[], Any]) -> float | None:
        try:
            return self.timer(side)
        except (RuntimeError, ValueError) as error:  # more memory or registers than there are, or an illegal block
            print(f"  not possible: {str(error).splitlines()[0][:100]}")
            return None


def candidates(tile: Tile) -> Iterator[Tile]:
    """Return tiles around one: each size halved and doubled, other numbers of warps and of stages."""
    for name, size in tile.sizes.items():
        for other in (size // 2, size * 2):
            if 16 <= other <= 256:
                yield replace(tile, sizes={**tile.sizes, name: other})
    for warps in {4, 8} - {tile.warps}:
        yield replace(tile, warps=warps)
    for stages in {1, 2, 3} - {tile.stages}:
        yield replace(tile, stages=stages)


def write(path: Path, gpu: str, best: dict[tuple[str, str], Tile]) -> None:
    """Write a GPU's tiles into the file of all; those of other GPUs stay."""
    text = path.read_text(encoding="utf-8")
    kept = [part for part in text.split("\n[") if not part.startswith(f'"{gpu}".')]
    for (kernel, shape), tile in sorted(best.items()):
        sizes = ", ".join(f"{name} = {size}" for name, size in tile.sizes.items())
        place = ".".join(json.dumps(name) for name in (gpu, kernel, shape))
        kept.append(f"{place}]\nsizes = {{ {sizes} }}\nwarps = {tile.warps}\nstages = {tile.stages}\n")
    path.write_text("\n[".join(kept), encoding="utf-8")
