"""``memc::linear_memory``: an associative memory of constant size, read and written once per token."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from memc.dialect.base import Arguments, Cost, check, check_heads, define


@dataclass(frozen=True)
class LinearMemory(Arguments):
    """Decay, write and read a matrix memory per key-value head.

    ``query [B,H,T,K]``, ``key [B,G,T,K]``, ``value [B,G,T,V]`` (features already mapped), ``log_decay [B,G,T,K]`` or
    ``[B,G,T,1]`` <= 0, ``beta [B,G,T]`` write strength (``gated_delta`` only), ``positions [B,T]``,
    ``state [B,G,K,V]`` float32. Returns ``[B,H,T,V]`` and the next state. In order of tokens, with g = log_decay:

    - ``gated``: S = exp(g) S + k v^T, o = S^T q (GLA, Yang et al. 2024, eq. 4; scalar g as in Lizard);
    - ``gated_delta``: S = exp(g) S, S = S + beta k (v - S^T k)^T, o = S^T q (Gated DeltaNet, Yang et al. 2025, eq. 10);
      the caller normalises the keys.

    The output reads the state after this token's write. Position -1 reads nothing (output 0), writes nothing, decays
    nothing; position 0 clears the state before its own write.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor
    positions: Tensor
    state: Tensor
    beta: Tensor | None = None
    _: KW_ONLY
    update: str = "gated"

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Return uninitialised tensors of the shapes and types of the results."""
        check_heads(self.query, self.key, self.value)
        check(self.update in ("gated", "gated_delta"), "update is gated or gated_delta")
        gates = self.log_decay.shape[3] in (1, self.key.shape[3])
        check(gates, "log_decay has one value per key channel or one per head")
        check((self.beta is not None) == (self.update == "gated_delta"), "beta goes with gated_delta")
        out = self.query.new_empty(*self.query.shape[:3], self.value.shape[3])
        return out, self.state.new_empty(self.state.shape)

    def cost(self, context: int) -> Cost:
        """Return the work of one token."""
        query, key, value = self.query, self.key, self.value
        cell = key.shape[3] * value.shape[3]
        flops = 2.0 * query.shape[1] * cell + 3.0 * key.shape[1] * cell
        return Cost(flops, 2.0 * key.shape[1] * cell * self.state.dtype.itemsize)


linear_memory = define(
    "linear_memory",
    LinearMemory,
    returns=("out", "next_state"),
    states=("state",),
    grads_from=("out", "next_state"),
    grads_to=("query", "key", "value", "log_decay", "state", "beta"),
)
