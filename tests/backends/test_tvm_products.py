"""Products of quantised weights alone, against what their codes stand for in float64, for every kind of tile."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import tvm

from memc.backends.tvm.isa import Isa, Tile, isa_of
from memc.backends.tvm.kernels.dots import MANY, dot_linear
from memc.backends.tvm.kernels.linear import PANEL_ROWS, linear, quantised_linear
from memc.backends.tvm.tiles import Tiles
from memc.backends.tvm.weights import Parameters
from memc.quantise import BLOCK, quantise
from memc.target import get_target

HOST = isa_of(get_target("cpu"))
TILES = {"few": Tile(16, 4), "many": Tile(64, 4), "dots": Tile(64, 4, dots=True), "dots, few": Tile(16, 4, dots=True)}
SHAPES = ((64, 32), (50, 64), (130, 72), (70, 2 * 17))
ROWS = (1, 2, 3, PANEL_ROWS - 1, 2 * PANEL_ROWS + 3, MANY + 1)
TOLERANCE = 5e-7
"""Of a sum, relative to the magnitudes of the weights, each times the largest activation of its block."""

Floats = np.ndarray[Any, np.dtype[np.float32]]


class Product:
    """One product ``x w + bias`` with a quantised weight, as it is compiled and in float64."""

    def __init__(self, tile: Tile, out: int, into: int, bits: int, isa: Isa = HOST) -> None:
        if tile.dots and not isa.tile.dots:
            pytest.skip("this processor does not add products of bytes")
        random = np.random.default_rng(out + into)
        weight = random.standard_normal((out, into), np.float32) + np.float32(0.3)
        self.values = quantise(weight, bits).values(into).astype(np.float64)
        self.bias = random.standard_normal(out, np.float32)
        self.stored = [
            part.make().numpy()
            for part in Parameters(Tiles(tile), f"int{bits}").matrix("w", torch.from_numpy(weight), False, last=False)
        ]
        function = (dot_linear if tile.dots else quantised_linear)(out, into, tile, bits=bits, bias=True)
        module = tvm.IRModule({"function": function.with_attr("global_symbol", "function")})
        self.built = tvm.compile(module, target=tvm.target.Target(isa.options))

    def run(self, x: Floats) -> Floats:
        zeros = [] if len(self.stored) == 3 else [np.zeros(1, np.uint8)]
        y = np.zeros((len(x), len(self.values)), np.float32)
        arrays = [tvm.runtime.tensor(array) for array in (x, *self.stored, *zeros, self.bias, y)]
        self.built["function"](*arrays)
        found: Floats = arrays[-1].numpy()
        return found

    def error(self, x: Floats, found: Floats) -> float:
        """Return the largest error, in what TOLERANCE is of."""
        right = x.astype(np.float64) @ self.values.T + self.bias
        largest = [np.abs(x[:, start : start + BLOCK]).max(1, keepdims=True) for start in range(0, x.shape[1], BLOCK)]
        spread = np.repeat(np.hstack(largest), BLOCK, 1)[:, : x.shape[1]].astype(np.float64)
        return float((np.abs(found - right) / (spread @ np.abs(self.values.T) + np.abs(self.bias))).max())


def activations(rows: int, into: int) -> Floats:
    """Return rows of every size, with outliers and a block of zeros among them."""
    random = np.random.default_rng(rows)
    x = random.standard_normal((rows, into), np.float32) * np.float32(10.0) ** random.integers(-9, 9, (rows, 1))
    x[:, ::7] *= 30
    x[0, : into // 2] = 0
    return x.astype(np.float32)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", TILES)
def test_products_are_as_near_as_float32_comes(kind: str, bits: int) -> None:
    for out, into in SHAPES:
        product = Product(TILES[kind], out, into, bits)
        for rows in ROWS:
            x = activations(rows, into)
            assert product.error(x, product.run(x)) < TOLERANCE, (out, into, rows)


@pytest.mark.parametrize("tile", [Tile(16, 2), Tile(16, 6), Tile(32, 3), Tile(64, 4)])
def test_rows_beside_whole_tiles_are_multiplied_too(tile: Tile) -> None:
    out, into = 70, 33
    random = np.random.default_rng(0)
    weight, bias = random.standard_normal((out, into), np.float32), random.standard_normal(out, np.float32)
    (stored,) = Parameters(Tiles(tile), "fp32").matrix("w", torch.from_numpy(weight), False, last=False)
    module = tvm.IRModule({"function": linear(out, into, tile, bias=True).with_attr("global_symbol", "function")})
    built = tvm.compile(module, target=tvm.target.Target(HOST.options))
    for rows in range(1, 2 * tile.rows + 2):
        x = random.standard_normal((rows, into), np.float32)
        y = tvm.runtime.tensor(np.full((rows, out), np.nan, np.float32))
        built["function"](*(tvm.runtime.tensor(array) for array in (x, stored.make().numpy(), bias)), y)
        assert np.abs(y.numpy() - (x.astype(np.float64) @ weight.T + bias)).max() < 2e-5, rows


@pytest.mark.parametrize("kind", TILES)
def test_what_is_not_finite_stays_so(kind: str) -> None:
    product = Product(TILES[kind], 50, 64, 8)
    for value in (np.nan, np.inf, -np.inf):
        x = activations(3, 64)
        x[1, 40] = value
        found = product.run(x)
        assert not np.isfinite(found[1]).any() and np.isfinite(found[[0, 2]]).all()


def test_activations_of_a_byte_are_too_far_off() -> None:
    """What the tolerance is for: an instruction that multiplies bytes must not round the activations to bytes."""
    product = Product(TILES["many"], 130, 64, 8)
    x = activations(3, 64)
    step = np.abs(x).reshape(3, 2, 32).max(-1).repeat(32, -1) / 127 + np.float32(1e-30)
    rounded = (np.round(x / step) * step).astype(np.float32)
    assert product.error(x, product.run(rounded)) > 100 * TOLERANCE


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_in_another_order_are_caught(bits: int) -> None:
    product, x = Product(TILES["dots"], 64, 64, bits), activations(2, 64)
    product.stored[0] = np.ascontiguousarray(product.stored[0].view(np.uint8)[..., ::-1]).view(np.int32)
    assert product.error(x, product.run(x)) > 1000 * TOLERANCE
