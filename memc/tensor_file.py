"""Safetensors files: written one tensor at a time, read by mapping, without pickle."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from memc.errors import MemcError
from memc.partial import writing

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class LateTensor:
    """A tensor whose values ``make`` returns when they are written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def write_tensors(path: Path, tensors: Mapping[str, Tensor | LateTensor]) -> None:
    """Write ``tensors`` in the safetensors format, holding at most one contiguous copy at a time.

    Wide types come first, then by name, so that every tensor is aligned and equal tensors give equal bytes.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        value = tensors[name]
        start, end = end, end + math.prod(value.shape) * value.dtype.itemsize
        header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # The tensors may be mapped from the file that this one takes the place of.
    with writing(path) as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for name in order:
            given = tensors[name]
            value = (given.make() if isinstance(given, LateTensor) else given).detach().contiguous().cpu()
            if value.numel():
                stream.write(value.reshape(-1).view(torch.uint8).numpy().data)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Map every tensor of a safetensors file; pages are read when used.

    Raises ``MemcError`` E309 when the file is missing, truncated or malformed.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise MemcError(
            "E309", f"parameter file does not read: {error}", str(path), "convert the model again"
        ) from error
