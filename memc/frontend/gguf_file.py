"""Read a GGUF file's metadata and tensor directory, checking every length against the file before it is used."""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memc.errors import MemcError
from memc.program import Provenance
from memc.weights import Weights

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: ``shape`` as torch has it, ``kind`` ggml's name of its encoding, ``offset`` from the file's start."""

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int
    size: int


@dataclass(frozen=True)
class GgufFile:
    """Metadata and tensor directory of a GGUF file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


class _Reader:
    """A cursor over the file's bytes that never reads past their end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def corrupt(self, reason: str) -> MemcError:
        return MemcError("E302", f"GGUF file is corrupt or truncated: {reason}", str(self.path), "get the file again")

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise self.corrupt(f"byte {self.at} wants {size} bytes, {len(self.data) - self.at} are left")
        self.at += size
        return self.data[self.at - size : self.at]

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or depth > 3:
            raise self.corrupt(f"metadata type {kind} at byte {self.at}")
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner in _SCALARS:
            code = _SCALARS[inner]
            return list(struct.unpack(f"<{count}{code}", self.take(self.bounded(count, struct.calcsize(code)))))
        return [self.value(inner, depth + 1) for _ in range(self.bounded(count, 8) // 8)]

    def bounded(self, count: int, size: int) -> int:
        """Return ``count * size`` if that many bytes are left."""
        if count * size > len(self.data) - self.at:
            raise self.corrupt(f"byte {self.at} says {count} items follow")
        return count * size


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file of version 2 or 3, little endian.

    Raises ``MemcError`` E302 for anything that does not add up, before memory is allocated for it.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Reader(data, path), path)
    except (OSError, ValueError, struct.error) as error:
        raise MemcError("E302", f"GGUF file cannot be read: {error}", str(path), "get the file again") from error


def _read(reader: _Reader, path: Path) -> GgufFile:
    if reader.take(4) != b"GGUF":
        raise reader.corrupt("it does not start with GGUF")
    version = reader.scalar("I")
    if version not in (2, 3):
        raise reader.corrupt(f"version {version}; 2 and 3 are known")
    tensor_count, pair_count = reader.scalar("Q"), reader.scalar("Q")
    reader.bounded(tensor_count, 24)
    reader.bounded(pair_count, 13)
    metadata = {}
    for _ in range(pair_count):
        key = reader.text()
        metadata[key] = reader.value(reader.scalar("I"))
    raw = [_directory_entry(reader) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment > 1 << 20:
        raise reader.corrupt(f"alignment {alignment}")
    start = -(-reader.at // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in raw:
        size = _encoded_size(reader, name, shape, kind)
        if start + offset + size > len(reader.data):
            end = start + offset + size
            raise reader.corrupt(f"tensor {name!r} ends at byte {end}, the file at {len(reader.data)}")
        tensors[name] = GgufTensor(name, shape, kind, start + offset, size)
    return GgufFile(path, metadata, tensors)


def _directory_entry(reader: _Reader) -> tuple[str, tuple[int, ...], str, int]:
    from gguf import GGMLQuantizationType

    name, rank = reader.text(), reader.scalar("I")
    if rank > 4:
        raise reader.corrupt(f"tensor {name!r} has {rank} axes")
    shape = tuple(reversed([reader.scalar("Q") for _ in range(rank)]))
    code = reader.scalar("I")
    if code not in set(GGMLQuantizationType):
        raise reader.corrupt(f"tensor {name!r} has encoding {code}")
    return name, shape, GGMLQuantizationType(code).name, reader.scalar("Q")


def _encoded_size(reader: _Reader, name: str, shape: tuple[int, ...], kind: str) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    count = math.prod(shape)
    if not shape or count == 0 or shape[-1] % block:
        raise reader.corrupt(f"tensor {name!r} {list(shape)} does not fit encoding {kind}")
    return int(count // block * size)


class GgufWeights(Weights):
    """Tensors of a GGUF file under its own names, dequantised to float32 one at a time; F16 and BF16 stay."""

    def __init__(self, file: GgufFile) -> None:
        """Present the tensors of ``file``."""
        self.file = file
        self.source = str(file.path)

    def names(self) -> Sequence[str]:
        """Return the file's names."""
        return list(self.file.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self.file.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype after dequantisation."""
        return _PLAIN.get(self.file.tensors[name].kind, torch.float32)

    def files(self) -> Sequence[Path]:
        """Return the one file."""
        return [self.file.path]

    def provenance(self, name: str) -> Provenance:
        """Return where a tensor comes from; a quantised one cannot be had back exactly."""
        plain = self.file.tensors[name].kind in _PLAIN
        return Provenance(name) if plain else Provenance(name, "dequantize", invertible=False)

    def get(self, name: str) -> Tensor:
        """Read and dequantise one tensor; raises ``MemcError`` E302 for an encoding that gguf cannot decode."""
        import numpy as np
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        entry = self.file.tensors[name]
        with self.file.path.open("rb") as stream:
            stream.seek(entry.offset)
            data = bytearray(stream.read(entry.size))
        if len(data) != entry.size:
            raise MemcError("E302", f"tensor {name!r} is cut off", self.source, "get the file again")
        if entry.kind in _PLAIN:
            return torch.frombuffer(data, dtype=_PLAIN[entry.kind]).view(entry.shape)
        rows = np.frombuffer(data, dtype=np.uint8).reshape(*entry.shape[:-1], -1)
        try:
            values = dequantize(rows, GGMLQuantizationType[entry.kind])
        except NotImplementedError as error:
            raise MemcError("E302", f"encoding {entry.kind} of {name!r} cannot be decoded", self.source) from error
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).view(entry.shape)
