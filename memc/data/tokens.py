"""From text to token ids, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from memc.data.ids import holds_ids, read_ids
from memc.data.sources import PIECE, read_pieces, require_limit

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Ids = npt.NDArray[np.int64]

BATCH = 8 * PIECE
"""Characters after which a batch is tokenised."""


def tokenize(files: Sequence[str | Path], tokenizer: Tokenizer | None, *, limit: int | None = None) -> Ids:
    """Return the token ids ``[N]`` of the documents of some files, one after the other, at most ``limit`` of them.

    Each document starts (and ends) with the special tokens that the tokenizer adds to a text. A document longer than
    ``PIECE`` characters is tokenised in pieces cut after a line end. Files of token ids are taken as they are, and
    need no tokenizer. Raises ``MemcError`` as ``read_pieces`` and ``read_ids``.
    """
    for file in files:
        require_limit(file, limit)
    pieces: list[Ids] = []
    count = 0
    for ids, _ in (part for file in files for part in token_pieces(file, tokenizer)):
        pieces.append(ids)
        count += len(ids)
        if limit is not None and count >= limit:
            break
    return np.concatenate(pieces)[:limit] if pieces else np.zeros(0, np.int64)


def token_pieces(source: str | Path, tokenizer: Tokenizer | None) -> Iterator[tuple[Ids, bool]]:
    """Yield the token ids of a source piece by piece, and whether a document starts with the piece."""
    if holds_ids(source):
        yield from ((row.astype(np.int64), True) for row in read_ids(source))
        return
    assert tokenizer is not None, "text needs a tokenizer"
    before, after = ends(tokenizer)
    starts = False
    for batch in _batches(_marked(read_pieces(source))):
        encoded = tokenizer.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
        for piece, encoding in zip(batch, encoded, strict=True):
            ids = [*(before if piece.first else ()), *encoding.ids, *(after if piece.last else ())]
            starts = starts or piece.first
            if ids:
                yield np.array(ids, np.int64), starts
                starts = False


class _Piece(NamedTuple):
    text: str
    first: bool
    last: bool


def ends(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the special tokens that a text starts and ends with: they must not come again at every cut."""
    marks = tokenizer.encode("").ids
    mask = tokenizer.encode("a").special_tokens_mask
    before = next((n for n, mark in enumerate(mask) if not mark), 0)
    return marks[:before], marks[before:]


def _marked(documents: Iterable[Iterator[str]]) -> Iterator[_Piece]:
    for document in documents:
        first, text = True, next(document, None)
        while text is not None:
            following = next(document, None)
            yield _Piece(text, first, following is None)
            first, text = False, following


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Gather what is tokenised at once, on all cores: little at first, for those who want only the first tokens."""
    batch: list[_Piece] = []
    size, most = 0, PIECE // 2
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= most:
            yield batch
            batch, size, most = [], 0, min(2 * most, BATCH)
    if batch:
        yield batch
