"""The sentence encoder of a bank: a converted encoder, and how its vectors of tokens become one of a text. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from memc.data.tokens import ends
from memc.errors import MemcError
from memc.runtime import load

F32 = npt.NDArray[np.float32]

Pooling = Literal["mean", "cls", "max"]


class EncoderFacts(BaseModel):
    """What a bank's encoder is: where it is from, and how it makes one vector of a text.

    ``limit`` is the most tokens it reads at once, its special tokens included; ``normalize`` gives vectors of length 1.
    """

    model_config = ConfigDict(extra="forbid")

    source: str
    digest: str
    width: int
    limit: int
    pooling: Pooling = "mean"
    normalize: bool = True


class Encoder:
    """An encoder that is ready to run."""

    def __init__(self, folder: Path, facts: EncoderFacts, *, threads: int | None = None) -> None:
        """Load the artifact in ``folder``.

        Raises ``MemcError`` as ``memc.load``, and E310 when the artifact is not the one of ``facts``.
        """
        self.facts = facts
        self.session = load(folder, threads=threads)
        if self.session.manifest.source_digest != facts.digest:
            raise MemcError(
                "E310", "encoder is not the one that the bank was built with", str(folder), "build it again"
            )

    @cached_property
    def _ends(self) -> tuple[list[int], list[int]]:
        return ends(self.session.text.tokenizer)

    def encode(self, texts: Sequence[str], *, blank: bool = False) -> F32:
        """Return one vector a text, ``[N, width]``. A text past the limit is the mean of its parts, by their tokens.

        With ``blank`` a text without tokens, like one of invisible characters alone, gets the vector of the tokens that
        start and end every text, zeros where there are none. Raises ``MemcError``: E205 such a text otherwise, E310 the
        model gives vectors of another width, E403 vectors that are not finite.
        """
        before, after = self._ends
        room = self.facts.limit - len(before) - len(after)
        rows: list[list[int]] = []
        owners: list[int] = []
        for number, text in enumerate(texts):
            ids = self.session.text.encode(text, special=False)
            if not ids and not blank:
                raise MemcError("E205", "the text has no tokens that the encoder knows", next="give at least one word")
            if not ids and not (before or after):
                continue
            for start in range(0, len(ids) or 1, room):
                rows.append([*before, *ids[start : start + room], *after])
                owners.append(number)
        vectors = self._pooled(rows)
        weights = np.array([len(row) for row in rows], np.float32)[:, None]
        sums = np.zeros((len(texts), vectors.shape[1]), np.float32)
        at = np.array(owners, np.int64)
        np.add.at(sums, at, vectors * weights)
        counts = np.zeros((len(texts), 1), np.float32)
        np.add.at(counts, at, weights)
        counts[counts == 0] = 1
        return self._scaled(sums / counts)

    def _pooled(self, rows: list[list[int]]) -> F32:
        lengths = np.array([len(row) for row in rows])
        vectors = np.zeros((len(rows), self.facts.width), np.float32)
        for length in np.unique(lengths):
            chosen = np.flatnonzero(lengths == length)
            tokens = self.session.logits([rows[i] for i in chosen])
            if tokens.ndim != 3 or tokens.shape[2] != self.facts.width:
                reason = f"encoder gives {list(tokens.shape[1:])}, not vectors of {self.facts.width}"
                raise MemcError("E310", reason, str(self.session.folder), "build the bank again")
            match self.facts.pooling:
                case "mean":
                    vectors[chosen] = tokens.mean(axis=1)
                case "cls":
                    vectors[chosen] = tokens[:, 0]
                case "max":
                    vectors[chosen] = tokens.max(axis=1)
        if not np.isfinite(vectors).all():
            raise MemcError("E403", "encoder gives values that are not finite", str(self.session.folder))
        return self._scaled(vectors)

    def _scaled(self, vectors: F32) -> F32:
        if not self.facts.normalize:
            return vectors
        scaled: F32 = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return scaled
