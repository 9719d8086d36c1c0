"""``memc::events``: where the past is cut into events, by what surprised the model and by the likeness of keys."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from memc.dialect.base import Arguments, Cost, check, define

REFINEMENTS = ("modularity", "conductance", "none")
"""What the place of a boundary is chosen by, around where the model was surprised."""


NEAR = 1e-5
"""Modularities, or conductances, that differ by no more are as good as equal: a key that is like no other in reach may
stand on either side, which no rounding is to decide."""


@dataclass(frozen=True)
class Events(Arguments):
    """Number the events of each sequence (EM-LLM, Fountas et al. 2024, arXiv 2407.09450, algorithm 1).

    ``logits [B,T,V]``, ``tokens`` and ``positions [B,T]`` int64, ``key [B,G,T,D]``; the state is ``past_logits [B,V]``,
    those of the last token held; ``past_surprises [B,R]``, the last R surprises, that of position p in slot p % R;
    ``past_keys [B,G,N,D]``, the last N = ``longest`` + 1 keys, that of position p in slot p % N; ``past_events [B,S]``
    int64, the number of each token's event, -1 where it is not known yet; and ``past_positions [B,S]``.

    The surprise of the token at p > 0 is -log of the probability that the logits before it gave it. An event begins at
    position 0, and may end before each p behind its first position a: where the surprise is above the mean of those of
    the last R tokens before p (from position 1 on, one at least) by more than ``gamma`` of their standard deviations,
    and where p - a = ``longest``. Then it ends before x, the next one begins there, and the tokens from a to x - 1 have
    their number: 0, 1, 2, ... With ``refine`` ``none`` x is p. Else the keys at a to p are the nodes of a graph whose
    edges weigh max(0, c), c the mean over heads of the cosine of two keys less the mean of all of them, 0 from a key to
    itself, and x, of a + 1 to p, cuts it in two at the highest modularity, or at the lowest conductance; of those
    within ``NEAR`` of that the last.

    So an event has 1 to ``longest`` tokens, and the number of each is known when the token ``longest`` behind it has
    come. Position 0 starts a sequence and clears what is held; padding (-1) does nothing. Any split gives the same.
    Returns the surprises ``[B,T]`` in float32, or in float64 when the logits are (0 at position 0 and for padding), and
    the next state, the last two of which are appended to. Nothing has a gradient.
    """

    logits: Tensor
    tokens: Tensor
    positions: Tensor
    key: Tensor
    past_logits: Tensor
    past_surprises: Tensor
    past_keys: Tensor
    past_events: Tensor
    past_positions: Tensor
    _: KW_ONLY
    gamma: float
    longest: int
    refine: str = "modularity"

    def outputs(self) -> tuple[Tensor, ...]:
        """Return uninitialised tensors of the shapes and types of the results."""
        check(self.logits.dim() == 3 and self.key.dim() == 4, "logits are [B,T,V] and keys [B,G,T,D]")
        check(self.longest >= 1, "an event has at least 1 token")
        check(self.refine in REFINEMENTS, f"refine is one of {', '.join(REFINEMENTS)}")
        check(self.past_keys.shape[2] == self.longest + 1, "one key more is held than an event has tokens")
        batch, slots = self.positions.shape[0], self.past_events.shape[1] + self.positions.shape[1]
        fixed = (self.past_logits, self.past_surprises, self.past_keys)
        grown = (self.positions.new_empty(batch, slots), self.positions.new_empty(batch, slots))
        kind = torch.promote_types(self.logits.dtype, torch.float32)
        return self.logits.new_empty(self.positions.shape, dtype=kind), *(x.new_empty(x.shape) for x in fixed), *grown

    def cost(self, context: int) -> Cost:
        """Return the work of one token: its surprise, and the likeness of its key and those held."""
        keys, size = self.past_keys.shape[1] * self.past_keys.shape[2] * self.past_keys.shape[3], self.longest + 1
        vocabulary = self.logits.shape[2]
        held = vocabulary + self.past_surprises.shape[1] + keys
        return Cost(2.0 * (vocabulary + keys * size / self.longest), float(held * self.past_logits.dtype.itemsize))


events = define(
    "events",
    Events,
    returns=("surprise", "next_logits", "next_surprises", "next_keys", "next_events", "next_positions"),
    states=("past_logits", "past_surprises", "past_keys", "past_events", "past_positions"),
    grads_from=(),
    grads_to=(),
)
