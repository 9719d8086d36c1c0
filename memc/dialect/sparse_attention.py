"""``memc::sparse_attention``: softmax attention that holds every key and reads few of them."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import Tensor

from memc.dialect.attention import CausalAttention
from memc.dialect.base import Cost, check, define, log_sum_exp
from memc.dialect.selectors import SELECTORS, methods

METHODS = methods(extending=False)
"""How keys are described, page by page, so that a query can rank them without reading them whole."""

EVENTFUL = tuple(name for name, selector in SELECTORS.items() if selector.eventful)
"""Methods that take the tokens of whole events."""


SPAN = 16
"""Pages of a super-page: the upper level is then a sixteenth of the lower one, and one vector of scores its pages."""


def described_tokens(method: str, page: int) -> int:
    """Return how many tokens lie in what is described together: a page, or a super-page with its pages."""
    return page * SPAN if SELECTORS[method].choice == "levels" else page


def description(method: str, page: int, channels: int) -> tuple[int, ...]:
    """Return the shape of what is described together, of pages of keys ``[page, channels]``."""
    if SELECTORS[method].choice == "levels":
        return 1 + SPAN, 2 * channels
    match SELECTORS[method].descriptor:
        case "channels":
            return channels, page
        case "mean" | "centre" | "landmark":
            return (channels,)
        case _:
            return (2 * channels,)


def pages_of(tokens: Any, page: int) -> Any:
    """Return how many pages ``tokens`` (a number, symbolic or not) fill, the last one perhaps in part."""
    return (tokens + page - 1) // page


def forced_pages(page: int, sinks: int, window: int) -> int:
    """Return the most pages that the sink tokens and the window lie on."""
    return int(pages_of(sinks, page) + pages_of(window - 1, page) + 1)


def check_pages(page: int, budget: int, sinks: int, window: int) -> None:
    """Check that a budget is whole pages, and that what is always taken fits it."""
    check(page >= 1 and sinks >= 0 and window >= 1, "page and window are at least 1, sinks 0")
    check(budget % page == 0, "the budget is whole pages")
    check(forced_pages(page, sinks, window) * page <= budget, "sinks and window fit the budget")


def visited(pages: int, most: int, forced: int) -> int:
    """Return how many of ``pages`` a tree search looks at at most to find ``most``, ``forced`` ones among them.

    Two halves of each range in each round, of which there are as many as the longest range can be halved.
    """
    count, length = max(0, most - forced), max(0, pages - forced)
    if count == 0 or length <= count:
        return 0
    return 2 * count * math.ceil(math.log2(pages_of(length, count)))


def entered(most: int, beam: int) -> int:
    """Return how many super-pages are entered to take ``most`` pages: those of ``beam`` times as many pages."""
    return -(-beam * most // SPAN)


def looked_at(context: int, page: int, most: int, beam: int) -> int:
    """Return how many bounds of pages and super-pages two levels read at most to take ``most`` pages.

    All super-pages, and the pages of those entered and of the one that the window reaches into.
    """
    return context // (page * SPAN) + min(int(pages_of(context, page)), (entered(most, beam) + 1) * SPAN)


RETURNS = ("out", "lse", "next_key", "next_value", "next_positions", "next_pages")
STATES = ("past_key", "past_value", "past_positions", "past_pages")
GRADS_FROM = ("out", "lse", "next_key", "next_value")
GRADS_TO = ("query", "key", "value", "past_key", "past_value", "sink_logits")


@dataclass(frozen=True)
class ChoosingAttention(CausalAttention):
    """What the attentions that choose by descriptions of pages begin with; see :class:`SparseAttention`."""

    past_pages: Tensor
    _: KW_ONLY
    scale: float
    method: str
    page: int
    budget: int
    sinks: int
    window: int
    rerank: int = 1
    dense_below: int = 0
    softcap: float = 0.0
    channels: int = 0
    mass: float = 1.0
    beam: int = 4

    def outputs(self) -> tuple[Tensor, ...]:
        """Return uninitialised tensors of the shapes and types of the results."""
        out, size = self.out(), self.key.shape[3]
        taken = (*METHODS, *self.more_methods)
        check(self.method in taken, f"method is one of {', '.join(taken)}")
        grouped, by_channels = SELECTORS[self.method].grouped, SELECTORS[self.method].scorer == "channels"
        some = f"{self.method} reads at least 1 channel and at most all"
        check(not by_channels or 1 <= self.channels <= size, some)
        check(0 < self.mass <= 1, "mass is above 0 and at most 1")
        few = f"{self.method} scores too few pages to tell what share of the mass they hold"
        check(self.mass == 1 or not SELECTORS[self.method].searches, few)
        check(self.beam >= 1, "beam is at least 1: as many pages are looked at as are taken")
        check(not grouped or self.page > 1, "a landmark stands for at least one other token of its page")
        check(not grouped or self.rerank == 1, "a page that is read through its landmark is read whole")
        check(self.rerank >= 1, "rerank is at least 1")
        check_pages(self.page, self.budget, self.sinks, self.window)
        held = self.past_key.shape[2] + self.key.shape[2]
        described = description(self.method, self.page, size)
        count = pages_of(held, described_tokens(self.method, self.page))
        pages = self.key.new_empty(*self.key.shape[:2], count, *described)
        return out, log_sum_exp(self.query), *self.appended(), pages

    @property
    def more_methods(self) -> tuple[str, ...]:
        """The methods that an op takes beside those by pages."""
        return ()

    @property
    def served(self) -> int:
        """How many tokens share a choice."""
        return 1

    @property
    def reads_all_to(self) -> int:
        """From how many tokens of a sequence on it chooses what it reads."""
        return max(self.budget, self.dense_below)

    def cost(self, context: int) -> Cost:
        """Return the work of one token, the mean over those that share a choice."""
        query, key, value = self.query, self.key, self.value
        held, scanned = context, 0.0
        scored = context
        if context > self.dense_below:
            described = description(self.method, self.page, key.shape[3])[-1]
            selector, pages = SELECTORS[self.method], pages_of(context, self.page)
            most = self.rerank * self.budget // self.page
            if selector.choice == "tree":
                pages = visited(pages, most, forced_pages(self.page, self.sinks, self.window))
            elif selector.choice == "levels":
                pages = looked_at(context, self.page, most, self.beam)
            per_page = self.page * self.channels if selector.scorer == "channels" else described
            scanned = pages * per_page / self.served
            held, scored = min(context, self.budget), min(context, self.rerank * self.budget)
        channels = scanned + scored * key.shape[3] + held * value.shape[3]
        return Cost(2.0 * query.shape[1] * channels, float(channels * key.shape[1] * key.dtype.itemsize))


@dataclass(frozen=True)
class SparseAttention(ChoosingAttention):
    """Attend causally to at most ``budget`` tokens, chosen for each query token and each key-value head.

    Arguments as in ``memc::attention``, and ``past_pages [B,G,ceil(S/page),...]``: one description of each page, that
    is of the keys at positions ``page`` n to ``page`` (n + 1) - 1; 0 until the last of them is held. ``method`` says
    what:

    - ``bounds``: the largest and the smallest value of each channel; the score of a page is the least upper bound of
      q.k that they give (Quest, Tang et al. 2024);
    - ``bounds2``: the same in two levels; pages are held with their super-page, ``past_pages [B,G,ceil(S/(16
      page)),17,2D]``, the bounds of all 16 first, 0 until the last of the pages is held, then those of each. Of the
      super-pages that lie wholly before the window, and not wholly among the sinks, the ``beam`` ``rerank budget`` /
      (16 ``page``) (rounded up) of the highest scores are entered, and the one that the window reaches into, or would
      next. Their pages alone are scored;
    - ``moments``: mean and variance of each channel; the score is q.mean + q^2.variance / 2, the logarithm of the mean
      exponential of q.k for normal keys of independent channels;
    - ``hcam``: mean of each channel; the score is q.mean (the summaries of HCAM, Lampinen et al. 2021, whose relevance
      weights are here those of the one softmax over all that is read);
    - ``hip``: the key in the middle, at ``page`` n + floor(``page`` / 2); the score is q.k with it. Only the pages that
      a search comes by are scored: those between sinks and window are cut into as many ranges as are still to be taken,
      each is halved, the half is scored by the page in its middle, and as many of the best as there were go on, until
      all are single pages (HiP attention, Lee et al. 2024);
    - ``landmark``: the last key, the landmark of the page; the score is q.k with it, and the softmax is grouped, see
      below (Mohtashami & Jaggi 2023);
    - ``lowbit``: the keys themselves once more, channel by channel ``[D, page]``, of which a query reads the
      ``channels`` in which the sum of its magnitudes over the heads that share a key-value head is highest; the score
      of a token is q.k over these (SparQ, Ribar et al. 2024);
    - ``em``: the same, and whole events are taken, see below (EM-LLM, Fountas et al. 2024, arXiv 2407.09450).

    ``bounds`` and ``moments`` describe ``[2D]``, ``hcam``, ``hip`` and ``landmark`` ``[D]``. A query at position p <
    ``dense_below`` reads all earlier tokens. Any other

    1. takes the ``rerank budget / page`` pages of the highest scores (the highest over the heads that share a key-value
       head), among which are always those of the first ``sinks`` tokens and of the last ``window``, p itself included;
       with ``lowbit`` the ``rerank budget`` tokens of the highest scores, among which are always the sinks, the window
       and the page of p;
       With ``mass`` under 1 it takes of those scored, best first, no more than needed for this share of the sum of the
       exponentials of all scores (top-p; Twilight, Lin et al. 2025), a number for each token and key-value head;
       ``hip`` and ``bounds2`` score too few to tell;

    2. with ``rerank`` over 1, takes of their tokens the ``budget`` of the highest q.k (likewise), among which are
       always the sinks and the window.

    Of equal scores the lower index goes first. With ``mass`` 1, up to position ``budget`` - 1, that is every token.
    With ``landmark`` one softmax weighs the tokens of the pages of sinks and window, and the landmarks of the other
    pages taken; each of these spreads the weight of its landmark over its other tokens by a softmax of their own. The
    landmark's value is read with the pages of sinks and window alone. A page has at least 2 tokens, and ``rerank`` is
    1. Only where there are no other pages, or below ``dense_below``, is that the softmax of ``memc::attention``.

    With ``em`` a token scores what the best token of its event does, and two shares of the budget are taken as by
    ``lowbit``: first ``budget`` - floor(``contiguity`` ``budget``) tokens by these scores, then, of the events directly
    before and behind those that tokens were taken of (not counting what is always taken), tokens by the higher of these
    neighbours' scores; where such events hold fewer, fewer are read. ``events [B,S]`` are the numbers that
    ``memc::events`` had given when the call began, -1 for none, as long as ``past_positions`` (None: no token has one).
    A query at p sees those of tokens at p - ``delay`` and before; any other token stands for itself. ``rerank`` and
    ``mass`` are 1, and ``dense_below`` is at least ``budget``. A number is known as many tokens behind its own as an
    event is long at most, so that any split into calls of no more than ``delay`` less these is the same: in longer
    calls their last queries see fewer events.

    Soft-cap and sink logits join the softmax over the chosen tokens and choose nothing; there are no slopes, since a
    page has no one distance. Each sequence is held from position 0 on, and its positions rise by one from token to
    token. Returns

    0. the output ``[B,H,T,E]``, 0 for padding,
    1. the log-sum-exp of each row's scores ``[B,H,T]`` (sink logits included; 0 for padding) in float32, or in float64
       when the query is, so that attention to disjoint sets of keys can be joined,
    2. to 5. the next state: keys, values and positions as in ``memc::attention``, and ``ceil((S + T) / page)`` pages
       (``bounds2``: super-pages, likewise).

    One op and not one each for describing, scoring, choosing and attending: what goes from step to step has an entry
    for each pair of a query and a page, or of a query and a candidate token, and stays in a block of queries this way.
    Choosing has no gradient, and neither have the descriptions.
    """

    sink_logits: Tensor | None = None
    events: Tensor | None = None
    _: KW_ONLY
    contiguity: float = 0.0
    delay: int = 0

    @property
    def more_methods(self) -> tuple[str, ...]:
        """The methods by events."""
        return EVENTFUL

    def outputs(self) -> tuple[Tensor, ...]:
        """Return uninitialised tensors of the shapes and types of the results."""
        results, eventful = super().outputs(), SELECTORS[self.method].eventful
        plain = self.rerank == 1 and self.mass == 1
        check(not eventful or plain, "tokens of events are not ranked again and fill the budget: rerank and mass are 1")
        check(not eventful or self.dense_below >= self.budget, "up to the budget every token is read: dense_below")
        check(0 <= self.contiguity < 1, "contiguity is a share of the budget under 1")
        check(self.delay >= 0, "delay is at least 0")
        check(eventful or (self.events is None and not self.contiguity), f"{self.method} takes no events")
        return results


sparse_attention = define(
    "sparse_attention",
    SparseAttention,
    returns=RETURNS,
    states=STATES,
    grads_from=GRADS_FROM,
    grads_to=GRADS_TO,
)
