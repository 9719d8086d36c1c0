"""Which attention blocks a pass rewrites: the ``keep`` option and the refusals that several passes share."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from memc.blocks import (
    AttentionBlock,
    Bidirectional,
    Chunked,
    OtherBias,
    OtherMask,
    Prefix,
    RelativeBias,
)
from memc.errors import MemcError
from memc.head_split import HeadSplit
from memc.pipeline import Plan, Rejection, Site
from memc.program import Program
from memc.raising import find_blocks
from memc.raising.evaluate import ancestors
from memc.rewrite import owns_its_states

Refusal = tuple[str, str]
"""Code and reason of a rejection."""

Group = tuple[int, int]
"""A layer, and one of its key-value heads with the query heads that read it."""

KEEP_HELP = "layers that stay as they are: none, every:N (N-1, 2N-1, ...), first:N, last:N, or a list [0,5,7]"

AUTO_HELP = (
    KEEP_HELP + "; auto:P%, the P percent that training finds to need it most; auto is auto:25% when trained, else none"
    "; heads:P%, the P percent of all key-value heads whose query heads look up earlier tokens most, or heads:[3.0,3.2]"
    " to name them as LAYER.HEAD: the other heads are rewritten"
)

AUTO_SHARE = 0.25

_AUTO = re.compile(r"auto(?::([0-9]+(?:\.[0-9]+)?)%)?")
_COUNTED = re.compile(r"(every|first|last):([1-9][0-9]*)")
_HEADS = re.compile(
    r"heads:(?:(?P<share>[0-9]+(?:\.[0-9]+)?)%|\[\s*(?:[0-9]+\.[0-9]+\s*(?:,\s*[0-9]+\.[0-9]+\s*)*)?\])"
)
_DECAY = re.compile(r"decay:(?P<share>[0-9]+(?:\.[0-9]+)?)%")
_LISTED = re.compile(r"\[\s*([0-9]+\s*(,\s*[0-9]+\s*)*)?\]")


def attention_blocks(program: Program) -> tuple[AttentionBlock, ...]:
    """Return the attention blocks of a raised program."""
    return tuple(block for block in find_blocks(program) if isinstance(block, AttentionBlock))


def check_keep(pass_name: str, keep: str) -> None:
    """Raise ``MemcError`` E203 when ``keep`` is not of the forms in ``KEEP_HELP``."""
    if keep != "none" and not _COUNTED.fullmatch(keep) and not _LISTED.fullmatch(keep):
        raise MemcError(
            "E203",
            "option 'keep' is none, every:N, first:N, last:N or a list of layers",
            where=f"{pass_name}:keep={keep}",
            next=f"write {pass_name}:keep=every:4 or {pass_name}:keep=[0,5,7]",
        )


def auto_share(keep: str) -> float | None:
    """Return the share of the layers that ``keep=auto`` leaves to training to choose, None for any other form."""
    match = _AUTO.fullmatch(keep)
    share = float(match[1]) / 100 if match and match[1] else AUTO_SHARE
    return share if match and share <= 1 else None


def listed(layers: Iterable[int]) -> str:
    """Write layers as the option ``keep`` has them."""
    return f"[{','.join(map(str, sorted(layers)))}]"


def all_but(layers: Collection[int], present: Collection[int]) -> str:
    """Write the option ``keep`` that rewrites ``layers`` alone of those ``present``."""
    others = set(present) - set(layers)
    return listed(others) if others else "none"


def check_heads(pass_name: str, keep: str, option: str = "keep") -> bool:
    """Tell whether an option is about heads; raises ``MemcError`` E203 when it is and not of the form."""
    if not keep.startswith("heads"):
        return False
    match = _HEADS.fullmatch(keep)
    if match is None or (match["share"] and not 0 < float(match["share"]) < 100):
        raise MemcError(
            "E203",
            f"option '{option}' names heads as heads:P%, P between 0 and 100, or as a list LAYER.HEAD",
            where=f"{pass_name}:{option}={keep}",
            next=f"write {pass_name}:{option}=heads:10% or {pass_name}:{option}=heads:[3.0,3.2]",
        )
    return True


def heads_share(keep: str) -> float | None:
    """Return the share of key-value heads that ``keep=heads:P%`` leaves to the weights to choose, None otherwise."""
    match = _HEADS.fullmatch(keep)
    return float(match["share"]) / 100 if match and match["share"] else None


def decay_share(option: str) -> float | None:
    """Return the share of key-value heads that ``decay:P%`` leaves to the weights to choose, None otherwise."""
    match = _DECAY.fullmatch(option)
    return float(match["share"]) / 100 if match else None


def listed_groups(groups: Iterable[Group]) -> str:
    """Write groups of heads as the option ``keep`` has them."""
    return f"heads:[{','.join(f'{layer}.{group}' for layer, group in sorted(groups))}]"


def kept_groups(
    keep: str, blocks: Iterable[AttentionBlock], open_blocks: Iterable[AttentionBlock], option: str = "keep"
) -> frozenset[Group]:
    """Return the groups of heads that an option names.

    A share that is still open stands for as many groups of ``open_blocks``, evenly spread. Raises ``MemcError`` E203
    for a group that no block has.
    """
    if (share := heads_share(keep)) is not None:
        known = groups_of(open_blocks)
        count = round(share * len(known))
        return frozenset(known[(2 * index + 1) * len(known) // (2 * count)] for index in range(count))
    if _HEADS.fullmatch(keep) is None:
        return frozenset()
    named = {(int(layer), int(group)) for layer, group in re.findall(r"([0-9]+)\.([0-9]+)", keep)}
    if missing := sorted(named - set(groups_of(blocks))):
        (layer, group), (last, most) = missing[0], max(groups_of(blocks), default=(-1, -1))
        have = f"layers 0 to {last}, heads 0 to {most} in the last" if last >= 0 else "no attention layer"
        raise MemcError(
            "E203", f"option '{option}' names key-value head {layer}.{group}", keep, f"the model has {have}"
        )
    return frozenset(named)


def keeping(chosen: Iterable[Site], heads: Collection[Group]) -> tuple[Site, ...]:
    """Return sites with those of ``heads`` that are theirs as what they keep."""
    of = {site: tuple(sorted(group for layer, group in heads if layer == site.layer)) for site in chosen}
    return tuple(replace(site, kept=kept) for site, kept in of.items())


def groups_of(blocks: Iterable[AttentionBlock]) -> list[Group]:
    """Return every group of heads of some blocks."""
    return [(block.layer, group) for block in blocks for group in range(block.num_kv_heads)]


def kept_layers(keep: str, layers: Iterable[int]) -> frozenset[int]:
    """Return the layers that ``keep`` names, out of ``layers``.

    Raises ``MemcError`` E203 for a list that names a layer that is not there.
    """
    if auto_share(keep) is not None or _HEADS.fullmatch(keep):
        return frozenset()
    known = sorted(set(layers))
    if match := _COUNTED.fullmatch(keep):
        count = int(match[2])
        chosen = {
            "every": [layer for layer in known if (layer + 1) % count == 0],
            "first": known[:count],
            "last": known[-count:],
        }
        return frozenset(chosen[match[1]])
    named = {int(number) for number in re.findall("[0-9]+", keep)}
    if missing := sorted(named - set(known)):
        have = f"layers {known[0]} to {known[-1]}" if known else "no attention layer"
        raise MemcError("E203", f"option 'keep' names layer {missing[0]}", where=keep, next=f"the model has {have}")
    return frozenset(named)


def choose_sites(
    blocks: Sequence[AttentionBlock],
    keep: str,
    refuse: Callable[[AttentionBlock], Refusal | None],
    heads: frozenset[Group] = frozenset(),
) -> tuple[tuple[Site, ...], tuple[Rejection, ...]]:
    """Split blocks into sites and rejections, in order; what cannot be rewritten says so even where it is kept.

    Groups in ``heads`` stay as they are, and so does a block of which all are in it.
    """
    kept = kept_layers(keep, (block.layer for block in blocks))
    sites: list[Site] = []
    rejections: list[Rejection] = []
    for block in blocks:
        refusal = refuse(block)
        if refusal is None and block.layer in kept:
            refusal = ("kept", f"the option keep={keep} leaves this layer as it is")
        elif refusal is None and heads.issuperset(groups_of([block])):
            refusal = ("kept", "the option keep leaves every head of this layer as it is")
        if refusal is None:
            stay = tuple(group for layer, group in groups_of([block]) if (layer, group) in heads)
            sites.append(Site(block.layer, block.path, block.kind, stay))
        else:
            rejections.append(Rejection(block.layer, block.path, block.kind, *refusal))
    return tuple(sites), tuple(rejections)


def planned_blocks(program: Program, plan: Plan) -> tuple[tuple[AttentionBlock, HeadSplit], ...]:
    """Return the blocks of a program, or of a copy of it, that a plan made for it rewrites, and which heads stay."""
    planned = {(site.layer, site.path): site.kept for site in plan.sites}
    return tuple(
        (block, HeadSplit(block.num_kv_heads, block.num_heads // block.num_kv_heads, planned[block.layer, block.path]))
        for block in attention_blocks(program)
        if (block.layer, block.path) in planned
    )


def by_layer(blocks: Iterable[AttentionBlock], facts: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return facts of blocks as a report has them: by layer, of a second block of the same layer as ``3 (2)``."""
    found: dict[str, dict[str, Any]] = {}
    seen: Counter[int] = Counter()
    for block, told in zip(blocks, facts, strict=True):
        seen[block.layer] += 1
        count = seen[block.layer]
        found[str(block.layer) if count == 1 else f"{block.layer} ({count})"] = told
    return found


def placed_before_rotation(program: Program, block: AttentionBlock) -> bool:
    """Tell whether what a block has for queries and keys before rotation depends on positions all the same.

    So it is where a part of every head is rotated by itself (multi-head latent attention).
    """
    places = {n for n, spec in zip(program.placeholders(), program.inputs, strict=False) if spec.role == "positions"}
    before = ancestors([block.query_pre_rotary, block.key_pre_rotary], [] if block.hidden is None else [block.hidden])
    return not places.isdisjoint(before)


def refuse_constant_state(program: Program, block: AttentionBlock) -> Refusal | None:
    """Return why the growing state of a block cannot become one of constant size, or None when it can.

    Codes: ``encoder``, ``cross_attention``, ``shared_kv``, ``bidirectional``, ``chunked``, ``prefix``, ``mask``,
    ``relative_bias``, ``bias``, ``not_streamable``.
    """
    if not program.model.decoder:
        return "encoder", "the model is no decoder: there is no sequence that goes on"
    if block.kind == "cross_attention" or block.kv_source == "cross":
        return "cross_attention", "keys and values come from another sequence, which does not grow"
    match block.mask:
        case Bidirectional():
            return "bidirectional", "tokens read tokens that come later"
        case Chunked(size):
            return "chunked", f"tokens read only their own chunk of {size}, which a sliding window cannot express"
        case Prefix(size):
            return "prefix", f"the first {size} tokens read one another and must arrive together"
        case OtherMask(reason):
            return "mask", f"the mask is of no known form: {reason}"
        case _:
            pass
    match block.bias:
        case RelativeBias():
            return "relative_bias", "a learned bias of the distance is added to the scores"
        case OtherBias(reason):
            return "bias", f"a bias of no known form is added to the scores: {reason}"
        case _:
            pass
    if block.kv_source != "self" or not owns_its_states(program, block.attention):
        return "shared_kv", "keys and values are shared with another layer, which reads all of them"
    if not block.streamable or block.attention.target is not torch.ops.memc.attention.default:
        return "not_streamable", "the block cannot run on a sequence in pieces"
    return None
