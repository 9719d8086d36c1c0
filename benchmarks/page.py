"""What pages of results are made of, and the page of ``cpu.py``: tables, numbers to reach and what was reached."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def page(document: dict[str, Any]) -> str:
    """Write the page of ``cpu.py``."""
    rows: list[Row] = document["rows"]
    threads = sorted({row["threads"] for row in rows})
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    parts = [
        "# SmolLM2-135M on a CPU",
        f"{document['cpu']}, {document['cores']} cores, load {document['load_before']:.1f} before the start;"
        f" {versions}; memc at {document['commit']}. Weights: memc int4, llama.cpp Q4_1, transformers float32."
        " Random tokens, batch 1; a cell is the median over bursts of 8 tokens and, in brackets, the least and the"
        " most; the sides take turns after every burst. See [README](../README.md).",
    ]
    for count in threads:
        chosen = [row for row in rows if row["threads"] == count]
        title = f"{count} thread{'s' if count > 1 else ''}"
        parts += [
            f"## Decode, milliseconds a token, {title}",
            table(chosen, lambda r: f"{r['decode_ms']:.1f} ({r['decode_ms_low']:.1f}-{r['decode_ms_high']:.1f})"),
            f"## Decode, milliseconds of CPU time a token, {title}",
            table(chosen, lambda r: f"{r['decode_cpu_ms']:.1f}"),
            f"## Prompt, tokens a second, {title}",
            table(chosen, lambda r: f"{1e3 / r['prefill_ms']:.0f}"),
        ]
    last = [row for row in rows if row["threads"] == threads[0]]
    parts += [
        "## State",
        table(last, lambda r: "-" if r["state_bytes"] is None else f"{r['state_bytes'] / 2**20:.1f} MiB"),
        "llama.cpp does not tell: by its shapes 22.5 KiB a token in float16.",
        "## Peak memory of the side's process, contexts from the shortest on",
        table(last, lambda r: f"{r['peak_rss_bytes'] / 2**20:.0f} MiB"),
        "## Conversion",
        conversion(document["conversions"]),
        "## Numbers to reach",
        *(f"### {count} thread{'s' if count > 1 else ''}\n\n" + reached(rows, count) for count in threads),
        "## Left out",
        cut(document["sides"]),
    ]
    return "\n\n".join(parts) + "\n"


def grid(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """Write a Markdown table."""
    head = list(head)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines])


def table(rows: list[Row], cell: Callable[[Row], str]) -> str:
    """Write one line a side and one column a context."""
    contexts = sorted({row["context"] for row in rows})
    sides = list(dict.fromkeys(row["side"] for row in rows))
    at = {(row["side"], row["context"]): cell(row) for row in rows}
    return grid(["side", *map(str, contexts)], ([side, *(at.get((side, c), "") for c in contexts)] for side in sides))


def conversion(made: dict[str, Any]) -> str:
    """Write the seconds of each step of each conversion."""
    steps = ("capture", "raise", "pass", "lower", "verify")
    lines = [
        [
            name,
            *(f"{one['split'][step]:.0f}" for step in steps),
            f"{one['seconds']:.0f}",
            f"{one['cpu']:.0f}",
            f"{one['peak_rss_bytes'] / 2**30:.2f} GiB",
        ]
        for name, one in made.items()
    ]
    return grid(["artifact", *(f"{step}, s" for step in steps), "all, s", "CPU, s", "peak"], lines)


def reached(rows: list[Row], threads: int) -> str:
    """Compare with the numbers to reach, as far as the contexts were run."""
    at = {(r["side"], r["context"]): r for r in rows if r["threads"] == threads}

    def ratio(key: str, above: tuple[str, int], below: tuple[str, int]) -> float | None:
        return at[above][key] / at[below][key] if above in at and below in at else None

    wanted = [
        ("decode speed, linear to llama.cpp, at 64", ratio("decode_ms", ("llama.cpp", 64), ("linear", 64)), 1.0, True),
        ("the same at 8000", ratio("decode_ms", ("llama.cpp", 8000), ("linear", 8000)), 5.0, True),
        ("decode time, linear, 32000 to 512", ratio("decode_ms", ("linear", 32000), ("linear", 512)), 1.1, False),
        (
            "prompt time a token, linear, 32000 to 2048",
            ratio("prefill_ms", ("linear", 32000), ("linear", 2048)),
            1.15,
            False,
        ),
        (
            "prompt time a token, window, 32000 to 2048",
            ratio("prefill_ms", ("window", 32000), ("window", 2048)),
            1.15,
            False,
        ),
    ]
    lines = [
        [
            what,
            f"{'at least' if least else 'at most'} {goal:g}",
            f"{value:.2f}",
            "yes" if (value >= goal) == least else "no",
        ]
        for what, value, goal, least in wanted
        if value is not None
    ]
    return grid(["number", "goal", "found", "reached"], lines)


def cut(sides: dict[str, Any]) -> str:
    """Say which sides were not given the longer contexts, and why."""
    lines = [f"- {name}: contexts past {one['longest']}, {one['why']}" for name, one in sides.items() if one["longest"]]
    return "\n".join(lines) or "Nothing."


def save(results: Path, document: dict[str, Any], make: Callable[[dict[str, Any]], str] = page) -> None:
    """Write a document of results, lists of numbers a line each, and its page beside it."""
    results.parent.mkdir(parents=True, exist_ok=True)
    text = re.sub(r"\[\n[^][{}\"]*\]", lambda found: " ".join(found.group().split()), json.dumps(document, indent=1))
    results.write_text(text + "\n")
    write(results, document, make)


def write(results: Path, document: dict[str, Any], make: Callable[[dict[str, Any]], str] = page) -> None:
    """Write the page beside ``results``, and at its end the remarks in ``NAME.remarks.txt`` if somebody wrote them.

    They say what tables cannot: what was missed, why, and what was tried.
    """
    remarks = results.with_suffix(".remarks.txt")
    text = remarks.read_text().strip() if remarks.is_file() else ""
    results.with_suffix(".md").write_text(make(document) + (f"\n{text}\n" if text else ""))


if __name__ == "__main__":
    for given in map(Path, sys.argv[1:]):
        write(given, json.loads(given.read_text()))
