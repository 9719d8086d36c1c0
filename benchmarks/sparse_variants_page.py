"""The page of ``sparse_variants.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from page import grid
from sparse_page import conditions

Line = dict[str, Any]


def page(document: dict[str, Any]) -> str:
    """Write the page of a run."""
    parts = [
        "# Forms of sparse attention that no pass offers, SmolLM2-135M",
        "Rows of 2,048 tokens of an Austen novel and of the Jargon File. The first 1,536 read everything, KL to the"
        " original in nats a token is that of the last 512, for each row (the novel's first), and the mean. Lower is"
        " better; a line in bold is what a pass does. See [README](../README.md).",
    ]
    for name, (title, about, table) in SECTIONS.items():
        if name in document:
            parts += [f"## {title}", conditions(document[name]), about, table(document[name]["lines"])]
    return "\n\n".join(parts) + "\n"


def divergences(line: Line, bold: bool = False) -> list[str]:
    """Return the cells of a line: the mean, and each row."""
    cells = [f"{sum(line['kl']) / len(line['kl']):.4f}", *(f"{one:.4f}" for one in line["kl"])]
    return [f"**{cell}**" for cell in cells] if bold else cells


def listed(
    head: Iterable[str], lines: list[Line], cells: Callable[[Line], list[str]], own: Callable[[Line], bool]
) -> str:
    """Write a table of lines, ``own`` the forms of a pass."""
    rows = [f"row {number + 1}" for number in range(len(lines[0]["kl"]))]
    return grid([*head, "KL", *rows], [[*cells(one), *divergences(one, own(one))] for one in lines])


def tokens(lines: list[Line]) -> str:
    """Write what a token for all that was dropped is worth."""
    return listed(
        ("heads that retrieve", "window", "token"),
        lines,
        lambda one: [f"{one['kept']:.0%}", str(one["window"]), one["token"]],
        lambda one: one["token"] == "none",
    )


def rankings(lines: list[Line]) -> str:
    """Write what rankings of heads cost."""
    return listed(
        ("heads that retrieve", "ranked by"),
        lines,
        lambda one: [f"{one['kept']:.0%}", one["ranking"]],
        lambda one: one["ranking"] in ("echo and induction", "positional decay, on random tokens"),
    )


def joins(lines: list[Line]) -> str:
    """Write what choices cost by how scores are joined."""
    return listed(
        ("method", "budget", "rerank", "scores joined by"),
        lines,
        lambda one: [one["method"], str(one["budget"]), str(one["rerank"]), one["joined"]],
        lambda one: one["joined"] == "max",
    )


def narrowed(lines: list[Line]) -> str:
    """Write what keys without some channels cost."""
    return listed(
        ("form", "key channels dropped", "bytes held / float32"),
        lines,
        lambda one: [one["form"], f"{one['share']:.0%}" if "share" in one else "", f"{one['held']:.3f}"],
        lambda one: one["form"].startswith("bits"),
    )


SECTIONS: dict[str, tuple[str, str, Callable[[list[Line]], str]]] = {
    "token": (
        "One token for all that streaming heads dropped",
        "The heads that retrieve (by echo and induction) read everything, the others 4 sinks, the window, and one token"
        " of weight N for the N others. Its key: `mean`, of their keys (RazorAttention); `edge`, of the keys before"
        " rotation, rotated to the last of them; `normal`, mean and half the variance of q.k; `affine`, w.q + b for"
        " each query head, fitted on two other texts; `true`, the log of the mean exponential itself, which no small"
        " state gives. Its value is the mean of theirs; `first order`, the expansion of their softmax around it, for"
        " which a state would hold a matrix.",
        tokens,
    ),
    "heads": (
        "Rankings of heads",
        "The heads that retrieve read everything, the others 4 sinks and a window of 256. `positional decay` is that of"
        " kvpress: mean query and key before rotation, rotated over 500 positions; `mass missed` the share of the"
        " softmax outside sinks and window, the highest query head's; both on two other texts unless said.",
        rankings,
    ),
    "groups": (
        "One choice for the query heads that share a key-value head",
        "By the highest of their scores, the sum, or the sum of the softmax shares over what may be taken.",
        joins,
    ),
    "channels": (
        "Fewer key channels after a prompt",
        "Everything is read. The channels of the least product of mean squares of the last 32 queries of the prompt"
        " (the first 1,536 tokens) and of its keys go, for each key-value head (ThinK): from the keys of the prompt, or"
        " from all keys; the last 32 keys stay whole. `settled on other texts`: the same channels for every text, by"
        " two others, from all keys. Bytes are those of all keys and values of a long sequence, the 32 whole ones left"
        " out.",
        narrowed,
    ),
}
