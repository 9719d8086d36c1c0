"""Random calls: shapes, and positions with padding anywhere and restarts anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor

F64 = torch.float64


@dataclass(frozen=True)
class Shape:
    """Sizes of one call, no two alike where they could be mixed up."""

    batch: int
    groups: int
    per_group: int
    tokens: int
    key_size: int
    value_size: int
    seed: int

    @property
    def heads(self) -> int:
        return self.groups * self.per_group

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def qkv(self, generator: torch.Generator, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
        def make(heads: int, size: int) -> Tensor:
            return torch.randn(self.batch, heads, self.tokens, size, dtype=F64, generator=generator).to(dtype)

        return (
            make(self.heads, self.key_size),
            make(self.groups, self.key_size),
            make(self.groups, self.value_size),
        )


def shapes(max_tokens: int = 23) -> st.SearchStrategy[Shape]:
    return st.builds(
        Shape,
        batch=st.integers(1, 3),
        groups=st.integers(1, 2),
        per_group=st.integers(1, 3),
        tokens=st.one_of(st.sampled_from([1, 2]), st.integers(3, max_tokens)),
        key_size=st.sampled_from([1, 3, 4]),
        value_size=st.sampled_from([2, 5]),
        seed=st.integers(0, 1 << 16),
    )


def walk(shape: Shape, generator: torch.Generator, padding: float = 0.2, restart: float = 0.1) -> Tensor:
    """Return positions ``[B,T]`` from 0 on, with padding anywhere and some restarts."""
    draws = torch.rand(shape.batch, shape.tokens, 2, generator=generator).tolist()
    rows = []
    for row in draws:
        following, positions = 0, []
        for pad, again in row:
            if pad < padding:
                positions.append(-1)
                continue
            if again < restart:
                following = 0
            positions.append(following)
            following += 1
        rows.append(positions)
    return torch.tensor(rows).view(shape.batch, shape.tokens)


def cut(tokens: int, generator: torch.Generator) -> list[slice]:
    """Cut a call into a few calls."""
    inner = sorted({int(x) for x in torch.randint(0, tokens + 1, (3,), generator=generator)} - {0, tokens})
    edges = [0, *inner, tokens]
    return [slice(a, b) for a, b in pairwise(edges)]
