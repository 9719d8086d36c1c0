"""Idioms that are written shorter, and their near misses, which stay."""

from __future__ import annotations

import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional

from memc.backends.onnx.export import is_decomposed
from memc.backends.onnx.simplify import append_ones, cast, flatten, simplify, softplus, unflatten


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


class Shapes(nn.Module):
    """Axes split and joined, with what is behind them known and not, and types that float32 makes one."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        heads = torch.unflatten(x, -1, (2, 2)).softmax(-1)
        columns = torch.flatten(x.transpose(0, 2), 0, 1).type_as(heads).to(torch.float32).contiguous()
        signs = (x @ x.transpose(1, 2) > 0).to(torch.float32)
        return torch.flatten(heads, 2), torch.flatten(x, 0, 1).softmax(-1, torch.float64), columns, signs


FORMS = (softplus, append_ones, flatten, unflatten, torch.ops.aten._softmax.default)


def forms(module: nn.Module) -> list[object]:
    graph = torch.export.export(module, (torch.randn(2, 3, 4),)).graph_module.graph
    simplify(graph)
    graph.eliminate_dead_code()
    return [node.target for node in graph.nodes if node.op == "call_function" and node.target in FORMS]


def test_idioms_are_shortened() -> None:
    assert forms(Idioms()) == [softplus]  # the ones are of another tensor
    assert forms(WithOnes()) == [append_ones]


def test_near_misses_stay() -> None:
    assert forms(NearMisses()) == []


def test_shapes_are_read_off_no_tensor() -> None:
    module, x = Shapes(), torch.randn(2, 3, 4)
    sizes = {0: torch.export.Dim("B"), 1: torch.export.Dim("T")}
    exported = torch.export.export(module, (x,), dynamic_shapes=(sizes,))
    graph = exported.graph_module.graph
    simplify(graph)
    graph.eliminate_dead_code()
    exported.graph_module.recompile()
    targets = [str(node.target) for node in graph.nodes]
    assert not {"aten.type_as.default", "aten.contiguous.default", "aten.to.dtype"} & set(targets)
    assert cast in [node.target for node in graph.nodes], "of what is no float"
    assert targets.count("aten.softmax.int") == 1, "one in another type stays"
    model = torch.onnx.export(torch.export.export(exported.module(), (x,), dynamic_shapes=(sizes,)), (), verbose=False)
    session = onnxruntime.InferenceSession(model.model_proto.SerializeToString())
    x = torch.randn(4, 5, 4)
    for found, want in zip(session.run(None, {session.get_inputs()[0].name: x.numpy()}), module(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(found), want, check_dtype=False)


def test_what_is_decomposed_is_traced_again() -> None:
    class Ops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.repeat_interleave(x + 1, 2, 0).add_(1)

    graph = torch.export.export(Ops(), (torch.randn(2, 3, 4),)).graph_module.graph
    found = {str(node.target): is_decomposed(node, {}) for node in graph.nodes if node.op == "call_function"}
    assert found["aten.add.Tensor"] is False
    assert found["aten.add_.Tensor"] is True
    assert found["aten.repeat_interleave.self_int"] is True
