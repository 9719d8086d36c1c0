"""``memc::attention``: causal softmax attention over everything that its growing state holds."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from memc.dialect.base import Arguments, Cost, appended, check_heads, define


@dataclass(frozen=True)
class CausalAttention(Arguments):
    """New tokens and those that are held, which most attentions begin with; see :class:`Attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    positions: Tensor
    past_key: Tensor
    past_value: Tensor
    past_positions: Tensor

    def out(self) -> Tensor:
        """Return an uninitialised output ``[B,H,T,E]``."""
        check_heads(self.query, self.key, self.value)
        return self.query.new_empty(*self.query.shape[:3], self.value.shape[3])

    def appended(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return an uninitialised state: keys, values and positions with the new tokens behind those held."""
        return (
            appended(self.past_key, self.key),
            appended(self.past_value, self.value),
            self.positions.new_empty(self.positions.shape[0], self.past_positions.shape[1] + self.positions.shape[1]),
        )


@dataclass(frozen=True)
class Attention(CausalAttention):
    """Attend causally to the held and the new tokens of each sequence.

    ``query [B,H,T,D]``, ``key [B,G,T,D]``, ``value [B,G,T,E]``, ``positions [B,T]`` int64; the state is
    ``past_key [B,G,S,D]``, ``past_value [B,G,S,E]``, ``past_positions [B,S]``. Head ``h`` reads key-value head
    ``h // (H // G)``. Returns the output ``[B,H,T,E]`` and the state with the new tokens appended (``S + T``).

    A query at position p reads a key at position j of its own sequence when j <= p and, where asked,
    p - j < ``window``, p // ``chunk`` == j // ``chunk``. With ``prefix`` n, tokens at positions < n read one
    another too.
    Position 0 starts a sequence: what the state held before is marked -1 and read by nobody; so are tokens at
    position -1 (padding), whose output is 0. Score = ``scale`` q.k, then ``softcap`` tanh(. / softcap) when
    softcap > 0, then + ``slopes [H]`` (j - p) (ALiBi, Press et al. 2022). ``sink_logits [H]`` join the denominator
    without a value. A ``prefix`` must arrive in one call, since earlier tokens read later ones.
    """

    slopes: Tensor | None = None
    sink_logits: Tensor | None = None
    _: KW_ONLY
    scale: float
    window: int = 0
    chunk: int = 0
    prefix: int = 0
    softcap: float = 0.0

    def outputs(self) -> tuple[Tensor, ...]:
        """Return uninitialised tensors of the shapes and types of the results."""
        return (self.out(), *self.appended())

    def cost(self, context: int) -> Cost:
        """Return the work of one token."""
        query, key, value = self.query, self.key, self.value
        held = min([context, *(size for size in (self.window, self.chunk) if size)])
        flops = 2.0 * query.shape[1] * held * (query.shape[3] + value.shape[3])
        return Cost(flops, float(held * key.shape[1] * (key.shape[3] + value.shape[3]) * key.dtype.itemsize))


attention = define(
    "attention",
    Attention,
    returns=("out", "next_key", "next_value", "next_positions"),
    states=("past_key", "past_value", "past_positions"),
    grads_from=("out", "next_key", "next_value"),
    grads_to=("query", "key", "value", "past_key", "past_value", "slopes", "sink_logits"),
)
