"""Reading text files and tokenising them once, for everything that uses text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from memc.errors import MemcError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PIECE = 1 << 18
"""Most characters tokenised in one call: it bounds the memory, and the work beyond a limit on tokens."""


def read_documents(path: str | Path) -> Iterator[str]:
    """Yield the documents of a file: each line's ``text`` field of a ``.jsonl`` file, else the whole file.

    Empty documents are left out. Raises ``MemcError`` E207 when the file is missing, empty, binary, not UTF-8, or a
    line of it is no JSON object with a text.
    """
    path = Path(path)
    text = _read(path)
    if path.suffix.lower() != ".jsonl":
        if not text.strip():
            raise MemcError("E207", "text file is empty", str(path))
        yield text
        return
    found = False
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip() and (document := _document(line, f"{path}:{number}")):
            found = True
            yield document
    if not found:
        raise MemcError("E207", "file holds no text", str(path))


def tokenize(files: Sequence[str | Path], tokenizer: Tokenizer, *, limit: int | None = None) -> npt.NDArray[np.int64]:
    """Return the token ids ``[N]`` of the documents of some files, one after the other, at most ``limit`` of them.

    Each document starts (and ends) with the special tokens that the tokenizer adds to a text. A document longer than
    ``PIECE`` characters is tokenised in pieces cut after a line end. Raises ``MemcError`` E207 as ``read_documents``.
    """
    pieces: list[npt.NDArray[np.int64]] = []
    count = 0
    for ids in _token_pieces(files, tokenizer):
        pieces.append(ids)
        count += len(ids)
        if limit is not None and count >= limit:
            break
    return np.concatenate(pieces)[:limit] if pieces else np.zeros(0, np.int64)


def _token_pieces(files: Sequence[str | Path], tokenizer: Tokenizer) -> Iterator[npt.NDArray[np.int64]]:
    for file in files:
        for document in read_documents(file):
            if len(document) <= PIECE:
                yield np.array(tokenizer.encode(document).ids, np.int64)
                continue
            # What a text starts and ends with must not come again at every cut.
            empty = tokenizer.encode("")
            whole = tokenizer.encode("a")
            ids = np.array(empty.ids, np.int64)
            first = next((n for n, mark in enumerate(whole.special_tokens_mask) if not mark), 0)
            yield ids[:first]
            for piece in _pieces(document):
                yield np.array(tokenizer.encode(piece, add_special_tokens=False).ids, np.int64)
            yield ids[first:]


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        stop = min(start + PIECE, len(text))
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop


def _document(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise MemcError("E207", f"line is not JSON: {error}", where) from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise MemcError("E207", "line is no object with a 'text' string", where, 'write {"text": "..."} on each line')
    return text


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise MemcError("E207", f"text file cannot be read: {reason}", str(path), "check the path") from error
    if b"\0" in data:
        raise MemcError("E207", "file is binary, not text", str(path), "give a UTF-8 text or .jsonl file")
    try:
        # Line ends as text mode reads them, and no byte order mark.
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        what = f"file is not UTF-8 (byte {error.start})"
        raise MemcError("E207", what, str(path), "convert it, for example with iconv -t UTF-8") from error
