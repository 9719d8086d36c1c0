"""What the ops that choose what they read do on a GPU, step by step: score, choose, rank again, attend.

Sizes: B batch, H heads, G key-value heads, T tokens, each of which chooses for itself, P pages, L positions, K listed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from memc.dialect.sparse_attention import SPAN
from memc.kernels.launch import Launch, Tile, launch, power_of_two, precision, tile
from memc.kernels.softmax_step import merge, splits
from memc.kernels.sparse_attention import levels
from memc.kernels.sparse_attention.choose import Rule, edge_of, enough, first, found

Arguments = Mapping[str, Tensor | int]
Constants = dict[str, int | float | bool | str]

# Entries of what has one for each token of a block and each page or candidate: 64 MB of scores.
BLOCK_ENTRIES = 1 << 24
# Blocks along the second and third axis of a grid.
MOST_BLOCKS = 65535

A = TypeVar("A", bound="Asking")


@dataclass(frozen=True)
class Asking:
    """Tokens that choose, ``query [B,H,T,D]`` and ``positions [B,T]``, and ``pages [B,G,P,...]``; all contiguous."""

    query: Tensor
    positions: Tensor
    pages: Tensor

    @property
    def tokens(self) -> int:
        """Tokens that choose."""
        return self.query.shape[2]

    @property
    def grid(self) -> tuple[int, int]:
        """Key-value heads and rows: the last two sizes of every grid."""
        return self.pages.shape[1], self.pages.shape[0]

    @property
    def sizes(self) -> dict[str, int]:
        """Constants that every kernel takes."""
        size = self.query.shape[3]
        return {"groups": self.pages.shape[1], "size": size, "block_size": block_of(size)}

    @property
    def rows(self) -> dict[str, int]:
        """Constants of the kernels that read queries."""
        heads = self.query.shape[1]
        return {**self.sizes, "heads": heads, "block_rows": block_of(heads // self.pages.shape[1])}

    def part(self: A, tokens: slice) -> A:
        """Return the same for some of the tokens."""
        query, positions = self.query[:, :, tokens].contiguous(), self.positions[:, tokens].contiguous()
        return replace(self, query=query, positions=positions)


def in_blocks(asking: A, rule: Rule, attend: Callable[[A], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Run ``attend`` for blocks of tokens whose scores fit ``BLOCK_ENTRIES``; return output and log-sum-exp."""
    batch, groups, count = asking.pages.shape[:3]
    listed = max(rule.rerank * rule.budget, rule.dense_below) + rule.page
    entries = batch * groups * max(count * rule.piece // rule.unit, listed)
    size = max(1, min(asking.tokens, MOST_BLOCKS // batch, BLOCK_ENTRIES // entries))
    done = [attend(asking.part(slice(start, start + size))) for start in range(0, asking.tokens, size)]
    if len(done) == 1:
        return done[0]
    return torch.cat([out for out, _ in done], 2), torch.cat([lse for _, lse in done], 2)


def choose(asking: Asking, rule: Rule, ranked: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the positions ``[B,G,T,K]`` that tokens read for each key-value head, -1 for none.

    ``ranked`` scores candidates ``[B,G,T,K]``, positions in order, by their whole keys, where the rule ranks again.
    """
    dense = (asking.positions < rule.dense_below)[:, None, :, None]
    picked, there = best(scores(asking, rule), rule.most, -(-rule.dense_below // rule.unit), dense, rule.mass)
    picked = tokens_of(picked, there, asking.positions, rule)
    return picked if rule.rerank == 1 else narrowed(picked, dense, rule, ranked)


def tokens_of(picked: Tensor, there: Tensor, positions: Tensor, rule: Rule) -> Tensor:
    """Return the positions of the tokens of what is ``picked [B,G,T,K]`` where it is ``there``, -1 for others."""
    if rule.unit > 1:
        inside = torch.arange(rule.unit, device=picked.device)
        picked = (picked[..., None] * rule.unit + inside).flatten(3)
        there = there.repeat_interleave(rule.unit, 3) & (picked <= positions[:, None, :, None])
    return picked.masked_fill(~there, -1)


def narrowed(picked: Tensor, dense: Tensor, rule: Rule, ranked: Callable[[Tensor], Tensor]) -> Tensor:
    """Return, of the positions ``picked [B,G,T,K]``, the ``budget`` that ``ranked`` scores highest; -1 for none."""
    # In the order of positions, so that of equal scores the lower position comes first.
    last = torch.iinfo(torch.int32).max
    candidates = picked.masked_fill(picked < 0, last).sort(3).values
    candidates = candidates.masked_fill(candidates == last, -1)
    index, there = best(ranked(candidates), rule.budget, rule.dense_below, dense)
    return candidates.gather(3, index).masked_fill(~there, -1)


def best(scores: Tensor, count: int, dense_count: int, dense: Tensor, mass: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the indices of the ``count`` highest of each row, of equals the lower ones, and which of them there are.

    Of rows that are ``dense [B,1,T,1]`` it is ``dense_count``, where that is more. ``mass`` as in :func:`ordered`.
    """
    index, there = (x[..., : max(count, dense_count)] for x in ordered(scores, mass))
    near = torch.arange(index.shape[3], device=index.device) < count
    return index, there & (near | dense)


def ordered(scores: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """Return the indices of scores ``[B,G,T,N]`` from the highest down, of equals the lower ones, and which to take.

    Those are the ones above -inf, with ``mass`` under 1 no more of them than hold this share.
    """
    by_score = scores.sort(stable=True, dim=3, descending=True)
    there = by_score.values > -torch.inf
    return by_score.indices, there if mass == 1 else there & enough(by_score.values, mass)


def scores(asking: Asking, rule: Rule) -> Tensor:
    """Return the scores ``[B,G,T,P]`` of pages, or ``[B,G,T,L]`` of tokens.

    A search down a tree looks at its part of them: here all are scored, and those that it does not find get -inf. In
    two levels super-pages are scored, and then the pages of those that are entered.
    """
    if rule.by_level:
        rank = levels.ranked(
            _scores(asking, rule, above=True), -(-rule.sinks // rule.page), edge_of(asking.positions, rule)
        )
        entered = first(rank, rule.entered + 1) & (rank > -torch.inf)
        return _scores(asking, rule, entered.to(torch.uint8))
    made = _scores(asking, rule)
    if rule.by_tree:
        must = made == torch.inf
        # What is forced is so for every head.
        made = made.masked_fill(~(found(made, asking.positions, must[:, :1], rule) | must), -torch.inf)
    return made


def _scores(asking: Asking, rule: Rule, entered: Tensor | None = None, *, above: bool = False) -> Tensor:
    """Run the kernel that scores: super-pages where it is those ``above``, else the pages of those ``entered``."""
    name, block = ("score_tokens", "block_tokens") if rule.by_token else ("score_pages", "block_pages")
    count = asking.pages.shape[2] * (SPAN if rule.by_level and not above else 1)
    cut = cut_for(f"sparse_attention.{name}", block, asking.query.shape[3], asking.pages.dtype, asking.pages.device)
    scored = count * rule.page if rule.by_token else count
    made = asking.query.new_empty(*asking.pages.shape[:2], asking.tokens, scored, dtype=torch.float32)
    arguments = {"scores": made, "query": asking.query, "pages": asking.pages, "positions": asking.positions}
    own: Constants = {"channels": rule.channels}
    if not rule.by_token:
        arguments["entered"] = asking.positions if entered is None else entered
        own = {"method": rule.method, "span": SPAN if rule.by_level else 0, "above": above}
    constants: Constants = {**choice(asking, rule), "page": rule.page, **own}
    grid = (-(-scored // cut.sizes[block]) * asking.tokens, *asking.grid)
    run(f"sparse_attention.{name}", grid, {**arguments, "tokens": asking.tokens, "count": count}, constants, cut)
    return made


def rank(
    kernel: str, asking: Asking, rule: Rule, candidates: Tensor, given: Arguments, constants: Constants, cut: Tile
) -> Tensor:
    """Return the scores ``[B,G,T,K]`` that ``kernel`` makes of candidates; it takes ``given`` after the candidates."""
    made = asking.query.new_empty(candidates.shape, dtype=torch.float32)
    arguments: Arguments = {
        "scores": made,
        "query": asking.query,
        "candidates": candidates.to(torch.int32),
        "positions": asking.positions,
        **given,
        "tokens": asking.tokens,
        "listed": candidates.shape[3],
    }
    grid = (-(-candidates.shape[3] // cut.sizes["block_tokens"]) * asking.tokens, *asking.grid)
    run(kernel, grid, arguments, {**choice(asking, rule), **constants}, cut)
    return made


def attend(
    kernel: str,
    asking: Asking,
    chosen: Tensor,
    value_size: int,
    sink_logits: Tensor | None,
    given: Arguments,
    constants: Constants,
    cut: Tile,
    *,
    unit: int = 1,
    kind: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return output ``[B,H,T,E]`` and log-sum-exp ``[B,H,T]`` over what is ``chosen [B,G,T,K]``, ``unit`` tokens each.

    The programs of ``kernel`` have a share of them each, which are joined; it takes ``given`` after the tensors here.
    The output is of the query's type, or of ``kind``.
    """
    query, (batch, groups, tokens, listed) = asking.query, chosen.shape
    heads, listed = query.shape[1], listed * unit
    programs, share = splits(listed, batch * groups * tokens, cut.sizes["block_keys"], query.device)
    parts = query.new_empty(batch * tokens, heads, programs, value_size, dtype=torch.float32)
    part_lse = query.new_empty(batch * tokens, heads, programs, dtype=torch.float32)
    arguments: Arguments = {
        "parts": parts,
        "part_lse": part_lse,
        "query": query,
        "chosen": chosen.contiguous(),
        "sink_logits": query if sink_logits is None else sink_logits.contiguous(),
        **given,
        "tokens": tokens,
        "listed": listed,
        "share": share,
    }
    fixed: Constants = {
        **asking.rows,
        "value_size": value_size,
        "block_value": block_of(value_size),
        "has_sink_logits": sink_logits is not None,
        **constants,
    }
    run(kernel, (programs * tokens, groups, batch), arguments, fixed, cut)
    out = query.new_empty(batch * tokens, heads, 1, value_size, dtype=kind)
    lse = query.new_empty(batch * tokens, heads, 1, dtype=torch.float32)
    merge(out, lse, parts, part_lse, asking.positions)
    return (
        out.view(batch, tokens, heads, value_size).transpose(1, 2),
        lse.view(batch, tokens, heads).transpose(1, 2),
    )


def choice(asking: Asking, rule: Rule) -> Constants:
    """Return the constants of the kernels that score."""
    return {
        **asking.rows,
        "scale": rule.scale,
        "sinks": rule.sinks,
        "window": rule.window,
        "dense_below": rule.dense_below,
        "precision": precision(asking.query.device, torch.float32),
    }


def cut_for(kernel: str, name: str, size: int, dtype: torch.dtype, device: torch.device, most: int = 64) -> Tile:
    """Return the tile of a kernel whose blocks of at most ``most`` keys or pages, ``name``, have ``size`` channels."""
    size, kind = block_of(size), str(dtype).removeprefix("torch.")
    # Half as many rows of heads that are large, and more warps where queries are worked on, so that no registers spill.
    default = Tile({name: min(most, 64 if size <= 64 else 32 if size <= 128 else 16)}, 8 if "score" in kernel else 4, 1)
    return tile(kernel, f"{size}-{kind}", default, device)


def places_of(positions: Tensor, length: int) -> Tensor:
    """Return where each position of ``positions [B,N]`` is, ``[B,length]`` int32; -1 for none."""
    index = torch.arange(positions.shape[1], device=positions.device, dtype=torch.int32).expand_as(positions)
    # Tokens that are nobody's are put one place too far, which is then cut off.
    room = index.new_full((positions.shape[0], length + 1), -1)
    return room.scatter(1, torch.where(positions >= 0, positions, length), index)[:, :length].contiguous()


def starts(positions: Tensor, pages: Tensor) -> Tensor:
    """Return, of the shape of ``pages`` with 1 for all but the rows, in which of them a sequence starts."""
    return (positions == 0).any(1).view(-1, *[1] * (pages.dim() - 1))


def run(kernel: str, grid: tuple[int, int, int], arguments: Arguments, constants: Constants, cut: Tile) -> None:
    """Launch a kernel cut as ``cut`` says."""
    launch(Launch(kernel, grid, arguments, {**constants, **cut.sizes}, cut.warps, cut.stages))


def block_of(size: int) -> int:
    """Return the size of a block that holds ``size``, and that matrices may be multiplied by."""
    return max(16, power_of_two(size))
