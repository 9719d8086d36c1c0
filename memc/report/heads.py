"""The scores of every head as short text: a picture of numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from memc.report.files import HeadFacts, LayerHeads, PassReportFile

TITLES = {
    "induction": "Share of attention, induction",
    "echo": "Share of attention, echo",
    "decay": "Area under the attention by distance",
}
"""What is scored, by name; a pass has the first two, or the last."""

WIDTH = 34
"""Characters of a line of scores: two columns of them fit 80."""


def of_pass(item: PassReportFile) -> HeadFacts | None:
    """Return the scores that a pass chose heads by, None where it did not."""
    return HeadFacts.model_validate(item.details["heads"]) if "heads" in item.details else None


def kinds(heads: HeadFacts) -> tuple[str, ...]:
    """Return the names of the scores that there are."""
    return tuple(name for name in TITLES if any(getattr(one, name) for one in heads.layers))


def columns(heads: HeadFacts) -> tuple[str, ...]:
    """Return the heads of :func:`rows`."""
    return (">layer", *kinds(heads))


def legend(heads: HeadFacts) -> tuple[str, ...]:
    """Say what the numbers of :func:`rows` are."""
    first, second, last = meaning(heads)
    total = "it is" if len(kinds(heads)) == 1 else "both sum to"
    return (
        f"percent of {first}",
        second,
        f"| ends a key-value head; . rounds to 0; spread evenly {total} {100 * heads.chance:.2g}",
        f"* stays as it is: {last}",
    )


def meaning(heads: HeadFacts) -> tuple[str, str, str]:
    """Say what was measured of each head, what its scores are, and how many heads stay."""
    kept, known = sum(len(one.kept) for one in heads.layers), sum(one.kv_heads for one in heads.layers)
    said = (
        "the attention of each query head on repeated random tokens",
        "induction: on what came after a token's earlier occurrence; echo: on that",
    )
    if "decay" in kinds(heads):
        said = (
            "the attention of each query head's mean query to mean keys",
            "decay: the area under it, summed from the farthest key on",
        )
    return *said, f"{kept} of {known} key-value heads"


def rows(heads: HeadFacts, layer: int | None = None) -> Iterator[tuple[str, ...]]:
    """Yield a layer's number and the scores of its query heads, for one layer or all."""
    for one in heads.layers:
        if layer is None or one.layer == layer:
            yield str(one.layer), *(_scores(one, getattr(one, name)) for name in kinds(heads))


def _scores(layer: LayerHeads, scores: Sequence[float]) -> str:
    size = len(scores) // layer.kv_heads
    cells = []
    for head, score in enumerate(scores):
        shown = str(round(100 * score) or ".")
        mark = "*" if head // size in layer.kept else " "
        cells.append(f"{shown:>2}{mark}" + ("|" if head % size == size - 1 else ""))
    group = 3 * size + 1
    each = WIDTH // group * size if group <= WIDTH else WIDTH // 3 - 1
    return "\n".join("".join(cells[start : start + each]) for start in range(0, len(cells), each))
