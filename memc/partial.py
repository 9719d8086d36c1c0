"""Where what is not whole yet lies: beside its place, so that one rename puts it there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


def partial_of(path: Path, ending: str = ".partial") -> Path:
    """Return where what becomes ``path`` is made; for one without a name (``.``) a place that is never there."""
    return path.with_name(path.name + ending) if path.name else path / ending


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Enter the place of a file that is ``path`` at the end; where that fails ``path`` is as it was, without remains.

    What is read from the file that it takes the place of may be mapped meanwhile.
    """
    partial = partial_of(path)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """Enter a stream of what is ``path`` at the end, as :func:`replacing`."""
    with replacing(path) as partial, partial.open("wb") as stream:
        yield stream


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8 as the file ``path``, whole or not at all."""
    with writing(path) as stream:
        stream.write(text.encode())
