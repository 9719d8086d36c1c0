"""What every dialect op declares beside its schema: states, split rule, cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("memc", "DEF")

FETCHED = 8192
"""Held tokens past which what every token of a prompt chose is fetched for it, faster than reading all for all."""


@dataclass(frozen=True)
class Cost:
    """Work of one op for one new token of one sequence, at a given number of held tokens."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class OpSpec:
    """One row of the dialect table.

    ``states`` pairs each state argument with the index of the output that carries its next value.
    ``split_invariant``: any way to cut a sequence into calls gives the same outputs; otherwise ``depends_on`` says on
    what the result depends.
    ``reads_all_to`` takes the arguments by name and tells from how many tokens of a sequence on the op chooses what it
    reads, so that shorter ones cannot show whether it chooses right; None where it does not choose.
    ``cost`` takes the node's argument tensors (fake or real) by name, the other arguments, and the context length.
    """

    name: str
    schema: str
    states: Mapping[str, int]
    split_invariant: bool
    mixes_tokens: bool
    cost: Callable[[Mapping[str, Any], int], Cost]
    depends_on: str = ""
    reads_all_to: Callable[[Mapping[str, Any]], int] | None = None

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The callable that appears as a graph node's target."""
        overload: torch._ops.OpOverload = getattr(torch.ops.memc, self.name).default
        return overload

    def prompt_flops(self, values: Mapping[str, Any], context: int) -> float:
        """Return the operations of one token of a prompt, by arguments as ``cost`` takes them.

        Where the tokens of a prompt choose what they read, each for itself, they are faster if all read everything and
        leave out the rest than if each fetches its own, as a single token does.
        """
        reach = self.reads_all_to(values) if self.reads_all_to is not None else context
        if context <= reach:
            return self.cost(values, context).flops
        return self.cost(values, reach).flops * max(reach, min(context, FETCHED)) / reach

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Name the arguments of a call, defaults filled in."""
        bound: dict[str, Any] = {}
        for index, argument in enumerate(self.overload._schema.arguments):
            if index < len(args):
                bound[argument.name] = args[index]
            elif argument.name in kwargs:
                bound[argument.name] = kwargs[argument.name]
            elif argument.has_default_value():
                bound[argument.name] = argument.default_value
        return bound


def define(
    name: str,
    schema: str,
    *,
    states: Mapping[str, int] | None = None,
    split_invariant: bool = True,
    mixes_tokens: bool = True,
    cost: Callable[[Mapping[str, Any], int], Cost],
    depends_on: str = "",
    reads_all_to: Callable[[Mapping[str, Any]], int] | None = None,
) -> Callable[[Callable[..., Any]], OpSpec]:
    """Define ``memc::name`` and take the decorated function as its fake kernel."""

    def decorate(fake: Callable[..., Any]) -> OpSpec:
        LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"memc::{name}", fake)
        return OpSpec(name, schema, dict(states or {}), split_invariant, mixes_tokens, cost, depends_on, reads_all_to)

    return decorate


def check(condition: bool, message: str) -> None:
    """Raise ``RuntimeError`` with ``message`` when an op is given arguments that do not fit."""
    torch._check(condition, lambda: message)


def check_heads(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Check ranks, head grouping and sizes of ``query [B,H,T,D]``, ``key [B,G,T,D]`` and ``value [B,G,T,E]``."""
    check(query.dim() == key.dim() == value.dim() == 4, "query, key and value are [batch, heads, tokens, channels]")
    check(query.shape[1] % key.shape[1] == 0, "the number of heads is a multiple of the number of key-value heads")
    check(key.shape[1] == value.shape[1], "key and value have the same number of heads")
    check(query.shape[3] == key.shape[3], "query and key have the same head size")
