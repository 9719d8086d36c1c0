"""Pictures of the page as inline SVG: lines over steps, bars and heads by layer, each with a text alternative.

They take their colours from the page's style, tell series apart by dashes and filling too, and grow with the page.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

from memc.report.text import escaped, number, size

STYLE = """
:root { --s0: #0b5cad; --s1: #a04a00; --s2: #6b2fa0; --s3: #0a6e4f; --s4: #a3123f; }
@media (prefers-color-scheme: dark) { :root { --s0: #6cb6ff; --s1: #ffa657; --s2: #d2a8ff; --s3: #56d364; } }
@media (prefers-color-scheme: dark) { :root { --s4: #ff8fa8; } }
figure { margin: 1rem 0; max-width: 32rem; } figcaption { font-weight: 600; }
.key { font-weight: 400; display: inline-block; border-top: 3px solid; margin-right: .5rem;
  overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: currentColor; }
svg .grid { stroke: var(--line); } .line { fill: none; stroke-width: 1.5; }
.s0 { stroke: var(--s0); } .s1 { stroke: var(--s1); } .s2 { stroke: var(--s2); } .s3 { stroke: var(--s3); }
.line.s1 { stroke-dasharray: 5 2; } .line.s2 { stroke-dasharray: 2 2; } .line.s3 { stroke-dasharray: 7 2 2 2; }
.key.s0 { border-color: var(--s0); } .key.s1 { border-top-style: dashed; border-color: var(--s1); }
.key.s2 { border-top-style: dotted; border-color: var(--s2); }
.key.s3 { border-top-style: double; border-color: var(--s3); }
.spot { fill: none; stroke: var(--s0); stroke-width: 1.5; } .spot.full { fill: var(--s0); }
.dot { fill: none; stroke-width: 1.5; } .bar { fill: none; stroke: var(--s0); } .bar.full { fill: var(--s0); }
.cell { fill: var(--s0); stroke: var(--line); } .cell.kept { stroke: currentColor; stroke-width: 1.5; }
"""

SIDE_BY_SIDE = """
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 0 2rem; }
"""
"""Style of a ``div.charts``, whose figures stand beside each other where there is room."""

WIDTH, HEIGHT = 320, 190
LEFT, RIGHT, TOP, BOTTOM = 50, 310, 10, 160
SERIES = 4
"""Series that have a look of their own."""

ROW = 16
"""Height of a bar with its label."""


@dataclass(frozen=True)
class Line:
    """A series of points ``(step, value)``; ``dots`` draws a ring at each."""

    name: str
    points: Sequence[tuple[float, float]]
    dots: bool = False


@dataclass(frozen=True)
class Bar:
    """A value with its label; ``full`` fills the bar."""

    label: str
    value: float
    full: bool = False


@dataclass(frozen=True)
class Heads:
    """Shares from 0 to 1 by head of one layer, None where there is none; ``kept`` heads get a frame."""

    label: str
    values: Sequence[float | None]
    kept: Collection[int] = ()


@dataclass(frozen=True)
class Point:
    """A choice: how large it is and how far from its original; ``front`` when nothing beats it."""

    label: str
    size: float
    value: float
    front: bool = False


def line_chart(title: str, series: Sequence[Line], along: str = "step", *, doubling: bool = False) -> str:
    """Draw lines over steps, or what ``along`` names, on a logarithmic scale; nothing when no value can be drawn.

    Losses are positive and fall by orders of magnitude; what is not positive or not finite is left out. ``doubling``
    puts equal ratios along at equal distances too.
    """
    drawn = [Line(s.name, [p for p in s.points if 0 < p[1] < math.inf], s.dots) for s in series[:SERIES]]
    drawn = [line for line in drawn if line.points]
    if not drawn:
        return ""
    points = [point for line in drawn for point in line.points]
    first, last = min(p[0] for p in points), max(p[0] for p in points)
    low, high = min(p[1] for p in points), max(p[1] for p in points)
    if low == high:
        low, high = low / 2, high * 2

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across = (point[0] - first) / (last - first or 1)
        if doubling and last > first > 0:
            across = math.log(point[0] / first) / math.log(last / first)
        up = math.log(point[1] / low) / math.log(high / low)
        return LEFT + across * (RIGHT - LEFT), BOTTOM - up * (BOTTOM - TOP)

    grid = [_rule(place((first, tick))[1], number(tick)) for tick in ticks(low, high)]
    ends = [_label(LEFT, BOTTOM + 14, f"{first:g}", "start"), _label(RIGHT, BOTTOM + 14, f"{last:.10g}", "end")]
    ends.append(_label((LEFT + RIGHT) / 2, BOTTOM + 14, along, "middle"))
    marks = [_line(index, [place(point) for point in line.points], line.dots) for index, line in enumerate(drawn)]
    keys = "".join(f' <span class="key s{index}">{escaped(line.name)}</span>' for index, line in enumerate(drawn))
    said = "; ".join(_told(line, along) for line in drawn)
    return _figure(escaped(title) + ":" + keys, f"{title}. {said}", HEIGHT, [*grid, *ends, *marks])


def scatter(title: str, points: Sequence[Point]) -> str:
    """Draw choices by size, in bytes and at equal distances for equal ratios; nothing when none can be drawn.

    Those on the front are filled and joined by a stair.
    """
    points = [point for point in points if 0 < point.size < math.inf and math.isfinite(point.value)]
    if not points:
        return ""
    first, last = min(p.size for p in points), max(p.size for p in points)
    low, high = min(p.value for p in points), max(p.value for p in points)
    low, high = (low, high) if high > low else (low - 0.5 * abs(low or 1), high + 0.5 * abs(high or 1))

    def place(point: Point) -> tuple[float, float]:
        across = math.log(point.size / first) / math.log(last / first) if last > first else 0.5
        return LEFT + 10 + across * (RIGHT - LEFT - 30), BOTTOM - 8 - (point.value - low) / (high - low) * 130

    def rule(value: float) -> str:
        return _rule(place(Point("", first, value))[1], f"{value:.3g}")

    ends = [_label(LEFT, BOTTOM + 14, size(first), "start")]
    ends += [_label(RIGHT, BOTTOM + 14, size(last), "end")] if last > first else []
    best = [place(point) for point in sorted(points, key=lambda point: point.size) if point.front]
    # A stair: what lies between two choices is no choice.
    stair = best[:1] + [corner for (_, y), (x, below) in pairwise(best) for corner in ((x, y), (x, below))]
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in stair)
    marks = [f'<polyline class="line s0" points="{joined}"/>']
    for point in sorted(points, key=lambda point: point.front):
        x, y = place(point)
        kind, beside = ("spot full", y - 4) if point.front else ("spot", y + 14)
        marks.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        marks.append(_label(x + 7, beside, point.label, "start"))
    said = "; ".join(f"{p.label}: {number(p.value)} for {size(p.size)}{', best' if p.front else ''}" for p in points)
    return _figure(escaped(title), f"{title}. {said}", HEIGHT, [rule(low), rule(high), *ends, *marks])


def bar_chart(title: str, bars: Sequence[Bar]) -> str:
    """Draw a bar for each value, to the left of zero where it is negative; nothing when no value can be drawn."""
    bars = [bar for bar in bars if math.isfinite(bar.value)]
    if not bars:
        return ""
    low, high = min(0.0, *(bar.value for bar in bars)), max(0.0, *(bar.value for bar in bars))
    left, right = 72, 262

    def place(value: float) -> float:
        return left + (value - low) / (high - low or 1) * (right - left)

    zero, height = place(0), ROW * len(bars) + 4
    parts = [f'<line class="grid" x1="{zero:.1f}" x2="{zero:.1f}" y1="0" y2="{height}"/>']
    for index, bar in enumerate(bars):
        start, end, y = min(zero, place(bar.value)), max(zero, place(bar.value)), ROW * index + 3
        kind = "bar full" if bar.full else "bar"
        parts.append(f'<rect class="{kind}" x="{start:.1f}" y="{y}" width="{end - start:.1f}" height="{ROW - 5}"/>')
        parts.append(_label(0, y + 10, bar.label, "start") + _label(WIDTH, y + 10, number(bar.value), "end"))
    said = "; ".join(f"{bar.label}: {number(bar.value)}" for bar in bars)
    return _figure(escaped(title), f"{title}. {said}", height, parts)


def head_map(title: str, layers: Sequence[Heads], columns: Sequence[str] = (), across: str = "head") -> str:
    """Draw a square for each head of each layer, the fuller the larger its share; nothing without layers.

    Rows and columns may be something else: ``across`` says what a column is, ``columns`` are their names, which are
    then written below.
    """
    if not layers:
        return ""
    left = 60
    side = 2 * ROW if columns else min(ROW, (WIDTH - left) / max(len(layer.values) for layer in layers))
    names = columns or [str(head) for head in range(max(len(layer.values) for layer in layers))]
    parts, said = [], []
    for row, layer in enumerate(layers):
        y = side * row + 1
        parts.append(_label(0, y + side / 2 + 4, layer.label, "start") if side >= 11 or not row % 2 else "")
        for head, value in enumerate(layer.values):
            kind = "cell kept" if head in layer.kept else "cell"
            told = f"{layer.label}, {across} {names[head]}: {'as it was' if value is None else number(value)}"
            parts.append(
                f'<rect class="{kind}" x="{left + side * head:.1f}" y="{y:.1f}" width="{side - 2:.1f}"'
                f' height="{side - 2:.1f}" fill-opacity="{value or 0:.2f}"><title>{escaped(told)}</title></rect>'
            )
        known = [(value, head) for head, value in enumerate(layer.values) if value is not None]
        said += [f"{layer.label}: most {number(max(known)[0])}, {across} {names[max(known)[1]]}"] if known else []
    height = side * len(layers) + 2
    below = [_label(left + side * (place + 0.5) - 1, height + 11, name, "middle") for place, name in enumerate(columns)]
    return _figure(escaped(title), f"{title}. {'; '.join(said)}", height + (14 if columns else 0), [*parts, *below])


def ticks(low: float, high: float) -> list[float]:
    """Return two to six round values between two positive ones: by powers of ten, evenly where they are close."""
    scales = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5)):
        found = [step * 10.0**scale for scale in scales for step in steps if low <= step * 10.0**scale <= high]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / 6)]
    unit = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = next(unit * factor for factor in (5, 2, 1) if unit * factor * 2 <= high - low)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _told(line: Line, along: str) -> str:
    (start, was), (end, now) = line.points[0], line.points[-1]
    lowest = min(value for _, value in line.points)
    return (
        f"{line.name}: {number(was)} at {along} {start:g}, {number(now)} at {along} {end:.10g}, lowest {number(lowest)}"
    )


def _figure(caption: str, told: str, height: float, parts: Sequence[str]) -> str:
    """Make a figure; ``caption`` is HTML, ``told`` is text for those who do not see it."""
    view = f'viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escaped(told)}"'
    return f"<figure><figcaption>{caption}</figcaption>\n<svg {view}>{''.join(parts)}</svg></figure>\n"


def _rule(y: float, label: str) -> str:
    return f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>' + _label(
        LEFT - 5, y + 4, label, "end"
    )


def _label(x: float, y: float, value: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escaped(value)}</text>'


def _line(index: int, points: Sequence[tuple[float, float]], dots: bool) -> str:
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    rings = "".join(f'<circle class="dot s{index}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in points)
    return f'<polyline class="line s{index}" points="{joined}"/>' + (rings if dots or len(points) == 1 else "")
