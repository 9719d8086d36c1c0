"""What callers give, checked before anything is done with it: whole numbers, places, lists. No torch."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from memc.errors import MemcError

LARGEST = (1 << 31) - 1
"""Most that a count may be (of tokens, channels, bytes): past it, libraries below fail in words of their own."""

LARGEST_SEED = (1 << 63) - 1
MOST_THREADS = 1024


def whole_number(name: str, value: Any, least: int = 1, most: int = LARGEST) -> int:
    """Return ``value`` as an int; raises ``MemcError`` E200 unless it is a whole number from ``least`` to ``most``."""
    try:
        whole = operator.index(value)
    except TypeError:
        whole = least - 1
    if not least <= whole <= most:
        bounds = f"of at least {least}" if whole < least else f"of at most {most}"
        raise MemcError("E200", f"{name} is {short(value)}", next=f"give a whole number {bounds}")
    return whole


def path_of(name: str, value: Any) -> Path:
    """Return ``value`` as a path; raises ``MemcError`` E200 for what is none."""
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        raise MemcError("E200", f"{name} is {short(value)}", next="give a path, as text or a pathlib.Path")
    return Path(value)


def text_of(name: str, value: Any) -> str:
    """Return ``value`` as it is; raises ``MemcError`` E200 for what is no text."""
    if not isinstance(value, str):
        raise MemcError("E200", f"{name} is {short(value)}", next="give a text")
    return value


def texts(name: str, values: Any) -> list[str]:
    """Return a list of texts, of which paths are some; one that stands alone is a list of one.

    Raises ``MemcError`` E200 for anything else.
    """
    several = [values] if isinstance(values, str | os.PathLike) else values
    if not isinstance(several, Iterable):
        raise MemcError("E200", f"{name} is {short(values)}", next="give a text, or a list of texts")
    found = [os.fspath(value) if isinstance(value, os.PathLike) else value for value in several]
    if wrong := [value for value in found if not isinstance(value, str)]:
        raise MemcError("E200", f"{name} has {short(wrong[0])} in it", next="give a text, or a list of texts")
    return found


def whole_numbers(name: str, values: Any, least: int = 1) -> list[int]:
    """Return a list of whole numbers; one that stands alone is a list of one. Raises as :func:`whole_number`."""
    several = values if isinstance(values, Iterable) and not isinstance(values, str) else [values]
    return [whole_number(name, value, least) for value in several]


def short(value: Any) -> str:
    """Return how a value is shown in a message."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
