"""Tables that may not fit into memory: mapped, so that a row is read when a token asks for it."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from memc import machine
from memc.artifact import Table
from memc.runtime.slots import Array


def too_large(folder: Path, tables: Sequence[Table]) -> bool:
    """Tell whether the files that hold ``tables`` take more than half of the memory that this process may use.

    Where they fit after all, reading row by row costs some time until every row has been read once; where they do not,
    reading ahead makes every token several times slower, for good.
    """
    memory = machine.memory_bytes()
    size = sum((folder / name).stat().st_size for name in {table.file for table in tables})
    return memory is not None and size > memory / 2 and hasattr(mmap, "MADV_RANDOM")


def map_rows(folder: Path, tables: Sequence[Table], options: onnxruntime.SessionOptions) -> list[tuple[Array, Any]]:
    """Have a session read ``tables`` by the page that a row is on, and return what must live as long as it does.

    The runtime maps its weights by itself, but a system that reads ahead fetches many pages for one of them, and would
    drop others for that. What was read stays as long as there is memory for it.
    """
    held = []
    for table in tables:
        with (folder / table.file).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped.madvise(mmap.MADV_RANDOM)
        kind, count = np.dtype(table.dtype), int(np.prod(table.shape))
        array = np.frombuffer(mapped, kind, count, table.offset).reshape(table.shape)
        value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        options.add_initializer(table.name, value)
        held.append((array, value))
    return held
