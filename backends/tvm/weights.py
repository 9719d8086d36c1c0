"""How each tensor of a program is stored for the functions that read it; values are made when they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from memc.backends.tvm.isa import columns_of
from memc.backends.tvm.tiles import Product, Tiles
from memc.prepare import in_float32
from memc.quantise import BITS, BLOCK, NARROW, quantise


@dataclass(frozen=True)
class Parameter:
    """One stored tensor: an input of the library, ``source`` its name in the file. ``make`` returns its values."""

    name: str
    source: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class _Matrix:
    """A weight ``[out, in]`` that is stored in tiles of ``columns`` outputs; ``turned`` ones lie ``[in, out]``.

    With ``dots`` the codes of a quantised one are stored as :func:`~.kernels.dots.dot_linear` reads them.
    """

    tensor: Tensor
    turned: bool
    columns: int
    dots: bool = False

    @property
    def sizes(self) -> tuple[int, int]:
        """Return the number of outputs and of inputs."""
        rows, columns = map(int, self.tensor.shape)
        return (columns, rows) if self.turned else (rows, columns)

    def shape(self, inputs: int) -> tuple[int, int, int]:
        """Return the shape of what has ``inputs`` values of each output."""
        return -(-self.sizes[0] // self.columns), inputs, self.columns

    def values(self) -> Tensor:
        """Return the weight ``[out, in]`` in float32."""
        values = self.tensor.detach().to(torch.float32)
        return values.T if self.turned else values

    def tiled(self, rows: Tensor) -> Tensor:
        """Lay ``[out, inputs]`` out in tiles, the last one filled up with zeros."""
        rows = F.pad(rows, (0, 0, 0, -len(rows) % self.columns))
        return rows.reshape(-1, self.columns, rows.shape[1]).transpose(1, 2).contiguous()

    def packed(self) -> Tensor:
        """Return the tiles of the weight itself."""
        return self.tiled(self.values())

    def quantised(self, part: str, bits: int) -> Tensor:
        """Return the tiles of a part of the quantised weight: ``codes``, ``scales`` or ``zeros``."""
        found = quantise(self.values().numpy(), bits)
        if part == "scales":
            return self.tiled(torch.from_numpy(found.scales))
        if part == "zeros":
            return self.tiled(torch.from_numpy(found.zero_steps()))
        if self.dots:
            return self.tiled(_words(torch.from_numpy(found.code_steps()), bits))
        codes = torch.from_numpy(found.code_steps()[:, : self.sizes[1]].copy())
        if bits == 8:
            return self.tiled((codes.to(torch.int16) - 128).to(torch.int8))
        return self.tiled(codes[:, 0::2] | (codes[:, 1::2] << 4))


def _words(codes: Tensor, bits: int) -> Tensor:
    """Put codes ``[out, inputs]``, one to a byte, together in int32: 4 of 8 bits; 8 of 4 bits, 4 in the low halves."""
    if bits == 4:
        low, high = codes.reshape(len(codes), -1, 2, 4).unbind(2)
        codes = (low | (high << 4)).reshape(len(codes), -1)
    return codes.contiguous().view(torch.int32)


@dataclass
class Parameters(Mapping[str, Parameter]):
    """The tensors that are stored, by name in the file; a matrix in the tiles of its product.

    ``kind`` is the weight type asked for. Of a quantised program the last matrix, which makes the logits, keeps 8 bits,
    and gates with less than one output to ``NARROW`` inputs stay float32.
    """

    tiles: Tiles
    kind: str
    _stored: dict[str, Parameter] = field(default_factory=dict)
    _packed: dict[str, Parameter] = field(default_factory=dict)
    _quantised: set[str] = field(default_factory=set)
    _products: dict[Product, None] = field(default_factory=dict)

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
        rest = f"{len(self._packed)} matrices in float32, tiles of {self.tiles.default.columns} outputs"
        if not self._quantised:
            return rest
        last = ", the last in int8" if self.kind == "int4" else ""
        return f"{len(self._quantised)} matrices in {self.kind} (blocks of {BLOCK}{last}), {rest}"

    @property
    def products(self) -> tuple[Product, ...]:
        """The products that matrices were stored for, each once."""
        return tuple(self._products)

    def matrix(self, source: str, weight: Tensor, turned: bool, *, last: bool) -> list[Parameter]:
        """Store the matrix of a product, ``[out, in]`` or with ``turned`` ``[in, out]``, in tiles of its outputs.

        Returns one parameter of a float32 matrix; codes and scales, and of 4 bits zeros, of a quantised one.
        """
        out, into = map(int, weight.T.shape if turned else weight.shape)
        bits = 32
        if self.kind in BITS and out * NARROW >= into:
            bits = 8 if last or into % 2 else BITS[self.kind]
        product = Product(bits, out, into)
        self._products[product] = None
        tile = self.tiles.tile(product)
        matrix = _Matrix(weight, turned, tile.columns, tile.dots)
        name = f"{source}.turned" if turned else source
        if bits < 32:
            return self._add_quantised(f"{name}.q{bits}", matrix, bits)
        self._packed[name] = self._add(f"{name}.packed", torch.float32, matrix.shape(into), matrix.packed)
        return [self._packed[name]]

    def heads(self, source: str, weight: Tensor) -> Parameter:
        """Store a matrix ``[in, out]`` for each head, ``[H, in, out]``, in tiles of its outputs."""
        columns = columns_of(int(weight.shape[2]), self.tiles.default)
        matrices = [_Matrix(head, True, columns) for head in weight.detach()]
        shape = (len(matrices), *matrices[0].shape(int(weight.shape[1])))
        packed = lambda: torch.stack([matrix.packed() for matrix in matrices])  # noqa: E731
        return self._add(f"{source}.heads", torch.float32, shape, packed)

    def table(self, source: str, table: Tensor) -> Parameter:
        """Store a look-up table, or return the packed matrix where the same tensor is one: it is stored once."""
        return self._packed.get(source) or self.plain(source, table)

    def plain(self, source: str, tensor: Tensor) -> Parameter:
        """Store a tensor as it is, those of half precision in float32."""
        dtype = in_float32(tensor.dtype)
        return self._add(source, dtype, tuple(tensor.shape), lambda: tensor.detach().to(dtype))

    def _add_quantised(self, name: str, matrix: _Matrix, bits: int) -> list[Parameter]:
        self._quantised.add(name)
        into = matrix.sizes[1]
        blocks = -(-into // BLOCK)
        codes = (torch.int8 if bits == 8 else torch.uint8, into * bits // 8)
        parts = {
            "codes": (torch.int32, blocks * bits) if matrix.dots else codes,
            "scales": (torch.float32, blocks),
        }
        if bits == 4:
            parts["zeros"] = (torch.uint8, blocks)
        return [
            self._add(f"{name}.{part}", dtype, matrix.shape(inputs), partial(matrix.quantised, part, bits))
            for part, (dtype, inputs) in parts.items()
        ]

    def _add(self, source: str, dtype: torch.dtype, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Parameter:
        if source not in self._stored:
            self._stored[source] = Parameter(f"p{len(self._stored)}", source, dtype, shape, make)
        return self._stored[source]
