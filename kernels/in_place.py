"""The ops of ``memc.dialect.in_place``: by the functional form and a copy where an op has nothing better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memc.dialect import OpSpec
from memc.dialect.attention import CausalAttention
from memc.dialect.base import Arguments
from memc.dialect.in_place import IN_PLACE, outputs
from memc.kernels.attention.slots import forward as attention
from memc.kernels.attention.slots import write
from memc.kernels.events.reference import in_place as events
from memc.kernels.launch import dispatch
from memc.kernels.registration import DEVICES
from memc.kernels.sparse_attention.slots import forward as sparse_attention

REFERENCES: dict[str, Callable[..., Any]] = {
    "attention": attention,
    "events": events,
    "sparse_attention": sparse_attention,
}
"""Ops whose state is laid out in another way in place than in the functional form."""

PAGED: dict[str, tuple[str, ...]] = {
    "compact_attention": ("past_pages",),
    "quantised_attention": ("past_key", "past_pages"),
    "refreshed_attention": ("past_pages",),
}
"""Ops that append tokens to their state, which have slots in place, by those of their states that have pages."""


def _copied(spec: OpSpec) -> Callable[[Arguments], Any]:
    """Run the functional form and copy the next states over those that it was given."""

    def run(args: Arguments) -> Any:
        results = _functional(spec, args)
        for name, index in spec.states.items():
            getattr(args, name).copy_(results[index])
        return outputs(spec, results)

    return run


def _appended(spec: OpSpec) -> Callable[[CausalAttention], Any]:
    """Run the functional form on the slots and write what it appends to its own: slot p holds the token at p.

    There is a slot more than a sequence may have tokens, for padding. The tokens of a row are of one sequence.
    """

    def run(args: CausalAttention) -> Any:
        results, tokens = _functional(spec, args), []
        for name, index in spec.states.items():
            buffer, following = getattr(args, name), results[index]
            if name in PAGED[spec.name]:
                buffer.copy_(following[:, :, : buffer.shape[2]])
            elif buffer.shape == following.shape:
                buffer.copy_(following)
            elif name != "past_positions":
                tokens.append((following[:, :, buffer.shape[2] :], buffer))
        write(args.positions, tuple(tokens), args.past_positions)
        return outputs(spec, results)

    return run


def _functional(spec: OpSpec, args: Arguments) -> tuple[Tensor, ...]:
    tensors, options = args.unpack()
    results: tuple[Tensor, ...] = spec.overload(*tensors, **options)
    return results


def _reference(spec: OpSpec) -> Callable[..., Any]:
    return REFERENCES.get(spec.name) or (_appended(spec) if spec.name in PAGED else _copied(spec))


for _spec in IN_PLACE.values():
    _run = _spec.taking(dispatch(_spec.name, _reference(_spec), "in_place"))
    torch.library.register_kernel(f"memc::{_spec.name}_", DEVICES, _run)
