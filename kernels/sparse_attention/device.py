"""Host code of ``memc::sparse_attention`` on a GPU: describe, score, choose, rank again, attend.

The functional form takes one token at a time; states in place also take prompts, in blocks of tokens that each choose
for themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from memc.kernels.attention.slots import write
from memc.kernels.common import held_positions
from memc.kernels.launch import DeviceKernels, Gpu, Launch, Tile, launch, power_of_two, precision, tile
from memc.kernels.softmax_device import merge, refusal, splits, unordered
from memc.kernels.sparse_attention import reference
from memc.kernels.sparse_attention.choose import Rule

Constants = dict[str, int | float | bool | str]

METHODS = ("bounds", "moments", "hcam", "lowbit")
# Entries of what has one for each token of a block and each page or candidate: 64 MB of scores.
BLOCK_ENTRIES = 1 << 24
# Blocks along the second and third axis of a grid.
MOST_BLOCKS = 65535


def refuses(gpu: Gpu, *args: Any, **options: Any) -> str:
    """Return why the kernels do not take a call; "" where they do."""
    query, key, value, _positions, past_key, past_value, past_positions, past_pages, *rest = args
    if options["method"] not in METHODS:
        return f"method {options['method']}"
    if options.get("mass", 1) < 1:
        return "a budget by mass"
    reason = refusal(query, key, value, past_key, past_value, past_pages, *rest)
    return reason or unordered(past_key, past_value, past_positions, past_pages)


@dataclass(frozen=True)
class Held:
    """What tokens may choose from: keys and values with their own appended, and where each position is.

    ``key [B,G,N,D]``, ``value [B,G,N,E]``, ``pages [B,G,P,...]``, ``places [B,L]`` int32, and the tokens' ``query
    [B,H,T,D]`` and ``positions [B,T]``; all are contiguous.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    pages: Tensor
    places: Tensor
    positions: Tensor

    @property
    def tokens(self) -> int:
        """Tokens that choose."""
        return self.query.shape[2]

    @property
    def sizes(self) -> dict[str, int]:
        """Constants that every kernel takes."""
        return {"groups": self.key.shape[1], "size": self.key.shape[3], "block_size": _power(self.key.shape[3])}

    @property
    def rows(self) -> dict[str, int]:
        """Constants of the kernels that read queries."""
        heads = self.query.shape[1]
        return {**self.sizes, "heads": heads, "block_rows": _power(heads // self.key.shape[1])}

    def part(self, tokens: slice) -> Held:
        """Return the same for some of the tokens."""
        query, positions = self.query[:, :, tokens].contiguous(), self.positions[:, tokens].contiguous()
        return replace(self, query=query, positions=positions)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_positions: Tensor,
    past_pages: Tensor,
    sink_logits: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run ``memc::sparse_attention``; arguments and results as its dialect page has them.

    More than one token at a time, which may be of several sequences, are left to the reference.
    """
    if query.shape[2] > 1:
        past = past_key, past_value, past_positions, past_pages
        return reference.forward(query, key, value, positions, *past, sink_logits, **options)
    rule, softcap = _rule(**options)
    next_positions = held_positions(past_positions, positions)
    count = -(-next_positions.shape[1] // rule.page)
    held = Held(
        query.contiguous(),
        torch.cat([past_key, key], 2),
        torch.cat([past_value, value], 2),
        _pages(past_pages, positions, count),
        _places(next_positions, count * rule.page),
        positions.contiguous(),
    )
    out, lse = _run(held, rule, sink_logits, softcap)
    return out, lse, held.key, held.value, next_positions, held.pages


def in_place(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_positions: Tensor,
    past_pages: Tensor,
    sink_logits: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Run ``memc::sparse_attention_`` on buffers, as :func:`memc.kernels.sparse_attention.slots.forward` does."""
    rule, softcap = _rule(**options)
    write(positions, ((key, past_key), (value, past_value)), past_positions)
    if query.shape[2] > 1:
        past_pages.masked_fill_(_starts(positions, past_pages), 0)
    # The token at position p lies in slot p: what is held there is its own place.
    places = past_positions.to(torch.int32)
    held = Held(query.contiguous(), past_key, past_value, past_pages, places, positions.contiguous())
    return _run(held, rule, sink_logits, softcap)


def _rule(
    *, scale: float, softcap: float = 0.0, rerank: int = 1, dense_below: int = 0, **options: Any
) -> tuple[Rule, float]:
    """Return how tokens are chosen, and the soft-cap, which chooses nothing."""
    return Rule(scale=scale, rerank=rerank, dense_below=dense_below, **options), softcap


def _run(held: Held, rule: Rule, sink_logits: Tensor | None, softcap: float) -> tuple[Tensor, Tensor]:
    """Return the output ``[B,H,T,E]`` and the log-sum-exp ``[B,H,T]`` of tokens that are in what is held."""
    _describe(held, rule)
    size = _block(held, rule)
    parts = [held.part(slice(start, start + size)) for start in range(0, held.tokens, size)]
    done = [_attend(part, _places_chosen(part, rule), sink_logits, rule.scale, softcap) for part in parts]
    if len(done) == 1:
        return done[0]
    return torch.cat([out for out, _ in done], 2), torch.cat([lse for _, lse in done], 2)


def _block(held: Held, rule: Rule) -> int:
    """Return how many tokens are worked on at once."""
    batch, groups, count = held.pages.shape[:3]
    listed = max(rule.rerank * rule.budget, rule.dense_below) + rule.page
    entries = batch * groups * max(count * rule.page if rule.by_token else count, listed)
    return max(1, min(held.tokens, MOST_BLOCKS // batch, BLOCK_ENTRIES // entries))


def _places_chosen(held: Held, rule: Rule) -> Tensor:
    """Return where the keys ``[B,G,T,K]`` that tokens read are, -1 for none."""
    chosen = choose(held, rule)
    places = held.places[:, None, None].expand(-1, *chosen.shape[1:3], -1).gather(3, chosen.clamp_min(0))
    return places.masked_fill(chosen < 0, -1)


def choose(held: Held, rule: Rule) -> Tensor:
    """Return the positions ``[B,G,T,K]`` that tokens read for each key-value head, -1 for none."""
    dense = (held.positions < rule.dense_below)[:, None, :, None]
    unit = 1 if rule.by_token else rule.page
    picked, there = _best(_scores(held, rule), rule.rerank * rule.budget // unit, -(-rule.dense_below // unit), dense)
    if unit > 1:
        inside = torch.arange(unit, device=picked.device)
        picked = (picked[..., None] * unit + inside).flatten(3)
        there = there.repeat_interleave(unit, 3) & (picked <= held.positions[:, None, :, None])
    if rule.rerank == 1:
        return picked.masked_fill(~there, -1)
    # In the order of positions, so that of equal scores the lower position comes first.
    last = torch.iinfo(torch.int32).max
    candidates = picked.masked_fill(~there, last).sort(3).values
    candidates = candidates.masked_fill(candidates == last, -1)
    index, there = _best(_ranked(held, candidates, rule), rule.budget, rule.dense_below, dense)
    return candidates.gather(3, index).masked_fill(~there, -1)


def _best(scores: Tensor, count: int, dense_count: int, dense: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices of the ``count`` highest of each row, of equals the lower ones, and which of them there are.

    Of rows that are ``dense [B,1,T,1]`` it is ``dense_count``, where that is more.
    """
    ordered = scores.sort(stable=True, dim=3, descending=True)
    values, index = (x[..., : max(count, dense_count)] for x in (ordered.values, ordered.indices))
    near = torch.arange(index.shape[3], device=index.device) < count
    return index, (values > -torch.inf) & (near | dense)


def _pages(past: Tensor, positions: Tensor, count: int) -> Tensor:
    """Return the descriptions held, with room for ``count`` pages; none where the token starts a sequence."""
    room = past.new_zeros(*past.shape[:2], count, *past.shape[3:])
    room[:, :, : past.shape[2]] = past.masked_fill(_starts(positions, past), 0)
    return room


def _starts(positions: Tensor, pages: Tensor) -> Tensor:
    """Return, of the shape of ``pages`` with 1 for all but the rows, in which of them a sequence starts."""
    return (positions == 0).any(1).view(-1, *[1] * (pages.dim() - 1))


def _places(positions: Tensor, length: int) -> Tensor:
    """Return where each position of ``positions [B,N]`` is, ``[B,length]``; -1 for none."""
    index = torch.arange(positions.shape[1], device=positions.device, dtype=torch.int32).expand_as(positions)
    # Tokens that are nobody's are put one place too far, which is then cut off.
    room = index.new_full((positions.shape[0], length + 1), -1)
    return room.scatter(1, torch.where(positions >= 0, positions, length), index)[:, :length].contiguous()


def _describe(held: Held, rule: Rule) -> None:
    batch, groups, count = held.pages.shape[:3]
    arguments = {"pages": held.pages, "key": held.key, "places": held.places, "positions": held.positions}
    numbers = {"tokens": held.tokens, "held": held.key.shape[2], "length": held.places.shape[1], "count": count}
    described = held.pages[0, 0, 0].numel()
    constants: Constants = {
        **held.sizes,
        "page": rule.page,
        "method": rule.method,
        "described": described,
        "block_page": power_of_two(rule.page),
        "block_described": min(1024, _power(described)),
    }
    _launch("describe", (held.tokens, groups, batch), {**arguments, **numbers}, constants, Tile({}, 4, 1))


def _scores(held: Held, rule: Rule) -> Tensor:
    """Return the scores ``[B,G,T,P]`` of pages, or ``[B,G,T,L]`` of tokens."""
    batch, groups, count = held.pages.shape[:3]
    name, block = ("score_tokens", "block_tokens") if rule.by_token else ("score_pages", "block_pages")
    cut = _cut(name, block, held)
    scored = count * rule.page if rule.by_token else count
    scores = held.query.new_empty(batch, groups, held.tokens, scored, dtype=torch.float32)
    arguments = {"scores": scores, "query": held.query, "pages": held.pages, "positions": held.positions}
    own: Constants = {"channels": rule.channels} if rule.by_token else {"method": rule.method}
    constants: Constants = {**_choice(held, rule), "page": rule.page, **own}
    grid = (-(-scored // cut.sizes[block]) * held.tokens, groups, batch)
    _launch(name, grid, {**arguments, "tokens": held.tokens, "count": count}, constants, cut)
    return scores


def _ranked(held: Held, candidates: Tensor, rule: Rule) -> Tensor:
    """Return the scores ``[B,G,T,K]`` of candidates by q.k."""
    batch, groups, tokens, listed = candidates.shape
    cut = _cut("rank", "block_tokens", held)
    scores = held.query.new_empty(candidates.shape, dtype=torch.float32)
    arguments: dict[str, Tensor | int] = {
        "scores": scores,
        "query": held.query,
        "key": held.key,
        "candidates": candidates.to(torch.int32),
        "places": held.places,
        "positions": held.positions,
        "tokens": tokens,
        "held": held.key.shape[2],
        "length": held.places.shape[1],
        "listed": listed,
    }
    grid = (-(-listed // cut.sizes["block_tokens"]) * tokens, groups, batch)
    _launch("rank", grid, arguments, _choice(held, rule), cut)
    return scores


def _attend(
    held: Held, chosen: Tensor, sink_logits: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    query, (batch, groups, tokens, listed) = held.query, chosen.shape
    heads, value_size = query.shape[1], held.value.shape[3]
    cut = _cut("attend", "block_keys", held)
    programs, share = splits(listed, batch * groups * tokens, cut.sizes["block_keys"], query.device)
    parts = query.new_empty(batch * tokens, heads, programs, value_size, dtype=torch.float32)
    part_lse = query.new_empty(batch * tokens, heads, programs, dtype=torch.float32)
    arguments: dict[str, Tensor | int] = {
        "parts": parts,
        "part_lse": part_lse,
        "query": query,
        "key": held.key,
        "value": held.value,
        "chosen": chosen.contiguous(),
        "sink_logits": query if sink_logits is None else sink_logits.contiguous(),
        "tokens": tokens,
        "held": held.key.shape[2],
        "listed": listed,
        "share": share,
    }
    constants: Constants = {
        **held.rows,
        "value_size": value_size,
        "block_value": _power(value_size),
        "scale": scale,
        "softcap": softcap,
        "has_sink_logits": sink_logits is not None,
        "precision": precision(query.device, query.dtype),
    }
    _launch("attend", (programs * tokens, groups, batch), arguments, constants, cut)
    out = query.new_empty(batch * tokens, heads, 1, value_size)
    lse = query.new_empty(batch * tokens, heads, 1, dtype=torch.float32)
    merge(out, lse, parts, part_lse, held.positions)
    return (
        out.view(batch, tokens, heads, value_size).transpose(1, 2),
        lse.view(batch, tokens, heads).transpose(1, 2),
    )


def _choice(held: Held, rule: Rule) -> Constants:
    """Return the constants of the kernels that score."""
    return {
        **held.rows,
        "scale": rule.scale,
        "sinks": rule.sinks,
        "window": rule.window,
        "dense_below": rule.dense_below,
        "precision": precision(held.query.device, torch.float32),
    }


def _cut(kernel: str, name: str, held: Held) -> Tile:
    size = _power(max(held.key.shape[3], held.value.shape[3]))
    kind = str(held.key.dtype).removeprefix("torch.")
    # Half as many rows of heads that are large, and more warps where queries are worked on, so that no registers spill.
    default = Tile({name: 64 if size <= 64 else 32 if size <= 128 else 16}, 8 if "score" in kernel else 4, 1)
    return tile(f"sparse_attention.{kernel}", f"{size}-{kind}", default, held.key.device)


def _launch(
    kernel: str,
    grid: tuple[int, int, int],
    arguments: Mapping[str, Tensor | int],
    constants: Mapping[str, int | float | bool | str],
    cut: Tile,
) -> None:
    launch(Launch(f"sparse_attention.{kernel}", grid, arguments, {**constants, **cut.sizes}, cut.warps, cut.stages))


def _power(size: int) -> int:
    return max(16, power_of_two(size))


KERNELS = DeviceKernels(forward, refuses, in_place=in_place)
