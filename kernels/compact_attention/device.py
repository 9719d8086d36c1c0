"""Host code of ``memc::compact_attention`` on a GPU: sum up, describe, score, choose, attend by places.

States in place alone: the functional form runs the reference, since it moves a state as large as what is read of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memc.dialect.compact_attention import REPRESENTATIVES, CompactAttention
from memc.dialect.selectors import SELECTORS
from memc.kernels.attention.slots import write
from memc.kernels.compact_attention import reference
from memc.kernels.compact_attention.choose import Angles, follows
from memc.kernels.launch import DeviceKernels, Gpu, Tile, power_of_two, precision, tile
from memc.kernels.softmax_device import refusal, unordered
from memc.kernels.sparse_attention import steps
from memc.kernels.sparse_attention.choose import Rule
from memc.kernels.sparse_attention.steps import Arguments, Asking, Constants, block_of, in_blocks


def refuses(gpu: Gpu, args: CompactAttention) -> str:
    """Return why the kernels do not take a call; "" where they do."""
    past = (args.past_key, args.past_value, args.past_pages)
    reason = refusal(args.query, args.key, args.value, *past, args.inv_freq, args.sink_logits)
    return reason or unordered(*past, args.past_positions)


@dataclass(frozen=True)
class Held(Asking):
    """Tokens and what they may choose from, their own keys and values among it, and how those are rotated.

    ``key [B,G,N,D]`` and ``value [B,G,N,E]`` are the buffers, of which slot p has the token at position p.
    """

    key: Tensor
    value: Tensor
    angles: Angles

    def cut(self, kernel: str, name: str, most: int) -> Tile:
        """Return the tile of a kernel whose blocks of at most ``most`` tokens, ``name``, have a head's channels."""
        size = max(self.key.shape[3], self.value.shape[3])
        return steps.cut_for(f"compact_attention.{kernel}", name, size, self.key.dtype, self.key.device, most=most)


def in_place(args: CompactAttention) -> tuple[Tensor, Tensor]:
    """Run ``memc::compact_attention_`` on buffers, where slot p holds the token at position p."""
    rule, angles = Rule.of(args), Angles(args.inv_freq.contiguous(), args.interleaved, args.scaling)
    write(args.positions, ((args.key, args.past_key), (args.value, args.past_value)), args.past_positions)
    if args.query.shape[2] > 1:
        args.past_pages.masked_fill_(steps.starts(args.positions, args.past_pages), 0)
    query, positions = args.query.contiguous(), args.positions.contiguous()
    held = Held(query, positions, args.past_pages, args.past_key, args.past_value, angles)
    _gather(held, _brought(held, rule, args.softcap), rule)
    _describe(held, rule)
    return in_blocks(held, rule, lambda part: _attend(part, _chosen(part, rule), args.sink_logits, rule, args.softcap))


def _brought(held: Held, rule: Rule, softcap: float) -> Tensor:
    """Return what each token adds to the sum of its page, ``[B,H,T,D]``, before the mean over a group's heads."""
    if SELECTORS[rule.method].descriptor == "representatives":
        return held.query

    def attend(part: Held) -> tuple[Tensor, Tensor]:
        own = part.positions.div(rule.page, rounding_mode="floor")[:, None, :, None]
        own = own.expand(-1, part.pages.shape[1], -1, -1)
        return _attend(part, own, None, rule, softcap, torch.float32)

    return in_blocks(held, rule, attend)[0].contiguous()


def _gather(held: Held, brought: Tensor, rule: Rule) -> None:
    """Add what tokens bring, ``brought [B,H,T,D]``, to the sums of their pages."""
    size = held.query.shape[3]
    arguments: Arguments = {
        "pages": held.pages,
        "brought": brought,
        "positions": held.positions,
        "last": held.positions.amax(1),
        "tokens": held.tokens,
        "count": held.pages.shape[2],
    }
    constants: Constants = {
        "heads": held.query.shape[1],
        **held.sizes,
        "page": rule.page,
        "block_described": min(1024, block_of(2 * size)),
    }
    cut = held.cut("gather", "block_tokens", 16)
    steps.run("compact_attention.gather", (held.tokens, *held.grid), arguments, constants, cut)


def _describe(held: Held, rule: Rule) -> None:
    """Describe the pages that can be once the tokens have come."""
    page, after = rule.page, follows(rule)
    arguments: Arguments = {
        "pages": held.pages,
        "key": held.key,
        "positions": held.positions,
        "tokens": held.tokens,
        "held": held.key.shape[2],
        "count": held.pages.shape[2],
    }
    constants: Constants = {
        "groups": held.pages.shape[1],
        "size": held.query.shape[3],
        "scale": rule.scale,
        "page": page,
        "follows": after,
        "representatives": min(REPRESENTATIVES, page) if after else 0,
        "block_page": power_of_two(page),
    }
    kind = str(held.key.dtype).removeprefix("torch.")
    default = Tile({"block_channels": 16 if page > 64 else 32}, 4, 1)
    cut = tile("compact_attention.describe", f"{page}-{kind}", default, held.key.device)
    steps.run("compact_attention.describe", (held.tokens, *held.grid), arguments, constants, cut)


def _chosen(held: Held, rule: Rule) -> Tensor:
    """Return the pages ``[B,G,T,K]`` that tokens read for each key-value head: -1 for none, then in order of time."""
    dense = (held.positions < rule.dense_below)[:, None, :, None]
    picked, there = steps.best(steps.scores(held, rule), rule.most, -(-rule.dense_below // rule.page), dense)
    return picked.masked_fill(~there, -1).sort(3).values


def _attend(
    held: Held, chosen: Tensor, sink_logits: Tensor | None, rule: Rule, softcap: float, kind: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return output, of the query's type or of ``kind``, and log-sum-exp over the pages ``chosen [B,G,T,K]``."""
    given: Arguments = {
        "key": held.key,
        "value": held.value,
        "positions": held.positions,
        "inv_freq": held.angles.inv_freq,
        "held": held.key.shape[2],
    }
    constants: Constants = {
        "scale": rule.scale,
        "softcap": softcap,
        # What is rotated has more digits than a half.
        "precision": precision(held.query.device, torch.float32),
        "page": rule.page,
        "window": rule.window if SELECTORS[rule.method].positioner == "clipped" else 0,
        "pairs": held.angles.inv_freq.shape[0],
        "interleaved": held.angles.interleaved,
        "scaling": held.angles.scaling,
    }
    kernel, value_size = "compact_attention.attend", held.value.shape[3]
    cut = held.cut("attend", "block_keys", 32)
    return steps.attend(kernel, held, chosen, value_size, sink_logits, given, constants, cut, unit=rule.page, kind=kind)


KERNELS = DeviceKernels(reference.forward, refuses, in_place=in_place)
