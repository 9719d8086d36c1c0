"""``kind=engram``: rows looked up by a hash of the last tokens (Engram, arXiv 2601.07372).

Which rows a token reads is known from the tokens alone, before anything is computed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from memc.blocks import FeedForwardBlock
from memc.passes.memory_bank.beside import (
    EPSILON,
    ROOT,
    SEED,
    Inserted,
    Values,
    add_beside,
    add_last_state,
    columns,
    normed,
)
from memc.program import StateSpec
from memc.rewrite import Editor, New, constant

STATE = "engram_tokens"
"""The state that holds the last tokens of a sequence."""

NONE = -1
"""What stands for a token before the first of its sequence."""

MULTIPLIERS = 1 << 32
"""Multipliers of a hash are odd and below it: times a token's number below 2^31 they fit into 63 bits."""


@dataclass(frozen=True)
class Engram:
    """Sizes: n-grams of 2 to ``ngram`` tokens, ``heads`` hashes of each into tables of about ``slots`` rows."""

    slots: int
    heads: int
    ngram: int
    row: int

    @property
    def tables(self) -> int:
        """Tables of a layer, one for each length of n-gram and each of its hashes."""
        return (self.ngram - 1) * self.heads

    def recent(self, editor: Editor, block: FeedForwardBlock) -> Node:
        """Insert, in front of the first block, what every layer's hashes read: each token and the ones before it.

        ``[B,T,ngram]`` int64, the token itself first; the state carries the last ``ngram`` - 1 of a sequence.
        """
        tokens, positions = editor.program.placeholders()[:2]
        past = add_last_state(editor, StateSpec(STATE, torch.int64, ("B", self.ngram - 1), NONE))
        inputs = {"tokens": tokens, "positions": positions, "past": past}
        before = block.output
        found, after = editor.insert(lambda t: recent_tokens(**t), inputs, before, block.path, self)
        editor.set_next(past, after)
        return found

    def insert(self, editor: Editor, block: FeedForwardBlock, index: int, recent: Node) -> Inserted:
        """Add the memory beside a block, the ``index``-th that gets one: no two layers hash alike."""
        before, new = block.output, self.parameters(block.width, index)
        nodes = editor.add_parameters(f"{ROOT}.{block.layer}", new, SEED + block.layer, "memory_bank", before)
        inputs = {**nodes, "recent": recent}
        add_beside(editor, block, lambda t: self.read(t, index), inputs, (self, index))
        facts = {
            "new_parameters": sum(item.count for item in new.values()),
            "rows_read_per_token": self.tables,
            "row_bytes_per_token": 4 * self.tables * self.row,
        }
        return Inserted(facts, {name: str(node.target) for name, node in nodes.items()})

    def count(self, widths: Sequence[int]) -> int:
        """Count the parameters of a memory beside blocks of such widths."""
        made = (self.parameters(width, index).values() for index, width in enumerate(widths))
        return sum(item.count for items in made for item in items)

    def parameters(self, width: int, index: int) -> dict[str, New]:
        """List what a layer has: its tables one below the other, a key of what they give, and a value that is zero."""
        rows, wide = sum(self.moduli(index)), self.tables * self.row
        return {
            "table": New((rows, self.row), lambda g: torch.randn(rows, self.row, generator=g)),
            "key": New((width, wide), lambda g: torch.randn(width, wide, generator=g) * wide**-0.5),
            "value": constant((width, wide), 0.0),
        }

    def moduli(self, index: int) -> list[int]:
        """Return the rows of each table of the ``index``-th layer: primes from ``slots`` on, none of them twice."""
        found, last = [], self.slots - 1
        for _ in range((index + 1) * self.tables):
            last = int(sympy.nextprime(last))
            found.append(last)
        return found[index * self.tables :]

    def multipliers(self, index: int) -> list[int]:
        """Return the odd numbers that the ``index``-th layer multiplies a token and those before it with."""
        drawn = random.Random(SEED + index)
        return [2 * drawn.randrange(MULTIPLIERS // 2) + 1 for _ in range(self.ngram)]

    def rows(self, recent: Tensor, index: int) -> Tensor:
        """Return the rows ``[B,T,tables]`` of the layer's table that each token reads.

        The hash of n tokens is the exclusive or of each one's number times a multiplier of its place, modulo a prime.
        A token that is not there counts as one of the number 0, and the first one there is as 1.
        """
        moduli, start, found = self.moduli(index), 0, []
        products = [(recent[..., k] + 1) * m for k, m in enumerate(self.multipliers(index))]
        mixed = products[0]
        for order in range(1, self.ngram):
            mixed = mixed ^ products[order]
            for modulus in moduli[(order - 1) * self.heads : order * self.heads]:
                found.append(torch.remainder(mixed, modulus) + start)
                start += modulus
        return torch.stack(found, -1)

    def read(self, t: Values, index: int) -> Tensor:
        """Return ``gate W_V e`` of ``x [B,T,C]``, e the rows of a token side by side (section 2.3).

        The gate is sigmoid(sign(s) sqrt|s|), s = <norm(W_K e), norm(x)> / sqrt(C). The paper's short convolution over
        tokens is left out: it would carry more than the tokens from call to call.
        """
        e = functional.embedding(self.rows(t["recent"], index), t["table"]).flatten(-2)
        s = (normed(functional.linear(e, t["key"])) * normed(t["x"])).sum(-1, keepdim=True) * t["x"].shape[-1] ** -0.5
        gate = torch.sigmoid(s.sign() * s.abs().clamp_min(EPSILON).sqrt())
        return gate * functional.linear(e, t["value"])


def recent_tokens(tokens: Tensor, positions: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token with the ones before it in its sequence ``[B,T,n]``, and the last n - 1 ``[B,n-1]``.

    ``past [B,n-1]`` are those that came before this call, the last one last. -1 stands for those before the first;
    padding is passed over.
    """
    reach = past.shape[1]
    order = columns(positions)
    place = torch.where(order > 0, order + reach, 0)  # 0 is of padding
    line = torch.cat([tokens[:, :1] * 0, past, tokens * 0], 1).scatter(1, place, tokens)
    found = [tokens]
    for back in range(1, reach + 1):
        earlier = line.gather(1, (place - back).clamp_min(0))
        found.append(torch.where(positions >= back, earlier, NONE))
    last = (order > 0).long().sum(1, keepdim=True) + torch.arange(1, reach + 1, device=tokens.device)
    return torch.stack(found, -1), line.gather(1, last)
