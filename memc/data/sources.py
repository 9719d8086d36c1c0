"""Where text comes from: plain text, ``.jsonl`` and ``.parquet`` files, and data sets of the Hugging Face hub."""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from memc.artifact import sha256
from memc.errors import MemcError

PIECE = 1 << 18
"""Most characters tokenised in one call: it bounds the memory, and the work beyond a limit on tokens."""

COLUMN = "text"
"""The field of a record that holds its text."""

_BLOCK = 1 << 20
_HUB = re.compile(r"hub:(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<split>[^:]+))?(:(?P<column>[^:]+))?")
_INSTALL = "pip install 'memc[data]'"


def read_documents(source: str | Path) -> Iterator[str]:
    """Yield the documents of a source, each whole. Sources and errors are those of ``read_pieces``."""
    return map("".join, read_pieces(source))


def read_pieces(source: str | Path) -> Iterator[Iterator[str]]:
    """Yield the documents of a source, each as pieces of at most ``PIECE`` characters cut after a line end.

    A source is a file or ``hub:org/name[:split[:column]]`` (the split ``train`` unless said, streamed). Each record of
    a ``.jsonl`` or ``.parquet`` file or of the hub is a document, the string in its column ``text``; any other file is
    one document. Empty documents are left out. A document's pieces have to be used before the next document's.

    Raises ``MemcError``: E207 when the source is missing, empty, binary, not UTF-8, damaged, or has a record without a
    text; E602 when the library that reads it is not installed.
    """
    if is_hub(source):
        return _records(_hub(str(source)), str(source))
    path = Path(source)
    match kind(path):
        case "jsonl":
            return _records(_jsonl(path), str(path))
        case "parquet":
            return _records(_parquet(path), str(path))
        case _:
            return iter([_plain(path)])


def kind(path: Path) -> str:
    """Return how a file is read: jsonl, parquet, npy (see ``memc.data.ids``) or text."""
    suffix = path.suffix.lower().removeprefix(".")
    return suffix if suffix in ("jsonl", "parquet", "npy") else "text"


def is_hub(source: str | Path) -> bool:
    """Tell whether a source names a data set of the hub."""
    return isinstance(source, str) and source.startswith("hub:")


def require_limit(source: str | Path, limit: int | None) -> None:
    """Raise ``MemcError`` E207 when a data set of the hub, which has no known end, is to be read to its end."""
    if is_hub(source) and limit is None:
        raise MemcError("E207", "data of the hub need a limit", str(source), "say how many tokens with --tokens N")


def require_file(source: str | Path) -> None:
    """Raise ``MemcError`` E207 when a source that is no data set of the hub is no file either."""
    path = Path(source)
    if not is_hub(source) and not path.is_file():
        reason = (
            "data file is no regular file" if path.exists() else "data file cannot be read: No such file or directory"
        )
        raise MemcError("E207", reason, str(path), "check the path")


def source_digest(source: str | Path) -> str:
    """Return a digest of what a source holds and how it is read: of a file's bytes, or the commit of a data set.

    Raises ``MemcError`` as ``read_pieces``, and E207 for what is no regular file.
    """
    if is_hub(source):
        return digest_of([str(source), str(_builder(_parse(str(source))["name"]).hash)])
    require_file(source)
    path = Path(source)
    try:
        return digest_of([kind(path), sha256(path)])
    except OSError as error:
        raise unreadable(path, error) from error


def digest_of(facts: object) -> str:
    """Return the sha256 of some facts that JSON can hold."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _records(texts: Iterable[str], where: str) -> Iterator[Iterator[str]]:
    found = False
    for text in texts:
        if text:
            found = True
            yield _cut(text[start : start + PIECE] for start in range(0, len(text), PIECE))
    if not found:
        raise MemcError("E207", "data hold no text", where, "give data with text in them")


def _plain(path: Path) -> Iterator[str]:
    blank = True
    for piece in _cut(_characters(path)):
        blank = blank and not piece.strip()
        yield piece
    if blank:
        raise MemcError("E207", "text file is empty", str(path), "give a file with text in it")


def _jsonl(path: Path) -> Iterator[str]:
    return (_field(line, where) for line, where in read_lines(path))


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the lines of a file of JSON lines that are not blank, and where each is; only line feeds end one.

    Raises ``MemcError`` E207 when the file is missing, binary or not UTF-8.
    """
    for number, line in enumerate(_lines(_characters(path)), start=1):
        if line.strip():
            yield line, f"{path}:{number}"


def _field(line: str, where: str) -> str:
    hint = f'write {{"{COLUMN}": "..."}} on each line'
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MemcError("E207", f"line is not JSON: {error}", where, hint) from error
    text = record.get(COLUMN) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise MemcError("E207", f"line is no object with a {COLUMN!r} string", where, hint)
    return _encodable(text, where)


def _parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MemcError("E602", "reading .parquet files needs pyarrow", str(path), _INSTALL) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if COLUMN not in (names := file.schema_arrow.names):
                raise _no_column(COLUMN, names, str(path), f"rename the column that holds the text to {COLUMN!r}")
            for batch in file.iter_batches(batch_size=256, columns=[COLUMN]):
                for text in batch.column(0).to_pylist():
                    yield _string(text, COLUMN, str(path))
    except OSError as error:
        raise unreadable(path, error) from error
    except pyarrow.ArrowException as error:
        raise MemcError("E207", f"parquet file is damaged: {error}", str(path), "write or fetch it again") from error


def _hub(source: str) -> Iterator[str]:
    match = _parse(source)
    split, column = match["split"] or "train", match["column"] or COLUMN
    builder = _builder(match["name"])
    try:
        for record in builder.as_streaming_dataset(split=split):
            if column not in record:
                raise _no_column(column, list(record), source, f"name it: hub:{match['name']}:{split}:COLUMN")
            yield _string(record[column], column, source)
    except (OSError, ValueError) as error:
        raise _hub_error(source, error) from error


@lru_cache(maxsize=8)
def _builder(name: str) -> Any:
    """Return what reads a data set: one object a process, so that all of it is read at one commit."""
    try:
        from datasets import load_dataset_builder
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise MemcError("E602", "data sets of the hub need the datasets library", f"hub:{name}", _INSTALL) from error
    try:
        return load_dataset_builder(name)
    except (DatasetsError, OSError, ValueError) as error:
        raise _hub_error(f"hub:{name}", error) from error


def _parse(source: str) -> re.Match[str]:
    if (match := _HUB.fullmatch(source)) is None:
        raise MemcError("E207", f"no name of a data set: {source!r}", next="write hub:org/name[:split[:column]]")
    return match


def _string(value: object, column: str, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        reason = f"column {column!r} holds {type(value).__name__}, not strings"
        raise MemcError("E207", reason, where, "give a column of strings")
    return _encodable(value, where)


def _encodable(text: str, where: str) -> str:
    """Return a text that UTF-8 can hold: JSON may escape half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        reason = f"text has half of a surrogate pair (U+{ord(text[error.start]):04X} at character {error.start})"
        raise MemcError("E207", reason, where, "write the whole character, or U+FFFD in its place") from error
    return text


def _no_column(column: str, names: list[str], where: str, hint: str) -> MemcError:
    return MemcError("E207", f"data have no column {column!r} but {', '.join(names)}", where, hint)


def _hub_error(source: str, error: Exception) -> MemcError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    hint = "check the name, the split and the connection; HF_TOKEN opens private data"
    return MemcError("E207", f"data set cannot be read: {reason}", source, hint)


def _cut(chunks: Iterable[str]) -> Iterator[str]:
    held = ""
    for chunk in chunks:
        held += chunk
        while len(held) > PIECE:
            stop = held.rfind("\n", 0, PIECE) + 1 or PIECE
            yield held[:stop]
            held = held[stop:]
    if held:
        yield held


def _lines(chunks: Iterable[str]) -> Iterator[str]:
    held = ""
    for chunk in chunks:
        *lines, held = (held + chunk).split("\n")
        yield from lines
    yield held


def _characters(path: Path) -> Iterator[str]:
    """Yield a UTF-8 file in parts, with line ends as text mode reads them and no byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line_ends = io.IncrementalNewlineDecoder(None, translate=True)
    place = 0
    for block in _blocks(path):
        if place == 0 and block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise MemcError("E207", "file is UTF-16, not UTF-8", str(path), "convert it: iconv -f UTF-16 -t UTF-8")
        if b"\0" in block:
            raise MemcError("E207", "file is binary, not text", str(path), "give a UTF-8 text or .jsonl file")
        waiting = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            what = f"file is not UTF-8 (byte {place - waiting + error.start})"
            hint = "convert it, for example with iconv -t UTF-8"
            raise MemcError("E207", what, str(path), hint) from error
        yield line_ends.decode(text.removeprefix("\ufeff") if place == 0 else text, final=not block)
        place += len(block)


def _blocks(path: Path) -> Iterator[bytes]:
    """Yield a file in blocks; the last one is empty."""
    try:
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK):
                yield block
            yield b""
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> MemcError:
    """Return the error of a file that the system does not give."""
    reason = error.strerror or str(error)
    return MemcError("E207", f"data file cannot be read: {reason}", str(path), "check the path")
