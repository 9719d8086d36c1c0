"""Idioms that are written shorter, and their near misses, which stay."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from memc.backends.onnx.simplify import append_ones, simplify, softplus


class Idioms(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([functional.softplus(x), torch.ones_like(x[..., :1])], -1)


class WithOnes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.ones_like(x[..., :1])], -1)


class NearMisses(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        soft = functional.softplus(x, beta=2.0)
        return torch.cat([soft, torch.ones_like(soft[..., :2])], -1) + torch.cat(
            [soft, torch.ones_like(soft[..., 1:3])], -1
        )


def forms(module: nn.Module) -> list[object]:
    graph = torch.export.export(module, (torch.randn(2, 3, 4),)).graph_module.graph
    simplify(graph)
    graph.eliminate_dead_code()
    return [
        node.target for node in graph.nodes if node.op == "call_function" and node.target in (softplus, append_ones)
    ]


def test_idioms_are_shortened() -> None:
    assert forms(Idioms()) == [softplus]  # the ones are of another tensor
    assert forms(WithOnes()) == [append_ones]


def test_near_misses_stay() -> None:
    assert forms(NearMisses()) == []
