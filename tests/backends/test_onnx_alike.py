"""Export of one node of each kind: the sample does not grow with the layers, and the file is that of a whole export."""

from __future__ import annotations

import operator
from collections import Counter
from pathlib import Path

import onnx_ir as ir
import op_programs as ops
import pytest
import torch
from onnx_support import SCENARIOS, build, compare
from torch.fx import Graph, GraphModule

from memc.backends.onnx import export as exporting
from memc.backends.onnx.alike import Sample, repeat
from memc.backends.onnx.graph import prepare
from memc.infer import Propagation
from memc.program import InputSpec, Program

aten = torch.ops.aten
X = InputSpec("x", "other", torch.float32, ("B", "T"))


def sample_of(graph: Graph, *specs: InputSpec) -> Sample:
    module = GraphModule(torch.nn.Module(), graph)
    run = Propagation(module, specs)
    for node in graph.nodes:
        run.step(node)
    return Sample(module, run)


def size(layers: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return how many nodes the exporter is given for a program of so many layers."""
    seen = []

    def note(model: ir.Model, sample: Sample) -> bool:
        seen.append(len(sample.module.graph.nodes))
        return repeat(model, sample)

    monkeypatch.setattr(exporting, "repeat", note)
    exported(ops.llama(layers=layers))
    return seen[0]


def exported(program: Program) -> Counter[str]:
    model = exporting.export(program, prepare(program))
    return Counter(node.op_type for node in model.graph)


def test_the_exporter_sees_no_more_of_many_layers_than_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    assert size(2, monkeypatch) == size(5, monkeypatch)


def test_the_model_is_that_of_a_whole_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = ops.llama(softcap=3.0)
    ours = exported(program)
    monkeypatch.setattr(exporting, "repeat", lambda model, sample: False)
    assert exported(program) == ours
    runner = build(program, tmp_path)
    assert max(compare(program, runner, calls) for calls in SCENARIOS.values()) < 1e-4


def test_results_go_to_whom_they_belong(tmp_path: Path) -> None:
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    best = graph.call_function(aten.topk.default, (x, 2))
    rest = graph.call_function(aten.topk.default, (y, 2))
    values, indices = (graph.call_function(operator.getitem, (best, i)) for i in range(2))
    others = graph.call_function(operator.getitem, (rest, 0))
    difference = graph.call_function(aten.sub.Tensor, (others, values))
    back = graph.call_function(aten.sub.Tensor, (values, others))
    rows = graph.call_function(aten.sym_size.int, (y, 0))
    same = graph.call_function(aten.view.default, (difference, [rows, 2]))
    twice = graph.call_function(aten.sub.Tensor, (values, values))
    graph.output((same, back, indices, twice))
    sample = sample_of(graph, X, InputSpec("y", "other", torch.float32, ("B", "T")))
    subtractions = sample.module.graph.find_nodes(op="call_function", target=aten.sub.Tensor)
    assert len(subtractions) == 1

    dims = [{0: torch.export.Dim("B"), 1: torch.export.Dim("T", min=2)}]
    program = torch.export.export(sample.module, (torch.zeros(3, 5),), dynamic_shapes=dims)
    made = torch.onnx.export(program, (), dynamo=True, verbose=False)
    assert made is not None and repeat(made.model, sample)
    made.model.graph.inputs[1].shape = made.model.graph.inputs[0].shape
    ir.save(made.model, tmp_path / "model.onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    given = torch.randn(4, 6), torch.randn(4, 6)
    found = session.run(None, {"x": given[0].numpy(), "y": given[1].numpy()})
    for result, expected in zip(found, sample.source(*given), strict=True):
        torch.testing.assert_close(torch.from_numpy(result), expected)


def test_kinds_that_read_each_other_are_refused() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(aten.neg.default, (x,)),))
    sample = sample_of(graph, X)
    given = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
    enters = [ir.node("Enter", [given], {"kind": k, "position": 0}, domain="memc") for k in (0, 1)]
    mixed = ir.node("Add", [enter.outputs[0] for enter in enters])
    leave = ir.node("Leave", [mixed.outputs[0]], {"kind": 0}, domain="memc")
    nodes = [*enters, mixed, leave]
    model = ir.Model(ir.Graph([given], leave.outputs, nodes=nodes, opset_imports={"": 20}), ir_version=10)
    assert not repeat(model, sample)
