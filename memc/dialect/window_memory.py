"""``memc::window_memory``: attention to a sliding window and to the first tokens, with a state of constant size."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from memc.dialect.attention import CausalAttention
from memc.dialect.base import Cost, check, define, log_sum_exp


@dataclass(frozen=True)
class WindowMemory(CausalAttention):
    """Attend to the last ``window`` tokens and the first ``sinks`` tokens (StreamingLLM, Xiao et al. 2024).

    Arguments as in ``memc::attention``; the state holds N = ``sinks + window`` slots: ``past_key [B,G,N,D]``,
    ``past_value [B,G,N,E]``, ``past_positions [B,N]`` with -1 for an empty slot. The token at position p lives in
    slot p when p < ``sinks``, else in slot ``sinks + (p - sinks) % window``.

    A query at position p reads a key at position j of its own sequence when j <= p and (p - j < ``window`` or
    j < ``sinks``). Positions of one sequence rise by one from token to token. Returns
    0. the output ``[B,H,T,E]``, 0 for padding,
    1. the log-sum-exp of each row's scores ``[B,H,T]`` (sink logits included; 0 for padding) in float32, or in float64
       when the query is,
    2. to 4. the token that left the window when this one came: key ``[B,G,T,D]``, value ``[B,G,T,E]`` (zeros when there
       is none) and position ``[B,T]``: p - ``window`` when that is at least ``sinks``, else -1,
    5. to 7. the next state.
    """

    slopes: Tensor | None = None
    sink_logits: Tensor | None = None
    _: KW_ONLY
    scale: float
    window: int
    sinks: int = 0
    softcap: float = 0.0

    def outputs(self) -> tuple[Tensor, ...]:
        """Return uninitialised tensors of the shapes and types of the results."""
        out, slots = self.out(), self.past_key.shape[2]
        check(self.window >= 1 and self.sinks >= 0, "window is at least 1 and sinks at least 0")
        check(slots == self.window + self.sinks, "the state has one slot for each sink and each token of the window")
        left = (self.key, self.value, self.positions)
        held = (self.past_key, self.past_value, self.past_positions)
        return out, log_sum_exp(self.query), *(x.new_empty(x.shape) for x in (*left, *held))

    @property
    def holds_all_to(self) -> int:
        """How many tokens of a sequence its state holds before the first has to go."""
        return self.window + self.sinks

    def cost(self, context: int) -> Cost:
        """Return the work of one token."""
        query, key, value = self.query, self.key, self.value
        slots = self.window + self.sinks
        held = min(context, slots)
        flops = 2.0 * query.shape[1] * held * (query.shape[3] + value.shape[3])
        return Cost(flops, float(slots * key.shape[1] * (key.shape[3] + value.shape[3]) * key.dtype.itemsize))


window_memory = define(
    "window_memory",
    WindowMemory,
    returns=("out", "lse", "left_key", "left_value", "left_positions", "next_key", "next_value", "next_positions"),
    states=("past_key", "past_value", "past_positions"),
    grads_from=("out", "lse", "left_key", "left_value", "next_key", "next_value"),
    grads_to=("query", "key", "value", "past_key", "past_value", "slopes", "sink_logits"),
)
