"""How attention chooses what it reads, method by method: seven slots, each filled by name.

A method is one row of :data:`SELECTORS`; what a name in a slot does is in :mod:`memc.kernels.sparse_attention.choose`
and :mod:`memc.kernels.compact_attention`, and their pages have the mathematics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Segmenter = Literal["pages", "events"]
Descriptor = Literal["bounds", "moments", "mean", "centre", "landmark", "channels", "attended", "representatives"]
Scorer = Literal["bound", "moments", "product", "channels"]
Choice = Literal["pages", "tokens", "tree", "levels"]
Positioner = Literal["true", "compact", "clipped"]
Softmax = Literal["joint", "grouped"]


@dataclass(frozen=True)
class Selector:
    """One method of choosing.

    - ``segmenter``: how the tokens of a sequence are cut into pieces that are taken together: ``pages`` of equal
      length, the first one from position 0 on; or ``events``, which end where the model was surprised
      (``memc::events``);
    - ``descriptor``: what is kept of a piece to rank it by: the ``bounds`` of each channel of its keys, the
      ``moments`` or the ``mean`` of each, the key in the ``centre``, the last key as its ``landmark``, all ``channels``
      once more, the keys as ``attended`` to by what the piece itself is about, or the mean of the keys that are
      ``representatives`` of it to the queries that followed;
    - ``scorer``: what a query makes of a description: its least upper ``bound``, the estimate by ``moments``, the
      ``product``, or that over the query's strongest ``channels``;
    - ``choice``: what is taken in order of the scores, ``pages``, single ``tokens``, the pages that a search down a
      ``tree`` of ranges finds, which does not look at all, or those of the best super-pages, the upper of two
      ``levels``; behind the forced set, which is the first tokens and the last ones for every method;
    - ``positioner``: where keys and query stand to one another when they are rotated: at their ``true`` positions; at
      ``compact`` ones, tokens that are not read left out of the count; or at true ones with every longer distance
      ``clipped`` to the window;
    - ``softmax``: ``joint``, one over everything that is read; or ``grouped``, one over the tokens of the forced set
      and the landmarks of what else is taken, whose weights are spread by one within each piece;
    - ``tier``: ``all``, every key and value stays where it can be read.
    """

    descriptor: Descriptor
    scorer: Scorer
    choice: Choice = "pages"
    positioner: Positioner = "true"
    segmenter: Segmenter = "pages"
    softmax: Softmax = "joint"
    tier: Literal["all"] = "all"

    @property
    def extends(self) -> bool:
        """Whether no distance that is read is longer than what is read, however long the sequence."""
        return self.positioner != "true"

    @property
    def searches(self) -> bool:
        """Whether pages are left out that nothing looked at, so that no share of all scores can be told."""
        return self.choice in ("tree", "levels")

    @property
    def eventful(self) -> bool:
        """Whether tokens are taken by the events that they belong to, which ``memc::events`` finds."""
        return self.segmenter == "events"

    @property
    def grouped(self) -> bool:
        """Whether what is taken is weighed as no softmax over tokens weighs it: another function, to be trained."""
        return self.softmax == "grouped"


SELECTORS: dict[str, Selector] = {
    "bounds": Selector("bounds", "bound"),
    "bounds2": Selector("bounds", "bound", choice="levels"),
    "moments": Selector("moments", "moments"),
    "hcam": Selector("mean", "product"),
    "hip": Selector("centre", "product", choice="tree"),
    "landmark": Selector("landmark", "product", softmax="grouped"),
    "lowbit": Selector("channels", "channels", choice="tokens"),
    "longheads": Selector("attended", "product", positioner="compact"),
    "infllm": Selector("representatives", "product", positioner="clipped"),
    "em": Selector("channels", "channels", choice="tokens", segmenter="events"),
}
"""Every method by name."""


def methods(*, extending: bool) -> tuple[str, ...]:
    """Return the methods by pages that read beyond the trained length, or those that do not."""
    return tuple(name for name, one in SELECTORS.items() if one.extends == extending and not one.eventful)
