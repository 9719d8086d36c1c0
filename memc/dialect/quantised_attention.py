"""``memc::quantised_attention``: ``memc::sparse_attention`` by bounds over keys and values of few bits."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from memc.dialect.attention import CausalAttention
from memc.dialect.base import Cost, check, define, log_sum_exp
from memc.dialect.sparse_attention import check_pages, pages_of

BITS = (8, 4)
"""Bits that a channel of a key or value may be held in."""


def code_bytes(channels: int, bits: int) -> int:
    """Return the bytes that hold ``channels`` codes of ``bits`` bits."""
    return (channels * bits + 7) // 8


@dataclass(frozen=True)
class QuantisedAttention(CausalAttention):
    """Attend causally to at most ``budget`` tokens whose keys and values are held in ``bits`` (8 or 4) bits a channel.

    Arguments not named here as in ``memc::sparse_attention`` with the method ``bounds``. Keys are rounded channel by
    channel within their page, values token by token (KIVI, Liu et al. 2024), to the nearest of 2^bits evenly spaced
    levels from the smallest to the largest of the numbers that are rounded together:

    - ``past_key [B,G,ceil(S/page),page,ceil(D bits/8)]`` and ``past_value [B,G,S,ceil(E bits/8)]``, bytes: the numbers
      of the levels; with 4 bits the first half of the channels in the low halves of the bytes, the others in the high;
    - ``past_pages [B,G,ceil(S/page),2D]``: largest and smallest of each channel of a page's keys, which is at once
      what its codes are read by and the bound that it is chosen by;
    - ``past_ranges [B,G,S,2]``: largest and smallest channel of each value;
    - ``past_key_tail [B,G,page,D]``, ``past_value_tail [B,G,page,E]``: keys and values at the positions of the page
      that is not complete, 0 for those to come.

    A query at position p reads its own page, number floor(p / page), as it is, up to p, and any earlier page through
    its codes: what it reads depends on p alone, and not on how the sequence is cut into calls. Its own page is always
    among what is chosen, also where tokens are ranked one by one (``rerank`` over 1). Sequences of at most ``page``
    tokens are attended to exactly.

    Returns output and log-sum-exp as ``memc::sparse_attention``, then the next states in the order of the arguments.
    Choosing has no gradient. Rounding has that of the identity (straight through, Bengio et al. 2013), towards the
    keys and values of this call and of the tails; codes and ranges have none.
    """

    rounds: ClassVar[bool] = True

    past_pages: Tensor
    past_ranges: Tensor
    past_key_tail: Tensor
    past_value_tail: Tensor
    sink_logits: Tensor | None = None
    _: KW_ONLY
    scale: float
    bits: int
    page: int
    budget: int
    sinks: int
    window: int
    rerank: int = 1
    dense_below: int = 0
    softcap: float = 0.0

    def outputs(self) -> tuple[Tensor, ...]:
        """Return uninitialised tensors of the shapes and types of the results."""
        out, (batch, groups, tokens, size), value_size = self.out(), self.key.shape, self.value.shape[3]
        check(self.bits in BITS, f"bits is one of {', '.join(map(str, BITS))}")
        check(self.rerank >= 1, "rerank is at least 1")
        check_pages(self.page, self.budget, self.sinks, self.window)
        held = self.past_positions.shape[1] + tokens
        pages = pages_of(held, self.page)

        def codes(*sizes: int) -> Tensor:
            return torch.empty(batch, groups, *sizes, dtype=torch.uint8, device=self.query.device)

        return (
            out,
            log_sum_exp(self.query),
            codes(pages, self.page, code_bytes(size, self.bits)),
            codes(held, code_bytes(value_size, self.bits)),
            self.positions.new_empty(batch, held),
            self.key.new_empty(batch, groups, pages, 2 * size),
            self.value.new_empty(batch, groups, held, 2),
            self.key.new_empty(batch, groups, self.page, size),
            self.value.new_empty(batch, groups, self.page, value_size),
        )

    @property
    def reads_all_to(self) -> int:
        """From how many tokens of a sequence on it chooses what it reads."""
        return max(self.budget, self.dense_below)

    def cost(self, context: int) -> Cost:
        """Return the work of one token."""
        query, key, value, bits, page = self.query, self.key, self.value, self.bits, self.page
        size, value_size, width = key.shape[3], value.shape[3], key.dtype.itemsize
        read, scored = context, context
        if context > self.dense_below:
            read, scored = min(context, self.budget), min(context, self.rerank * self.budget)
        exact = min(context, page)
        described = pages_of(context, page) * 2 * size
        channels = described + scored * size + read * value_size
        coded = (scored - exact) * code_bytes(size, bits) + (read - exact) * (code_bytes(value_size, bits) + 2 * width)
        bytes_ = (described + exact * (size + value_size)) * width + coded
        return Cost(2.0 * query.shape[1] * channels, float(bytes_ * key.shape[1]))


STATES = (
    "past_key",
    "past_value",
    "past_positions",
    "past_pages",
    "past_ranges",
    "past_key_tail",
    "past_value_tail",
)

quantised_attention = define(
    "quantised_attention",
    QuantisedAttention,
    returns=("out", "lse", *(f"next_{state.removeprefix('past_')}" for state in STATES)),
    states=STATES,
    grads_from=("out", "lse", "next_key_tail", "next_value_tail"),
    grads_to=("query", "key", "value", "past_key_tail", "past_value_tail", "sink_logits"),
)
