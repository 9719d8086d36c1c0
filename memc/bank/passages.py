"""Passages: the pieces of text that a bank's clusters are made of, kept with their embeddings in the bank."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from memc.data.sources import read_pieces
from memc.errors import MemcError

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

TEXT, ENDS, SOURCES, EMBEDDINGS, CLUSTERS = "text.bin", "ends.bin", "sources.bin", "embeddings.bin", "clusters.bin"
"""The files of the folder: UTF-8, where each passage ends in it, and of each passage source, embedding and clusters."""

_BREAKS = (re.compile(r"\n\s*\n"), re.compile(r"[.!?][\"')\]]*\s+"), re.compile(r"\s+"))


def cut(pieces: Iterable[str], size: int) -> Iterator[str]:
    """Cut a document, given in pieces, into passages of at most ``size`` characters, blank ones left out.

    A passage ends with a paragraph, else with a sentence, else with a word, in its second half; else where it is full.
    """
    held = ""
    for piece in pieces:
        held += piece
        while len(held) > size:
            stop = _stop(held[:size])
            if passage := held[:stop].strip():
                yield passage
            held = held[stop:]
    if passage := held.strip():
        yield passage


def _stop(text: str) -> int:
    for pattern in _BREAKS:
        stops = [match.end() for match in pattern.finditer(text, len(text) // 2)]
        if stops:
            return stops[-1]
    return len(text)


def write_passages(folder: Path, sources: Sequence[str], size: int) -> int:
    """Cut the documents of some sources into passages, write their text, and return how many there are.

    Raises ``MemcError`` as ``memc.data.read_pieces``.
    """
    count = end = 0
    with (folder / TEXT).open("wb") as text, (folder / ENDS).open("wb") as ends, (folder / SOURCES).open("wb") as from_:
        for number, source in enumerate(sources):
            for document in read_pieces(source):
                for passage in cut(document, size):
                    end += text.write(passage.encode())
                    ends.write(end.to_bytes(8, "little"))
                    from_.write(number.to_bytes(4, "little"))
                    count += 1
    return count


class Passages:
    """The passages of a bank, read from their folder as they are asked for."""

    def __init__(self, folder: Path, width: int, levels: int) -> None:
        """Map the files. Raises ``MemcError`` E310 when one is missing or their lengths do not fit together."""
        self.folder = folder
        self._ends = _mapped(folder / ENDS, "<i8", 1).reshape(-1)
        count = len(self._ends)
        self.sources = _mapped(folder / SOURCES, "<i4", 1).reshape(-1)
        self.embeddings: F32 = _mapped(folder / EMBEDDINGS, "<f4", width)
        self.clusters = _mapped(folder / CLUSTERS, "<i4", levels)
        size = (folder / TEXT).stat().st_size if (folder / TEXT).is_file() else -1
        lengths = {len(self.sources), len(self.embeddings), len(self.clusters)}
        if lengths != {count} or size != int(self._ends[-1]):
            raise MemcError("E310", "passages of the bank are incomplete", str(folder), "build it again")

    def __len__(self) -> int:
        """Return the number of passages."""
        return len(self._ends)

    def text(self, index: int) -> str:
        """Return the text of a passage."""
        start = int(self._ends[index - 1]) if index else 0
        with (self.folder / TEXT).open("rb") as stream:
            stream.seek(start)
            return stream.read(int(self._ends[index]) - start).decode()

    def members(self, level: int, number: int) -> I64:
        """Return the passages of a cluster, given by its place in its level, in order."""
        return np.flatnonzero(self.clusters[:, level] == number)

    def nearest(self, centroid: F32, members: I64, count: int) -> list[tuple[int, float]]:
        """Return the ``count`` of ``members`` nearest to a centroid, with their distances, the nearest first."""
        distances = np.linalg.norm(self.embeddings[members] - centroid, axis=1)
        order = np.argsort(distances, kind="stable")[:count]
        return [(int(members[i]), float(distances[i])) for i in order]


def texts(folder: Path, start: int, stop: int) -> list[str]:
    """Return the text of passages ``start`` to ``stop``, before anything else is known of them."""
    ends = np.fromfile(folder / ENDS, "<i8", stop - max(start - 1, 0), offset=8 * max(start - 1, 0))
    bounds = [0, *ends.tolist()] if start == 0 else ends.tolist()
    with (folder / TEXT).open("rb") as stream:
        stream.seek(bounds[0])
        data = stream.read(bounds[-1] - bounds[0])
    return [data[a - bounds[0] : b - bounds[0]].decode() for a, b in pairwise(bounds)]


def _mapped(path: Path, dtype: str, width: int) -> Any:
    row = np.dtype(dtype).itemsize * width
    size = path.stat().st_size if path.is_file() else 0
    if size == 0 or size % row:
        raise MemcError("E310", f"bank lacks a whole {path.name}", str(path.parent), "build it again")
    return np.memmap(path, dtype, "r").reshape(-1, width)
