"""``kind=pkm``: a key-value memory whose keys are pairs of two small sets (Lample et al. 2019), in its Memory+ form.

A token reads the ``top`` best of ``slots`` = n^2 rows with ``heads`` queries, and compares 2n keys a head for it, not
n^2: a row's key is a pair of half-keys, and its score the sum of the halves' scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from memc.blocks import FeedForwardBlock
from memc.passes.memory_bank.beside import ROOT, SEED, Inserted, Values, add_beside, normed
from memc.rewrite import Editor, New, constant

HALF = 64
"""Channels of half a query."""


@dataclass(frozen=True)
class ProductKeys:
    """Sizes of a memory of ``slots`` rows of ``row`` channels, of which each of ``heads`` reads ``top``."""

    slots: int
    heads: int
    top: int
    row: int

    @property
    def side(self) -> int:
        """Half-keys of each of the two sets of a head."""
        return isqrt(self.slots)

    def insert(self, editor: Editor, block: FeedForwardBlock, values: Node | None) -> tuple[Inserted, Node]:
        """Add the memory beside a block, with the rows of an earlier layer where there are ``values``; returns them.

        One table for all layers, as in Memory Layers at Scale (arXiv 2412.09764, section 2.2).
        """
        before = block.output
        new = self.parameters(block.width)
        nodes = editor.add_parameters(f"{ROOT}.{block.layer}", new, SEED + block.layer, "memory_bank", before)
        made = sum(item.count for item in new.values())
        if values is None:
            rows = New((self.slots, self.row), lambda g: torch.randn(self.slots, self.row, generator=g))
            values = editor.add_parameters(ROOT, {"values": rows}, SEED, "memory_bank", before)["values"]
            made += rows.count
        nodes["values"] = values
        add_beside(editor, block, self.read, nodes, self)
        read = self.heads * self.top
        facts = {"new_parameters": made, "rows_read_per_token": read, "row_bytes_per_token": 4 * read * self.row}
        return Inserted(facts, {name: str(node.target) for name, node in nodes.items()}), values

    def count(self, widths: Sequence[int]) -> int:
        """Count the parameters of a memory beside blocks of such widths."""
        return self.slots * self.row + sum(item.count for width in widths for item in self.parameters(width).values())

    def parameters(self, width: int) -> dict[str, New]:
        """List what each layer has of its own: query, half-keys ``[2H,HALF,n]``, gate, and an output that is zero."""
        queries, bound = 2 * self.heads * HALF, (2 * HALF) ** -0.5

        def normal(*shape: int) -> New:
            return New(shape, lambda g: torch.randn(*shape, generator=g) * width**-0.5)

        keys = (2 * self.heads, HALF, self.side)
        return {
            "query": normal(queries, width),
            "query_bias": constant((queries,), 0.0),
            "keys": New(keys, lambda g: (2 * torch.rand(*keys, generator=g) - 1) * bound),
            "gate": normal(self.row, width),
            "down": constant((width, self.row), 0.0),
        }

    def read(self, t: Values) -> Tensor:
        """Return ``W_o (sum_h sum_k p_hk V[slot_hk] * silu(W_g x))`` of ``x [B,T,C]``, p the softmax of the top scores.

        The input is divided by its root mean square first, so that first scores are of one size in every layer.
        """
        x = normed(t["x"])
        query = functional.linear(x, t["query"], t["query_bias"]).unflatten(-1, (2 * self.heads, HALF))
        best, which = (query.transpose(1, 2) @ t["keys"]).topk(self.top, -1)  # [B,2H,T,K]
        (first, second), (row, column) = (part.unflatten(1, (2, self.heads)).unbind(1) for part in (best, which))
        sums = (first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(-2)  # the top pairs are among the halves' tops
        slots = (row.unsqueeze(-1) * self.side + column.unsqueeze(-2)).flatten(-2)
        scores, chosen = sums.topk(self.top, -1)
        rows = functional.embedding(slots.gather(-1, chosen), t["values"])  # [B,H,T,K,row]
        read = (scores.softmax(-1).unsqueeze(-2) @ rows).squeeze(-2).sum(1)
        return functional.linear(read * functional.silu(functional.linear(x, t["gate"])), t["down"])
