"""Host code of ``memc::quantised_attention`` on a GPU: codes of what comes, choose, rank again, attend.

States in place alone: the functional form runs the reference, since it moves a state as large as what is read of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memc.dialect.quantised_attention import QuantisedAttention, code_bytes
from memc.kernels.attention.slots import write
from memc.kernels.launch import DeviceKernels, Gpu, Tile, power_of_two, precision, tile
from memc.kernels.quantised_attention import reference
from memc.kernels.softmax_device import refusal, unordered
from memc.kernels.sparse_attention import steps
from memc.kernels.sparse_attention.choose import Rule
from memc.kernels.sparse_attention.steps import Arguments, Asking, Constants, block_of, in_blocks


def refuses(gpu: Gpu, args: QuantisedAttention) -> str:
    """Return why the kernels do not take a call; "" where they do."""
    held = (args.past_pages, args.past_ranges, args.past_key_tail, args.past_value_tail)
    reason = refusal(args.query, args.key, args.value, *held, args.sink_logits)
    return reason or unordered(args.past_key, args.past_value, args.past_positions, *held)


@dataclass(frozen=True)
class Held(Asking):
    """Tokens and what they may choose from.

    ``codes [B,G,P,page,.]``, ``value_codes [B,G,N,.]`` and ``ranges [B,G,N,2]`` as the op has them in place, ``key``
    and ``value [B,G,X,.]`` the tails before the call with the call appended, and ``places [B,L]`` int32, where the
    tokens at each position are in these, -1 for none; all are contiguous.
    """

    codes: Tensor
    value_codes: Tensor
    ranges: Tensor
    key: Tensor
    value: Tensor
    places: Tensor
    bits: int

    @property
    def arguments(self) -> dict[str, Tensor]:
        """What is read as it is, and where."""
        return {"key": self.key, "value": self.value, "places": self.places, "positions": self.positions}

    @property
    def lengths(self) -> dict[str, int]:
        """How many pages, slots, rows and places there are."""
        return {
            "count": self.pages.shape[2],
            "slots": self.ranges.shape[2],
            "exact": self.key.shape[2],
            "length": self.places.shape[1],
        }

    @property
    def coded(self) -> Constants:
        """Constants of the kernels that read codes of keys."""
        page, key_bytes = self.codes.shape[3:]
        return {"page": page, "bits": self.bits, "key_bytes": key_bytes}

    def cut(self, kernel: str, name: str) -> Tile:
        """Return the tile of a kernel that reads keys, and perhaps values."""
        size = max(self.query.shape[3], self.value.shape[3])
        # Codes and both ends of their ranges take more registers than keys do.
        return steps.cut_for(f"quantised_attention.{kernel}", name, size, self.key.dtype, self.key.device, most=32)


def in_place(args: QuantisedAttention) -> tuple[Tensor, Tensor]:
    """Run ``memc::quantised_attention_`` on buffers, where slot p holds the value at position p."""
    rule = Rule.of(args, method="bounds", own_page=True)
    exact = torch.cat([_in_tail(args.past_positions, args.positions, rule.page), args.positions], 1)
    held = Held(
        args.query.contiguous(),
        args.positions.contiguous(),
        args.past_pages,
        args.past_key,
        args.past_value,
        args.past_ranges,
        torch.cat([args.past_key_tail, args.key], 2),
        torch.cat([args.past_value_tail, args.value], 2),
        steps.places_of(exact, args.past_pages.shape[2] * rule.page),
        args.bits,
    )
    write(args.positions, (), args.past_positions)
    _hold(held, args.past_key_tail, args.past_value_tail)

    def attend(part: Held) -> tuple[Tensor, Tensor]:
        chosen = steps.choose(part, rule, lambda candidates: _ranked(part, candidates, rule))
        own = chosen // rule.page == (part.positions // rule.page)[:, None, :, None]
        return _attend(part, chosen.masked_fill(own, -1), args)

    return in_blocks(held, rule, attend)


def _in_tail(past_positions: Tensor, positions: Tensor, page: int) -> Tensor:
    """Return the position ``[B,page]`` of each token in the tails, -1 where there is none, before a call."""
    held = past_positions.amax(1, keepdim=True) + 1
    held = held.masked_fill((positions == 0).any(1, keepdim=True), 0)
    slot = torch.arange(page, device=positions.device)
    return torch.where(slot < held % page, held // page * page + slot, -1)


def _hold(held: Held, key_tail: Tensor, value_tail: Tensor) -> None:
    page, value_size = held.codes.shape[3], held.value.shape[3]
    value_bytes = code_bytes(value_size, held.bits)
    kind = str(held.key.dtype).removeprefix("torch.")
    default = Tile({"block_channels": 16 if page > 64 else 32}, 4, 1)
    cut = tile("quantised_attention.hold", f"{page}-{kind}", default, held.key.device)
    arguments: Arguments = {
        "codes": held.codes,
        "value_codes": held.value_codes,
        "pages": held.pages,
        "ranges": held.ranges,
        "key_tail": key_tail,
        "value_tail": value_tail,
        **held.arguments,
        "last": held.positions.amax(1),
        "tokens": held.tokens,
        **{name: held.lengths[name] for name in ("slots", "exact", "length", "count")},
    }
    constants: Constants = {
        **held.sizes,
        **held.coded,
        "value_size": value_size,
        "value_bytes": value_bytes,
        "block_page": power_of_two(page),
        "block_value": block_of(value_size),
        "block_values": block_of(value_bytes),
    }
    steps.run("quantised_attention.hold", (held.tokens, *held.grid), arguments, constants, cut)


def _ranked(held: Held, candidates: Tensor, rule: Rule) -> Tensor:
    """Return the scores ``[B,G,T,K]`` of candidates by q.k with k as it is read."""
    given: Arguments = {"codes": held.codes, "pages": held.pages, "count": held.pages.shape[2]}
    cut = held.cut("rank", "block_tokens")
    return steps.rank("quantised_attention.rank", held, rule, candidates, given, held.coded, cut)


def _attend(held: Held, chosen: Tensor, args: QuantisedAttention) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp over the own pages and the tokens at ``chosen [B,G,T,K]``, -1 for none."""
    value_size = held.value.shape[3]
    given: Arguments = {
        "codes": held.codes,
        "pages": held.pages,
        "value_codes": held.value_codes,
        "ranges": held.ranges,
        **held.arguments,
        **held.lengths,
    }
    constants: Constants = {
        **held.coded,
        "value_bytes": code_bytes(value_size, held.bits),
        "scale": args.scale,
        "softcap": args.softcap,
        # What codes are read as has more digits than a half.
        "precision": precision(held.query.device, torch.float32),
    }
    cut = held.cut("attend", "block_keys")
    return steps.attend("quantised_attention.attend", held, chosen, value_size, args.sink_logits, given, constants, cut)


KERNELS = DeviceKernels(reference.forward, refuses, in_place=in_place)
