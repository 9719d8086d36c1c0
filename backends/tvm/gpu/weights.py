"""How the tensors of a program are stored for a GPU: matrices as they are, row by row, in float32 or float16."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from memc.backends.tvm.isa import Tile
from memc.backends.tvm.tiles import Tiles
from memc.backends.tvm.weights import Parameter, Parameters

KINDS = {"fp32": torch.float32, "fp16": torch.float16}
"""Weight types of products and look-up tables; all else is float32."""


@dataclass
class PlainParameters(Parameters):
    """The tensors that are stored, by name in the file: a matrix is ``[out, in]``, and a table of rows at once."""

    tiles: Tiles = field(default=Tiles(Tile(1, 1)))
    kind: str = "fp32"

    @property
    def summary(self) -> str:
        """One line for the report."""
        return f"{len(self._packed)} matrices in {str(KINDS[self.kind]).removeprefix('torch.')}, row by row"

    def matrix(self, source: str, weight: Tensor, turned: bool, *, last: bool) -> list[Parameter]:
        """Store the matrix of a product, ``[out, in]`` or with ``turned`` ``[in, out]``, as one parameter."""
        dtype = KINDS[self.kind]
        name = f"{source}.turned" if turned else source
        shape = tuple(map(int, weight.T.shape if turned else weight.shape))
        found = self._add(name, dtype, shape, lambda: (weight.T if turned else weight).detach().to(dtype).contiguous())
        self._packed[name] = found
        return [found]

    def heads(self, source: str, weight: Tensor) -> Parameter:
        """Store a matrix for each head ``[H, in, out]``."""
        return self.plain(source, weight)

    def table(self, source: str, table: Tensor) -> Parameter:
        """Store a look-up table, once where it is the matrix of a product too."""
        return self.matrix(source, table, False, last=False)[0]
