"""Words and sentences of the tasks made of text: plain English, so that every tokenizer cuts them alike in kind."""

from __future__ import annotations

import numpy as np


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    "amber ancient bitter brave bright broken calm clever cold copper curious distant dusty eager early empty faded "
    "fancy gentle golden grand gray hidden hollow humble icy iron jolly keen late little lonely lucky mellow mighty "
    "narrow noble pale patient plain proud quiet rapid rusty silent silver simple steady tiny"
)
NOUNS = _words(
    "anchor apple arrow badger barrel basket beacon bottle bridge candle canyon castle cedar clock cottage desert "
    "eagle falcon feather forest garden glacier hammer harbor island kettle ladder lantern maple marble meadow mirror "
    "mountain orchard otter pebble pillow rabbit river rocket saddle shovel spider temple turtle valley violin window"
)
VERBS = _words("stood waited rested slept lay shone vanished stayed appeared changed settled remained")
PLACES = _words("near beside behind above below beyond")
ENDS = ("all day", "in the rain", "before dawn", "for years", "at noon", "without a sound", "again", "in spring")

NOISE = (
    " Rain fell on the hills.",
    " The road was long and dry.",
    " Birds sang in the trees.",
    " Nothing else was to be seen.",
    " The wind came and went.",
)
"""Filler of the passkey: five sentences, again and again."""


def names(count: int, random: np.random.Generator) -> list[str]:
    """Draw ``count`` different names, an adjective and a noun each; at most ``MOST_NAMES``."""
    chosen = random.choice(MOST_NAMES, count, replace=False)
    return [f"{ADJECTIVES[n // len(NOUNS)]} {NOUNS[n % len(NOUNS)]}" for n in chosen.tolist()]


MOST_NAMES = len(ADJECTIVES) * len(NOUNS)


def sentence(random: np.random.Generator) -> str:
    """Draw one sentence that tells nothing; like all pieces of a text it starts with its space."""
    subject, other = (f"{_one(ADJECTIVES, random)} {_one(NOUNS, random)}" for _ in range(2))
    return f" The {subject} {_one(VERBS, random)} {_one(PLACES, random)} the {other} {_one(ENDS, random)}."


def letters(count: int, size: int, random: np.random.Generator) -> list[str]:
    """Draw ``count`` different words of ``size`` random letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(chr(97 + n) for n in random.integers(0, 26, size).tolist())] = None
    return list(found)


def _one(words: tuple[str, ...], random: np.random.Generator) -> str:
    return words[int(random.integers(len(words)))]
