"""Which tile each product is made in: the instruction set's own, or one that was measured to be faster."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict

from memc.backends.tvm.isa import Tile


class Tuned(BaseModel):
    """A product whose tiles were measured, of weights ``[out, into]`` of a type, and the tile that it got.

    ``gain`` is how many times as fast as in the instruction set's tile it is for each number of rows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: str
    out: int
    into: int
    columns: int
    rows: int
    gain: dict[int, float]


@dataclass(frozen=True)
class Product:
    """A product of rows with a stored matrix ``[out, into]`` of float32, or of 8 or 4 ``bits``."""

    bits: int
    out: int
    into: int

    @property
    def weights(self) -> str:
        """The type of its weights."""
        return "fp32" if self.bits == 32 else f"int{self.bits}"


@dataclass(frozen=True)
class Tiles:
    """The tiles of a program: the ``default``, and those of products that were measured."""

    default: Tile
    measured: dict[Product, Tile] = field(default_factory=dict)

    @classmethod
    def of(cls, default: Tile, tuned: Iterable[Tuned]) -> Tiles:
        """Return the tiles that were written down in ``tuned``."""
        found = {}
        for one in tuned:
            bits = 32 if one.weights == "fp32" else int(one.weights.removeprefix("int"))
            found[Product(bits, one.out, one.into)] = Tile(one.columns, one.rows, default.dots)
        return cls(default, found)

    def tile(self, product: Product) -> Tile:
        """Return the tile of a product."""
        return self.measured.get(product, self.default)
