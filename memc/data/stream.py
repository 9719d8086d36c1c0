"""Tokens of many documents as one stream."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class TokenStream:
    """Documents one after the other: token ids ``[N]``, and the index ``[D]`` at which each document starts.

    ``ids`` may be a memory map of a narrow type. ``name`` says where they are from, ``digest`` what they are.
    """

    name: str
    ids: npt.NDArray[np.integer]
    starts: npt.NDArray[np.int64]
    digest: str

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.ids)

    @classmethod
    def of(cls, documents: Sequence[npt.ArrayLike], name: str) -> TokenStream:
        """Make a stream of documents in memory, each ``[n]`` token ids; empty ones are left out."""
        arrays = [array for document in documents if len(array := np.asarray(document, np.int64))]
        ids = np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
        starts = np.cumsum([0, *map(len, arrays)])[:-1].astype(np.int64)
        return cls(name, ids, starts, hashlib.sha256(ids.tobytes() + starts.tobytes()).hexdigest())

    def documents(self) -> list[npt.NDArray[np.integer]]:
        """Return the documents apart."""
        return np.split(self.ids, self.starts[1:])
