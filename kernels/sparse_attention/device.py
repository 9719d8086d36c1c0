"""Host code of ``memc::sparse_attention`` on a GPU, for one token: describe, score, choose, rank again, attend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memc.kernels.common import held_positions
from memc.kernels.launch import DeviceKernels, Gpu, Launch, Tile, launch, power_of_two, precision, tile
from memc.kernels.softmax_device import merge, refusal, splits
from memc.kernels.sparse_attention.choose import Rule

Constants = dict[str, int | float | bool | str]


def refuses(gpu: Gpu, *args: Any, **options: Any) -> str:
    """Return why the kernels do not take a call; "" where they do."""
    query, key, value, _positions, past_key, past_value, _past, past_pages, *rest = args
    if query.shape[2] > 1:
        return "more than one token at a time"
    return refusal(query, key, value, past_key, past_value, past_pages, *rest)


@dataclass(frozen=True)
class Held:
    """What one token may choose from: keys and values with it appended, and where each position is.

    ``key [B,G,N,D]``, ``value [B,G,N,E]``, ``pages [B,G,P,...]``, ``places [B,L]`` int32, and the token's ``positions
    [B,1]``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    pages: Tensor
    places: Tensor
    positions: Tensor

    @property
    def sizes(self) -> dict[str, int]:
        """Constants that every kernel takes."""
        return {"groups": self.key.shape[1], "size": self.key.shape[3], "block_size": _power(self.key.shape[3])}

    @property
    def rows(self) -> dict[str, int]:
        """Constants of the kernels that read queries."""
        heads = self.query.shape[1]
        return {**self.sizes, "heads": heads, "block_rows": _power(heads // self.key.shape[1])}


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
    *,
    scale: float,
    method: str,
    page: int,
    budget: int,
    sinks: int,
    window: int,
    rerank: int = 1,
    dense_below: int = 0,
    softcap: float = 0.0,
    channels: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run ``memc::sparse_attention`` for one token; arguments and results as its dialect page has them."""
    rule = Rule(scale, method, page, budget, sinks, window, rerank, dense_below, channels)
    next_positions = held_positions(past_positions, positions)
    count = -(-next_positions.shape[1] // page)
    held = Held(
        query.contiguous(),
        torch.cat([past_key, key], 2),
        torch.cat([past_value, value], 2),
        _pages(past_pages, positions, count),
        _places(next_positions, count * page),
        positions.contiguous(),
    )
    _describe(held, rule)
    chosen = choose(held, rule)
    places = held.places[:, None].expand(-1, chosen.shape[1], -1).gather(2, chosen.clamp_min(0))
    out, lse = _attend(held, places.masked_fill(chosen < 0, -1), sink_logits, scale, softcap)
    return out, lse, held.key, held.value, next_positions, held.pages


def choose(held: Held, rule: Rule) -> Tensor:
    """Return the positions ``[B,G,K]`` that a token reads for each key-value head, -1 for none."""
    dense = (held.positions < rule.dense_below)[:, None]
    unit = 1 if rule.by_token else rule.page
    picked, there = _best(_scores(held, rule), rule.rerank * rule.budget // unit, -(-rule.dense_below // unit), dense)
    if unit > 1:
        inside = torch.arange(unit, device=picked.device)
        picked = (picked[..., None] * unit + inside).flatten(2)
        there = there.repeat_interleave(unit, 2) & (picked <= held.positions[:, None])
    if rule.rerank == 1:
        return picked.masked_fill(~there, -1)
    # In the order of positions, so that of equal scores the lower position comes first.
    last = torch.iinfo(torch.int32).max
    candidates = picked.masked_fill(~there, last).sort(2).values
    candidates = candidates.masked_fill(candidates == last, -1)
    index, there = _best(_ranked(held, candidates, rule), rule.budget, rule.dense_below, dense)
    return candidates.gather(2, index).masked_fill(~there, -1)


def _best(scores: Tensor, count: int, dense_count: int, dense: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices of the ``count`` highest of each row, of equals the lower ones, and which of them there are.

    Of rows that are ``dense [B,1,1]`` it is ``dense_count``, where that is more.
    """
    ordered = scores.sort(stable=True, dim=2, descending=True)
    values, index = (x[..., : max(count, dense_count)] for x in (ordered.values, ordered.indices))
    near = torch.arange(index.shape[2], device=index.device) < count
    return index, (values > -torch.inf) & (near | dense)


def _pages(past: Tensor, positions: Tensor, count: int) -> Tensor:
    """Return the descriptions held, with room for ``count`` pages; none where the token starts a sequence."""
    room = past.new_zeros(*past.shape[:2], count, *past.shape[3:])
    room[:, :, : past.shape[2]] = past.masked_fill((positions == 0).view(-1, *[1] * (past.dim() - 1)), 0)
    return room


def _places(positions: Tensor, length: int) -> Tensor:
    """Return where each position of ``positions [B,N]`` is, ``[B,length]``; -1 for none."""
    index = torch.arange(positions.shape[1], device=positions.device, dtype=torch.int32).expand_as(positions)
    # Tokens that are nobody's are put one place too far, which is then cut off.
    room = index.new_full((positions.shape[0], length + 1), -1)
    return room.scatter(1, torch.where(positions >= 0, positions, length), index)[:, :length].contiguous()


def _describe(held: Held, rule: Rule) -> None:
    batch, groups, count = held.pages.shape[:3]
    arguments = {"pages": held.pages, "key": held.key, "places": held.places, "positions": held.positions}
    constants: Constants = {"page": rule.page, "method": rule.method, "block_page": power_of_two(rule.page)}
    numbers = {"held": held.key.shape[2], "count": count}
    _launch("describe", (1, groups, batch), {**arguments, **numbers}, {**held.sizes, **constants}, Tile({}, 4, 1))


def _scores(held: Held, rule: Rule) -> Tensor:
    """Return the scores ``[B,G,P]`` of pages, or ``[B,G,L]`` of tokens."""
    batch, groups, count = held.pages.shape[:3]
    cut = _cut("score_tokens", "block_tokens", held) if rule.by_token else _cut("score_pages", "block_pages", held)
    scored = count * rule.page if rule.by_token else count
    scores = held.query.new_empty(batch, groups, scored, dtype=torch.float32)
    arguments = {"scores": scores, "query": held.query, "pages": held.pages, "positions": held.positions}
    own: Constants = {"channels": rule.channels} if rule.by_token else {"method": rule.method}
    constants: Constants = {**_choice(held, rule), "page": rule.page, **own}
    grid = (-(-scored // next(iter(cut.sizes.values()))), groups, batch)
    name = "score_tokens" if rule.by_token else "score_pages"
    _launch(name, grid, {**arguments, "count": count}, constants, cut)
    return scores


def _ranked(held: Held, candidates: Tensor, rule: Rule) -> Tensor:
    """Return the scores ``[B,G,K]`` of candidates by q.k."""
    batch, groups, listed = candidates.shape
    cut = _cut("rank", "block_tokens", held)
    scores = held.query.new_empty(candidates.shape, dtype=torch.float32)
    arguments: dict[str, Tensor | int] = {
        "scores": scores,
        "query": held.query,
        "key": held.key,
        "tokens": candidates.to(torch.int32),
        "places": held.places,
        "positions": held.positions,
        "held": held.key.shape[2],
        "length": held.places.shape[1],
        "listed": listed,
    }
    grid = (-(-listed // cut.sizes["block_tokens"]), groups, batch)
    _launch("rank", grid, arguments, _choice(held, rule), cut)
    return scores


def _attend(
    held: Held, chosen: Tensor, sink_logits: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    query, (batch, groups, listed) = held.query, chosen.shape
    heads, value_size = query.shape[1], held.value.shape[3]
    cut = _cut("attend", "block_keys", held)
    programs, share = splits(listed, batch * groups, cut.sizes["block_keys"], query.device)
    parts = query.new_empty(batch, heads, programs, value_size, dtype=torch.float32)
    part_lse = query.new_empty(batch, heads, programs, dtype=torch.float32)
    arguments: dict[str, Tensor | int] = {
        "parts": parts,
        "part_lse": part_lse,
        "query": query,
        "key": held.key,
        "value": held.value,
        "chosen": chosen.contiguous(),
        "sink_logits": query if sink_logits is None else sink_logits.contiguous(),
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
    _launch("attend", (programs, groups, batch), arguments, constants, cut)
    out, lse = query.new_empty(batch, heads, 1, value_size), query.new_empty(batch, heads, 1, dtype=torch.float32)
    merge(out, lse, parts, part_lse, held.positions)
    return out, lse


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


KERNELS = DeviceKernels(forward, refuses)
