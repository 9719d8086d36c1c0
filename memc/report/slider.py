"""The part of the page that answers what a model costs at my context: a slider over what was predicted, and curves.

The page's only script moves text that is there already: without it the figures of one context are shown.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

from memc.report import charts
from memc.report.models import ByContext, Measured
from memc.report.page import POLICY
from memc.report.text import escaped, number, ratio, size

SHOWN = 32768
"""Context that is shown first, or the longest there is."""

SCRIPT = """
const told = JSON.parse(document.getElementById("told").textContent);
const slider = document.getElementById("context");
function show() {
  for (const [id, texts] of Object.entries(told)) document.getElementById(id).textContent = texts[slider.value];
  slider.setAttribute("aria-valuetext", told.tokens[slider.value] + " tokens");
}
slider.closest("p").hidden = false;
slider.addEventListener("input", show);
show();
"""

STYLE = """
.context input { width: 100%; max-width: 32rem; accent-color: var(--s0); } .context td.n { min-width: 4.3rem; }
@media (max-width: 30rem) { .context td.n { min-width: 3.8rem; } }
.context tbody th { font-weight: 400; }
@media print { .context p { display: none; } }
"""


def _seconds(ms: float | None) -> str:
    return number(None if ms is None else ms / 1000)


_ROWS: tuple[tuple[str, str, str, Callable[[float | None], str]], ...] = (
    ("state", "state_bytes", "state of a sequence", size),
    ("read", "bytes_read_per_token", "read for a token", size),
    ("time", "decode_ms", "ms a token, predicted", number),
    ("prompt", "prefill_ms", "seconds a prompt, predicted", _seconds),
)


MEASURED, SHARE = "measured", "share"
"""Rows of what was measured, and how much that is of what was predicted."""


def policy() -> str:
    """Return the page's content security policy: nothing but its own style and this one script, by its digest."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return f"{POLICY}; script-src 'sha256-{digest}'"


def section(curves: Mapping[str, ByContext], measured: Measured | None = None) -> str:
    """Show what both sides cost at a context that the reader chooses, and by context; nothing without curves.

    Milliseconds a token that were ``measured`` stand beside the predicted ones, at the contexts where they were.
    """
    after = curves.get("converted", ByContext())
    before = curves.get("original", ByContext())
    contexts = sorted(after.state_bytes)
    if not contexts:
        return ""
    told, labels = _texts(before, after, contexts), [(row, label) for row, _, label, _ in _ROWS]
    if measured is not None and measured.decode_ms:
        told |= _measured(measured, before, after, contexts)
        labels[3:3] = [(MEASURED, "ms a token, measured"), (SHARE, "measured / predicted")]
    first = contexts.index(SHOWN) if SHOWN in contexts else len(contexts) - 1
    cells = {name: f'<td class="n" id="{name}">{escaped(texts[first])}</td>' for name, texts in told.items()}
    rows = "".join(
        f'<tr><th scope="row">{label}</th>{"".join(cells[f"{row}-{side}"] for side in ("a", "b", "ratio"))}</tr>\n'
        for row, label in labels
    )
    heads = "".join(f'<th scope="col" class="n">{name}</th>' for name in ("original", "converted", "ratio"))
    caption = f'At a context of <output id="tokens" for="context">{told["tokens"][first]}</output> tokens'
    control = f'<input id="context" type="range" min="0" max="{len(contexts) - 1}" value="{first}">'
    data = json.dumps(told).replace("<", "\\u003c")
    return (
        f'<section class="context"><div class="wide" tabindex="0"><table><caption>{caption}</caption>'
        f"<thead><tr><th></th>{heads}</tr></thead><tbody>\n{rows}</tbody></table></div>\n"
        f'<p hidden><label for="context">Context, {contexts[0]} to {contexts[-1]} tokens</label><br>{control}</p>\n'
        f'<script type="application/json" id="told">{data}</script><script>{SCRIPT}</script>\n'
        f'<div class="charts">{"".join(_charts(before, after, measured or Measured()))}</div></section>\n'
    )


def _texts(before: ByContext, after: ByContext, contexts: Sequence[int]) -> dict[str, list[str]]:
    """Return what stands in each cell, by its id, at each context."""
    found = {"tokens": [f"{context:,}" for context in contexts]}
    for row, field, _, say in _ROWS:
        sides = [[getattr(side, field).get(context) for context in contexts] for side in (before, after)]
        found |= {f"{row}-{name}": [say(value) for value in side] for name, side in zip("ab", sides, strict=True)}
        found[f"{row}-ratio"] = [ratio(b, a) for a, b in zip(*sides, strict=True)]
    return found


def _measured(measured: Measured, before: ByContext, after: ByContext, contexts: Sequence[int]) -> dict[str, list[str]]:
    """Return what stands in the rows of what was measured, of both sides."""
    sides = ("a", measured.original_decode_ms, before.decode_ms), ("b", measured.decode_ms, after.decode_ms)
    found = {f"{SHARE}-ratio": [""] * len(contexts)}
    for name, taken, predicted in sides:
        found[f"{MEASURED}-{name}"] = [number(taken.get(context)) for context in contexts]
        found[f"{SHARE}-{name}"] = [ratio(taken.get(context), predicted.get(context)) or "-" for context in contexts]
    pairs = [(measured.decode_ms.get(context), measured.original_decode_ms.get(context)) for context in contexts]
    return found | {f"{MEASURED}-ratio": [ratio(b, a) for b, a in pairs]}


def _charts(before: ByContext, after: ByContext, measured: Measured) -> Sequence[str]:
    sides = ("original", measured.original_decode_ms), ("converted", measured.decode_ms)
    times = [charts.Line(f"{name}, measured", sorted(taken.items()), dots=True) for name, taken in sides if taken]
    return [
        charts.line_chart(
            title,
            [
                charts.Line(name, [(context, value / unit) for context, value in sorted(getattr(side, field).items())])
                for name, side in (("original", before), ("converted", after))
            ]
            + (times if field == "decode_ms" else []),
            "context",
            doubling=True,
        )
        for title, field, unit in (
            ("State, MiB", "state_bytes", 2**20),
            ("Read for a token, MiB", "bytes_read_per_token", 2**20),
            ("Milliseconds a token" + (", predicted" if not times else ""), "decode_ms", 1),
            ("Seconds a prompt, predicted", "prefill_ms", 1000),
        )
    ]
