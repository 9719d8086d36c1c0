"""Checkpoints as lazy named tensors, and loading them into a program one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memc.artifact import sha256
from memc.errors import MemcError
from memc.program import Program, Provenance, named_tensors

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_EXACT = tuple(dtype for dtype in _DTYPES.values() if not dtype.is_floating_point)
_MAX_HEADER = 100_000_000
"""The safetensors format's own limit."""


class Weights(ABC):
    """Named tensors of a checkpoint, read when asked for and never kept.

    Names are those of the file. ``source`` says where the checkpoint is, for messages.
    """

    source: str

    @abstractmethod
    def names(self) -> Sequence[str]:
        """Return every name, in the order of the files."""

    @abstractmethod
    def get(self, name: str) -> Tensor:
        """Read one tensor; raises ``KeyError`` for an unknown name and ``MemcError`` E302 for unreadable data."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, from the header alone."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that :meth:`get` will have, from the header alone."""

    @abstractmethod
    def files(self) -> Sequence[Path]:
        """Return the files that hold the tensors."""

    def provenance(self, name: str) -> Provenance:
        """Return where a tensor comes from."""
        return Provenance(name)

    def mapped(self, name: str) -> bool:
        """Tell whether :meth:`get` maps pages of the file, which take no memory of their own, instead of reading it."""
        return False

    def held_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of memory that a program of this floating dtype takes for what cannot stay in the files."""
        read = [n for n in self.names() if not self.mapped(n) or self.dtype(n) not in (dtype, *_EXACT)]
        return sum(math.prod(self.shape(name)) * dtype.itemsize for name in read)

    @property
    def digest(self) -> str:
        """Hex sha256 over the content of the files, kept per file as long as its size and time stay."""
        total = hashlib.sha256()
        for path in self.files():
            stat = path.stat()
            total.update(_file_digest(path.resolve(), stat.st_size, stat.st_mtime_ns).encode())
        return total.hexdigest()

    @property
    def main_dtype(self) -> torch.dtype:
        """Floating dtype that most of the checkpoint's values have; float32 when it has none."""
        counts: dict[torch.dtype, int] = {}
        for name in self.names():
            if self.dtype(name).is_floating_point:
                counts[self.dtype(name)] = counts.get(self.dtype(name), 0) + math.prod(self.shape(name))
        return max(counts, key=lambda kind: counts[kind], default=torch.float32)


@cache
def _file_digest(path: Path, size: int, modified: int) -> str:
    return sha256(path)


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


class SafetensorsWeights(Weights):
    """Tensors of one or more safetensors files; nothing but their headers is read before :meth:`get`.

    Raises ``MemcError`` E302 for a file that is unreadable, truncated or whose header does not add up.
    """

    def __init__(self, paths: Sequence[Path], source: str) -> None:
        """Read and check the headers of ``paths``."""
        self.source = source
        self._paths = tuple(paths)
        self._entries: dict[str, Entry] = {}
        for path in paths:
            self._entries.update(read_header(path))

    def names(self) -> Sequence[str]:
        """Return every name, in the order of the files."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype."""
        return self._entries[name].dtype

    def files(self) -> Sequence[Path]:
        """Return the safetensors files."""
        return self._paths

    def mapped(self, name: str) -> bool:
        """Tell whether :meth:`get` maps pages of the file: always."""
        return True

    def get(self, name: str) -> Tensor:
        """Map one tensor into memory; its pages are read on first use."""
        from safetensors import SafetensorError, safe_open

        entry = self._entries[name]
        try:
            with safe_open(entry.path, framework="pt") as file:
                value: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _corrupt(entry.path, f"tensor {name!r} cannot be read: {error}") from error
        return value


def read_header(path: Path) -> dict[str, Entry]:
    """Read the header of a safetensors file and check it against the file's size before anything is allocated."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8 or length > _MAX_HEADER:
                raise _corrupt(path, f"header says {length} bytes, the file has {size}")
            header = json.loads(file.read(length))
    except OSError as error:
        hint = "make the file readable"
        raise MemcError("E302", f"weights cannot be read: {error.strerror}", str(path), hint) from error
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, "header is not JSON") from error
    if not isinstance(header, dict):
        raise _corrupt(path, "header is not a JSON object")
    header.pop("__metadata__", None)
    data = size - 8 - length
    entries = {name: _entry(path, name, item, data) for name, item in header.items()}
    used = max((item["data_offsets"][1] for item in header.values()), default=0)
    if used != data:
        raise _corrupt(path, f"header describes {used} bytes of data, the file has {data}: truncated or changed")
    return entries


def _entry(path: Path, name: str, item: Any, data: int) -> Entry:
    try:
        kind, shape, (begin, end) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
        integers = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError) as error:
        raise _corrupt(path, f"header entry {name!r} is malformed") from error
    if kind not in _DTYPES:
        raise _corrupt(path, f"tensor {name!r} has dtype {kind!r}, which is not supported")
    dtype = _DTYPES[kind]
    if not integers or end - begin != math.prod(shape) * dtype.itemsize:
        raise _corrupt(path, f"tensor {name!r} does not fit its own shape")
    if end > data:
        raise _corrupt(path, f"tensor {name!r} ends at byte {end} of {data}: the file is truncated")
    return Entry(path, dtype, shape)


def _corrupt(path: Path, reason: str) -> MemcError:
    return MemcError("E302", reason, str(path), "get the file again; it is incomplete or not what its name says")


def open_safetensors(folder: Path) -> SafetensorsWeights | None:
    """Open ``model.safetensors`` or the shards of its index; None when a folder has neither.

    Raises ``MemcError`` E302 for a corrupt index or file and E301 for a missing shard.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file() and not single.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            paths = [folder / Path(name).name for name in names]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _corrupt(index, "index does not parse") from error
        for path in paths:
            if not path.is_file():
                raise MemcError("E301", f"shard {path.name} is missing", str(folder), "download the model again")
        return SafetensorsWeights(paths, str(folder))
    paths = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    return SafetensorsWeights(paths, str(folder)) if paths else None


class RenamedWeights(Weights):
    """Another checkpoint's tensors under a model's names.

    ``recipes`` gives for each model name the source names and what to do with their tensors; the transform's word goes
    into the provenance.
    """

    def __init__(self, base: Weights, recipes: Mapping[str, Recipe]) -> None:
        """Present ``base`` under the names of ``recipes``."""
        self.base = base
        self.source = base.source
        self.recipes = dict(recipes)

    def names(self) -> Sequence[str]:
        """Return the model's names."""
        return list(self.recipes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape after its transform."""
        recipe = self.recipes[name]
        return recipe.shape if recipe.shape is not None else self.base.shape(recipe.sources[0])

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype."""
        return self.base.dtype(self.recipes[name].sources[0])

    def files(self) -> Sequence[Path]:
        """Return the files of the checkpoint."""
        return self.base.files()

    def mapped(self, name: str) -> bool:
        """Tell whether a tensor is one of the files as it is, and mapped there."""
        recipe = self.recipes[name]
        return recipe.transform == "identity" and self.base.mapped(recipe.sources[0])

    def get(self, name: str) -> Tensor:
        """Read a tensor's sources and transform them."""
        recipe = self.recipes[name]
        return recipe.build([self.base.get(source) for source in recipe.sources])

    def provenance(self, name: str) -> Provenance:
        """Return where a tensor comes from."""
        recipe = self.recipes[name]
        origin = self.base.provenance(recipe.sources[0])
        if recipe.transform == "identity":
            return origin
        transform = recipe.transform if origin.transform == "identity" else f"{origin.transform},{recipe.transform}"
        return replace(origin, source=",".join(recipe.sources), transform=transform)


@dataclass(frozen=True)
class Recipe:
    """How one tensor of a model is made of a checkpoint's: ``build`` takes the tensors of ``sources`` in order."""

    sources: tuple[str, ...]
    transform: str = "identity"
    shape: tuple[int, ...] | None = None
    build: Callable[[list[Tensor]], Tensor] = field(default=lambda tensors: tensors[0])


def materialize(program: Program, weights: Weights, dtype: torch.dtype | None = None) -> Program:
    """Load a checkpoint into a captured program and return it; the program given keeps its fake parameters.

    Every parameter and persistent buffer is read once, tied names share one tensor, computed buffers keep their values.
    Floating tensors get the program's dtype, which is the checkpoint's own unless ``dtype`` asks for another.

    Raises ``MemcError`` E303 for a tensor that is missing, has another shape, or is of integers where the model has
    none, and E302 for unreadable data.
    """
    if dtype is not None and dtype != program_dtype(program):
        from memc.frontend.recast import recast

        program = recast(program, dtype)
    loaded = program.copy()
    available = set(weights.names())
    made: dict[int, nn.Parameter] = {}
    for name, old in list(named_tensors(loaded.module)):
        origin = program.provenance.get(name)
        if origin is None or not origin.source:
            continue
        if id(old) not in made:
            value = _checked(weights, available, origin.source, old).to(old.dtype)
            made[id(old)] = nn.Parameter(value, requires_grad=value.is_floating_point())
        _replace(loaded.module, name, made[id(old)])
        loaded.provenance[name] = weights.provenance(origin.source)
    return loaded


def check_names(weights: Weights, shapes: Mapping[str, tuple[int, ...]], required: Iterable[str]) -> None:
    """Compare a checkpoint with a model; ``shapes`` holds every name that the model knows, ``required`` those it needs.

    Raises ``MemcError`` E303 that names the tensor and both shapes.
    """
    available = set(weights.names())
    hint = "config.json and the weights belong to different models, or one of them was changed"
    for name in required:
        if name not in available:
            raise MemcError("E303", f"weights lack {name!r} {list(shapes[name])}", weights.source, hint)
    for name in weights.names():
        if name not in shapes:
            reason = f"weights hold {name!r} {list(weights.shape(name))}, which the configured model does not have"
            raise MemcError("E303", reason, weights.source, hint)
        if weights.shape(name) != shapes[name]:
            reason = f"{name!r} is {list(weights.shape(name))} in the weights and {list(shapes[name])} by configuration"
            raise MemcError("E303", reason, weights.source, hint)


def program_dtype(program: Program) -> torch.dtype:
    """Return the floating dtype that most of a program's parameters have."""
    counts: dict[torch.dtype, int] = {}
    for value in program.module.parameters():
        counts[value.dtype] = counts.get(value.dtype, 0) + value.numel()
    return max(counts, key=lambda kind: counts[kind], default=torch.float32)


def _checked(weights: Weights, available: set[str], name: str, like: Tensor) -> Tensor:
    if name not in available:
        raise MemcError("E303", f"weights lack {name!r} {list(like.shape)}", weights.source, "get the whole checkpoint")
    if weights.shape(name) != tuple(like.shape):
        reason = f"{name!r} is {list(weights.shape(name))} in the weights and {list(like.shape)} by configuration"
        raise MemcError("E303", reason, weights.source, "config.json and the weights belong to different models")
    check_kind(weights, name, like)
    return weights.get(name)


def check_kind(weights: Weights, name: str, like: Tensor) -> None:
    """Raise ``MemcError`` E303 for a tensor of integers where a model computes with others.

    What such a file means by them (a scale, codes of some quantisation) it does not say.
    """
    kind = weights.dtype(name)
    if like.is_floating_point() and not kind.is_floating_point:
        reason = f"{name!r} is {kind} in the weights, and of floating point in the model"
        hint = "get the checkpoint that is not quantised, or write it anew from the original"
        raise MemcError("E303", reason.replace("torch.", ""), weights.source, hint)


def _replace(module: nn.Module, name: str, value: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = value
    else:
        owner._buffers[leaf] = value.detach()
