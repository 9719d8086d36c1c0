"""Numbers, sizes, layers and foreign strings as short text; used by every view."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from itertools import pairwise

FEW = 8
"""Most items of a list that are shown of a pass's facts; the report file has all."""

FETCHED = "fetched once, read for a token"
"""What the bytes are called that are fetched for a sequence."""


def plain(text: str) -> str:
    """Make a foreign string safe to print: whatever is not printable or a line break becomes an escape."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


def escaped(value: object) -> str:
    """Render a value as text of HTML, in an element or a quoted attribute."""
    return escape(plain(str(value)))


def size(count: float | None) -> str:
    """Render a number of bytes in binary units: ``22.5 MiB``."""
    if count is None:
        return "-"
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    index = 0
    while abs(value) >= 1000 and index < len(units) - 1:
        value, index = value / 1024, index + 1
    return f"{value:.3g} {units[index]}"


def amount(count: float | None, unit: str = "") -> str:
    """Render a count in decimal units: ``134.5 M``."""
    if count is None:
        return "-"
    value, scales = float(count), ["", "k", "M", "G", "T", "P"]
    index = 0
    while abs(value) >= 1000 and index < len(scales) - 1:
        value, index = value / 1000, index + 1
    digits = f"{value:.4g}"
    suffix = scales[index] + unit
    return f"{digits} {suffix}" if suffix else digits


def number(value: float | None) -> str:
    """Render a measured value in five significant digits at most."""
    if value is None:
        return "-"
    return f"{value:.1e}" if value != 0 and abs(value) < 1e-3 else f"{value:.5g}"


def brief(value: object) -> str:
    """Render a JSON value of a pass's facts, of a long list the first items."""
    if isinstance(value, list) and len(value) > FEW:
        return f"{', '.join(map(str, value[:FEW]))}, ... ({len(value)} in all)"
    return number(value) if isinstance(value, float) else str(value)


def ratio(after: float | None, before: float | None) -> str:
    """Render how many times one value is of another: ``0.25x``; empty when it cannot be said."""
    return f"{after / before:.3g}x" if after is not None and before else ""


def duration(seconds: float | None) -> str:
    """Render seconds, as minutes or hours where it is two of these or more."""
    if seconds is None:
        return "-"
    unit, name = (3600, "h") if seconds >= 7200 else (60, "min") if seconds >= 120 else (1, "s")
    return f"{seconds / unit:.1f} {name}"


def past_training(contexts: Iterable[int], limit: int | None) -> str:
    """Name the contexts that go past the positions of a model's training, if it has some; empty where none does."""
    past = [str(context) for context in sorted(contexts) if limit is not None and context > limit]
    return f"{', '.join(past)}: past the {limit} positions that the model was trained on" if past else ""


def layers(numbers: Iterable[int]) -> str:
    """Render layer numbers in short: ``0-29``, ``0-28 by 2``, ``0-2, 5, 7``."""
    found = sorted(set(numbers))
    if len(found) > 2:
        steps = {b - a for a, b in pairwise(found)}
        if len(steps) == 1 and steps != {1}:
            return f"{found[0]}-{found[-1]} by {steps.pop()}"
    runs: list[list[int]] = []
    for value in found:
        if runs and runs[-1][1] == value - 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
