"""Tokens kept on disk: a source is tokenised once, and mapped into memory from then on.

One file an entry: a header of JSON padded with spaces, the token ids in the narrowest type that holds the vocabulary,
then the index at which each document starts. It is written under another name and renamed, so that a kill leaves no
half entry; it is read only if its length and its digest are what the header says.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

import numpy as np
import tokenizers
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memc.data.ids import holds_ids, id_stream
from memc.data.sources import PIECE, digest_of, require_limit, source_digest
from memc.data.stream import TokenStream
from memc.data.tokens import token_pieces
from memc.errors import MemcError
from memc.machine import cache_folder
from memc.progress import Progress, Silent

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HEADER = 4096
"""Bytes of the header: the token ids after it are aligned to a page."""

_SCHEMA: Literal["memc.tokens/1"] = "memc.tokens/1"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_STALE = 24 * 3600


class Header(BaseModel):
    """What an entry says of itself; ``sha256`` is of everything after the header."""

    model_config = ConfigDict(extra="forbid")

    schema_: Literal["memc.tokens/1"] = Field(default=_SCHEMA, alias="schema")
    key: str
    dtype: Literal["<u2", "<u4"]
    tokens: int
    documents: int
    sha256: str

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return HEADER + self.tokens * np.dtype(self.dtype).itemsize + self.documents * 8


def token_cache() -> Path:
    """Return ``$XDG_CACHE_HOME/memc/tokens``."""
    return cache_folder() / "tokens"


def read_tokens(
    source: str | Path,
    tokenizer: Tokenizer | None,
    *,
    limit: int | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> TokenStream:
    """Return the tokens of a source, at most ``limit``, from the cache ``folder`` (``token_cache()`` by default).

    Entries are keyed by the content of the source, the tokenizer and the limit. Where the folder cannot be written,
    the tokens go into a temporary file that ends with the process. Sources: see ``read_pieces``; one of the hub needs
    a limit. Files of token ids need neither tokenizer nor cache. Raises ``MemcError``: E207 and E602 as
    ``read_pieces`` and ``read_ids``, E502 when the disk is full.
    """
    if holds_ids(source):
        return id_stream(source, limit)
    assert tokenizer is not None, "text needs a tokenizer"
    folder, progress = folder or token_cache(), progress or Silent()
    require_limit(source, limit)
    key = _key(source, tokenizer, limit)
    path = folder / f"{key}.tokens"
    if path.exists():
        if (found := _open(path, key, str(source))) is not None:
            return found
        progress.note(f"{path} is damaged; tokenising {source} again")
    with _unfinished(path, progress) as (stream, name):
        _write(stream, source, tokenizer, limit, key, progress)
        if name.parent == folder:
            name.replace(path)
            name = path
        made = _open(name, key, str(source))
    if made is None:
        raise MemcError("E402", "tokens read back differ from those written", str(name), "check the disk")
    return made


def _key(source: str | Path, tokenizer: Tokenizer, limit: int | None) -> str:
    code = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    return digest_of([_SCHEMA, PIECE, tokenizers.__version__, code, limit, source_digest(source)])[:32]


@contextmanager
def _unfinished(path: Path, progress: Progress) -> Iterator[tuple[IO[bytes], Path]]:
    """Enter a new file beside ``path``, or a temporary one; whatever is left under its name at the end goes."""
    place = path.parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        _sweep(place)
        handle, name = tempfile.mkstemp(prefix=f"{path.stem}.", suffix=".partial", dir=place)
    except OSError as error:
        if error.errno in _FULL:
            raise _full(place) from error
        place = Path(tempfile.gettempdir())
        progress.note(f"{path.parent} cannot be written ({error.strerror}); tokens go to {place} for this run")
        handle, name = tempfile.mkstemp(prefix="memc-", suffix=".tokens", dir=place)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream, Path(name)
    except OSError as error:
        if error.errno in _FULL:
            raise _full(place) from error
        raise
    finally:
        # A file that is mapped stays until the mapping ends.
        Path(name).unlink(missing_ok=True)


def _write(
    stream: IO[bytes], source: str | Path, tokenizer: Tokenizer, limit: int | None, key: str, progress: Progress
) -> None:
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    dtype: Literal["<u2", "<u4"] = "<u2" if largest < 1 << 16 else "<u4"
    digest, count, starts = hashlib.sha256(), 0, array("q")
    stream.write(b" " * HEADER)
    with progress.step(f"tokenising {source}", limit) as advance:
        for ids, start in token_pieces(source, tokenizer):
            if start:
                starts.append(count)
            data = ids[: None if limit is None else limit - count].astype(dtype)
            stream.write(data.tobytes())
            digest.update(data.tobytes())
            count += len(data)
            advance(len(data))
            if count == limit:
                break
    if not count:
        raise MemcError("E207", "data give no tokens", str(source), "give data with text in them")
    tail = np.array(starts, "<i8").tobytes()
    stream.write(tail)
    digest.update(tail)
    header = Header(key=key, dtype=dtype, tokens=count, documents=len(starts), sha256=digest.hexdigest())
    stream.seek(0)
    stream.write(header.model_dump_json(by_alias=True).encode().ljust(HEADER))
    stream.flush()
    os.fsync(stream.fileno())


def _open(path: Path, key: str, name: str) -> TokenStream | None:
    """Map an entry; None where it is not whole or cannot be read."""
    try:
        with path.open("rb") as stream:
            header = Header.model_validate_json(stream.read(HEADER))
            if header.key != key or header.size != os.fstat(stream.fileno()).st_size:
                return None
            digest = hashlib.sha256()
            while block := stream.read(1 << 22):
                digest.update(block)
            if digest.hexdigest() != header.sha256:
                return None
            ids = np.memmap(stream, header.dtype, "r", HEADER, (header.tokens,))
            stream.seek(header.size - header.documents * 8)
            starts = np.frombuffer(stream.read(), "<i8").astype(np.int64)
    except (OSError, ValidationError):
        return None
    return TokenStream(name, ids, starts, header.sha256)


def _sweep(folder: Path) -> None:
    """Delete what a killed process left: no one writes for a day without a word."""
    for path in folder.glob("*.partial"):
        with suppress(FileNotFoundError):  # another process may just have renamed it
            if time.time() - path.stat().st_mtime > _STALE:
                path.unlink()


def _full(place: Path) -> MemcError:
    hint = "free some, or set XDG_CACHE_HOME to a folder on another disk"
    return MemcError("E502", "no space left for the cache of tokens", str(place), hint)
