"""Tiles of products, measured on this machine: those of an instruction set are what suits most of its processors.

Sizes are static while something is measured: the rows of a step, and those of a session's piece of a prompt.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import tvm

from memc.backends.tvm.isa import Isa, Tile
from memc.backends.tvm.kernels.dots import maker
from memc.backends.tvm.library import set_threads
from memc.backends.tvm.tiles import Product, Tiles, Tuned
from memc.backends.tvm.weights import Parameters
from memc.runtime.session import CHUNK

ROWS = (1, CHUNK)
"""Rows that a product is timed with."""

WEIGHTS = 1 << 24
"""Most weights of a product that are timed, 64 MB of float32: of a larger one its first outputs."""

ROUNDS, LEAST = 7, 2e-3
"""Turns of two tiles, and the seconds that one takes at least."""

WORTH, WORSE = 0.97, 1.03
"""Shares of the default tile's time that another must not need more of: in the mean, and for no number of rows."""

Timed = Callable[[int], float]
"""Runs a product with so many rows and returns the seconds of one run."""

Prepare = Callable[[Product, Tile, Isa], Timed]
"""Makes what times a product in a tile."""


def tune(products: Collection[Product], isa: Isa, trials: int, threads: int | None) -> list[Tuned]:
    """Time ``trials`` other tiles for each product on ``threads`` threads; return what was found, faster or not."""
    set_threads(threads)
    tiles = candidates(isa.tile)[:trials]
    return [choose(product, isa, tiles, compiled) for product in products]


def candidates(default: Tile) -> list[Tile]:
    """Return other tiles that may fit the registers, those most like the default one first.

    Columns are a power of two times 16: vectors of others are taken apart by the compiler, and twenty times as slow.
    """
    area = default.columns * default.rows
    shapes = [(16 << n, rows) for n in range(4) for rows in (1, 2, 3, 4, 5, 6, 8, 12, 16)]
    tiles = (Tile(columns, rows, default.dots) for columns, rows in shapes if area / 4 <= columns * rows <= 2 * area)
    found = [tile for tile in tiles if tile != default]
    return sorted(found, key=lambda tile: _away(tile.columns, default.columns) + _away(tile.columns * tile.rows, area))


def _away(one: int, other: int) -> float:
    return abs(math.log2(one / other))


def choose(product: Product, isa: Isa, tiles: Sequence[Tile], prepare: Prepare) -> Tuned:
    """Return the fastest of ``tiles`` for a product, or the default one where none is ``WORTH`` it, timed twice."""
    before = prepare(product, isa.tile, isa)
    found: list[tuple[float, Tile, Timed]] = []
    for tile in tiles:
        after = prepare(product, tile, isa)
        if (shares := _shares(before, after)) is not None:
            found.append((statistics.mean(shares.values()), tile, after))
    best, gain = isa.tile, dict.fromkeys(ROWS, 1.0)
    for _, tile, after in sorted(found, key=lambda one: one[0]):
        # Once more: of many tiles one is fast by chance.
        if (shares := _shares(before, after)) is not None:
            best, gain = tile, {rows: round(1 / share, 2) for rows, share in shares.items()}
            break
    sizes = {"out": product.out, "into": product.into, "columns": best.columns, "rows": best.rows}
    return Tuned(weights=product.weights, gain=gain, **sizes)


def _shares(before: Timed, after: Timed) -> dict[int, float] | None:
    """Return which share of the first one's time the second takes by rows; None where it is not worth it."""
    shares = {}
    for rows in ROWS:
        before(rows), after(rows)
        shares[rows] = statistics.median(after(rows) / before(rows) for _ in range(ROUNDS))
    worth = statistics.mean(shares.values()) <= WORTH and max(shares.values()) <= WORSE
    return shares if worth else None


def compiled(product: Product, tile: Tile, isa: Isa) -> Timed:
    """Compile a product in a tile for a machine that this is, and return what times it."""
    out = max(1, min(product.out, WEIGHTS // product.into))
    make, options = maker(product.bits, tile)
    function = make(out, product.into, tile, bias=False, **options)
    module = tvm.IRModule({"product": function.with_attr("global_symbol", "product")})
    built = tvm.compile(module, target=tvm.target.Target(isa.options))["product"]
    # Not zeros: the memory of those may be one page.
    weight = torch.full((out, product.into), 0.01)
    stored = Parameters(Tiles(tile), product.weights).matrix("w", weight, False, last=False)
    nothing = [torch.zeros(1, dtype=torch.uint8)] if len(stored) == 2 else []
    arrays = [*(one.make() for one in stored), *nothing, torch.zeros(1)]
    held = [tvm.runtime.tensor(array.numpy()) for array in arrays]

    def timed(rows: int) -> float:
        x, y = (tvm.runtime.tensor(np.full((rows, size), 0.01, np.float32)) for size in (product.into, out))
        return _seconds(partial(built, x, *held, y))

    return timed


def _seconds(run: Callable[[], Any]) -> float:
    """Return the seconds of one run, of as many as ``LEAST`` takes."""
    count, began = 0, time.perf_counter()
    while True:
        run()
        count += 1
        if (passed := time.perf_counter() - began) >= LEAST:
            return passed / count
