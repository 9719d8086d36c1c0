"""Token ids that somebody else made, as a source: what a model without a tokenizer is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from memc.data.sources import digest_of, is_hub, kind, source_digest, unreadable
from memc.data.stream import TokenStream
from memc.errors import MemcError


def holds_ids(source: str | Path) -> bool:
    """Tell whether a source is a file of token ids, which no tokenizer has to read."""
    return not is_hub(source) and kind(Path(source)) == "npy"


def read_ids(source: str | Path) -> npt.NDArray[np.integer]:
    """Map a ``.npy`` file of token ids into memory: ``[N]`` is one document, each row of ``[D,N]`` is one.

    Returns ``[D,N]``. Raises ``MemcError`` E207 when the file is missing, damaged, or holds anything else.
    """
    where, hint = str(source), "write it with numpy.save: integers [N], or [documents,N]"
    try:
        ids: npt.NDArray[Any] = np.lib.format.open_memmap(source, mode="r")
    except OSError as error:
        raise unreadable(Path(source), error) from error
    except (ValueError, EOFError) as error:
        raise MemcError("E207", f"file is no array of numbers: {str(error).splitlines()[0]}", where, hint) from error
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2) or ids.size == 0:
        raise MemcError("E207", f"array of {ids.dtype} {list(ids.shape)} is no token ids", where, hint)
    if int(ids.min()) < 0:
        raise MemcError("E207", f"token id {int(ids.min())} is negative", where, hint)
    return np.atleast_2d(ids)


def id_stream(source: str | Path, limit: int | None = None) -> TokenStream:
    """Return the token ids of a file, at most ``limit`` of them. Raises as ``read_ids``."""
    rows = read_ids(source)
    ids = rows.reshape(-1)[:limit]
    starts = np.arange(0, len(ids), rows.shape[1], dtype=np.int64)
    return TokenStream(str(source), ids, starts, digest_of([source_digest(source), limit]))
