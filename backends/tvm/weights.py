"""How each tensor of a program is stored for the functions that read it; values are made when they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from memc.backends.tvm.kernels.common import Tile
from memc.prepare import in_float32


@dataclass(frozen=True)
class Parameter:
    """One stored tensor: an input of the library, ``source`` its name in the file. ``make`` returns its values."""

    name: str
    source: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


@dataclass
class Parameters(Mapping[str, Parameter]):
    """The tensors that are stored, by name, as asked for; a matrix in tiles of ``tile.columns`` outputs."""

    tile: Tile
    kind: str
    _stored: dict[str, Parameter] = field(default_factory=dict)
    _packed: dict[str, Parameter] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Parameter:
        """Return a stored tensor by its name in the file."""
        return self._stored[name]

    def __iter__(self) -> Iterator[str]:
        """Yield the names in the order in which the tensors were first asked for."""
        return iter(self._stored)

    def __len__(self) -> int:
        """Return how many are stored."""
        return len(self._stored)

    @property
    def summary(self) -> str:
        """One line for the report."""
        return f"float32, {len(self._packed)} matrices in tiles of {self.tile.columns} outputs"

    def matrix(self, source: str, weight: Tensor, turned: bool, *, last: bool) -> list[Parameter]:
        """Store the matrix of a product, ``[out, in]`` or with ``turned`` ``[in, out]``, in tiles of its outputs."""
        out, into = reversed(weight.shape) if turned else weight.shape
        shape = (-(-out // self.tile.columns), into, self.tile.columns)
        made = self._add(
            f"{source}.packed{'.turned' if turned else ''}",
            torch.float32,
            shape,
            partial(_pack, weight, turned, self.tile.columns),
        )
        if not turned:
            self._packed[source] = made
        return [made]

    def table(self, source: str, table: Tensor) -> Parameter:
        """Store a look-up table, or return the packed matrix where the same tensor is one: it is stored once."""
        return self._packed.get(source) or self.plain(source, table)

    def plain(self, source: str, tensor: Tensor) -> Parameter:
        """Store a tensor as it is, those of half precision in float32."""
        dtype = in_float32(tensor.dtype)
        return self._add(source, dtype, tuple(tensor.shape), lambda: tensor.detach().to(dtype))

    def _add(self, source: str, dtype: torch.dtype, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Parameter:
        if source not in self._stored:
            self._stored[source] = Parameter(f"p{len(self._stored)}", source, dtype, shape, make)
        return self._stored[source]


def _pack(weight: Tensor, turned: bool, columns: int) -> Tensor:
    rows = weight.detach().to(torch.float32)
    rows = rows.T if turned else rows
    rows = F.pad(rows, (0, 0, 0, -len(rows) % columns))
    return rows.reshape(-1, columns, rows.shape[1]).transpose(1, 2).contiguous()
