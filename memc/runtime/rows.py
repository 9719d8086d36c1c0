"""Token ids as they are given, as rows that are checked, and cut into columns; numpy only."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from memc.artifact import Manifest
from memc.errors import MemcError

I64 = npt.NDArray[np.int64]
Ids = npt.NDArray[np.integer] | Sequence[int] | Sequence[Sequence[int]] | Sequence[npt.NDArray[np.integer]]
"""Token ids: ``[B,T]``, or one list a row, of any lengths, or the ids of a single row."""


def id_rows(ids: Ids, manifest: Manifest, folder: Path) -> list[I64]:
    """Return the ids as one array a row.

    Raises ``MemcError``: E208 for a model in ``folder`` that takes no tokens, E205 for no row, E200 for an id outside
    of the vocabulary, or what is no id.
    """
    if not any(port.role == "tokens" for port in manifest.inputs):
        hint = f"give by name: {', '.join(port.name for port in manifest.inputs)}"
        raise MemcError("E208", f"{manifest.family} takes no tokens", str(folder), hint)
    require_list(ids)
    single = len(ids) > 0 and np.ndim(ids[0]) == 0
    rows = [_whole(row) for row in ([ids] if single else ids)]
    if not rows:
        raise MemcError("E205", "there are no tokens")
    limit = manifest.vocab_size
    for index, row in enumerate(rows):
        bad = row[(row < 0) | (row >= (np.iinfo(np.int64).max if limit is None else limit))]
        if len(bad):
            size = "" if limit is None else f" of {limit} tokens"
            raise MemcError("E200", f"token id {bad[0]} in row {index} is outside of the vocabulary{size}")
    return rows


def require_list(ids: Any) -> None:
    """Raise ``MemcError`` E200 for what cannot be a list of token ids, or of rows of them."""
    if isinstance(ids, str | bytes) or not isinstance(ids, Sized) or getattr(ids, "ndim", 1) == 0:
        raise MemcError("E200", "token ids are whole numbers, a list for each row", repr(ids)[:40])


def _whole(row: Any) -> I64:
    """Return a row of ids as integers. Raises ``MemcError`` E200 for what is none, or a row of rows."""
    array = np.asarray(row)
    if array.size and (array.dtype.kind not in "iu" or array.ndim != 1):
        raise MemcError(
            "E200", f"token ids are whole numbers, a list for each row, and no {array.dtype}", repr(row)[:40]
        )
    return array.astype(np.int64).reshape(-1)


def full_rows(ids: Ids, manifest: Manifest, folder: Path) -> list[I64]:
    """Return the ids as :func:`id_rows` does; raises ``MemcError`` E205 for an empty row too."""
    rows = id_rows(ids, manifest, folder)
    if not all(map(len, rows)):
        raise MemcError("E205", f"row {[len(row) for row in rows].index(0)} has no tokens")
    return rows


def columns(rows: Sequence[I64], lengths: I64, start: int, stop: int) -> tuple[I64, I64]:
    """Return tokens and positions ``[B, stop - start]`` of some columns; padding, at position -1, is on the right."""
    tokens = np.zeros((len(rows), stop - start), np.int64)
    positions = np.full_like(tokens, -1)
    for index, row in enumerate(rows):
        piece = row[start:stop]
        tokens[index, : len(piece)] = piece
        positions[index, : len(piece)] = lengths[index] + start + np.arange(len(piece))
    return tokens, positions
