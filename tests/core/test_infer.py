"""Inference of shapes and types: nodes that are alike share a value, and only those."""

from __future__ import annotations

import pytest
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from memc import infer
from memc.infer import Known, Propagation
from memc.program import InputSpec

aten = torch.ops.aten


def propagate(graph: Graph, *specs: InputSpec) -> Propagation:
    run = Propagation(GraphModule(torch.nn.Module(), graph), specs)
    for node in graph.nodes:
        run.step(node)
    return run


def tokens(name: str, last: int | str = "T") -> InputSpec:
    return InputSpec(name, "tokens", torch.int64, ("B", last))


def test_nodes_that_are_alike_are_inferred_once() -> None:
    graph = Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    first, second = (graph.call_function(aten.unsqueeze.default, (x, -1)) for x in (a, b))
    graph.output((first, second))
    run = propagate(graph, tokens("a"), tokens("b"))
    assert run.kinds[first] == run.kinds[second]
    assert run.values[first] is run.values[second]


def test_constants_and_types_that_differ_make_another_kind() -> None:
    graph = Graph()
    a, fixed = graph.placeholder("a"), graph.placeholder("fixed")
    turned = graph.call_function(aten.transpose.int, (a, 0, 1))
    nodes: list[Node] = [
        graph.call_function(aten.add.Tensor, (a, 1)),
        graph.call_function(aten.add.Tensor, (a, 1.0)),
        graph.call_function(aten.mul.Tensor, (a, 0.0)),
        graph.call_function(aten.mul.Tensor, (a, -0.0)),
        graph.call_function(aten.add.Tensor, (fixed, 1)),
        graph.call_function(aten.add.Tensor, (turned, 1)),
        graph.call_function(aten.add.Tensor, (turned, 1), {"alpha": 2}),
    ]
    graph.output(tuple(nodes))
    run = propagate(graph, tokens("a"), tokens("fixed", 7))
    assert len({run.kinds[node] for node in nodes}) == len(nodes)
    assert [run.values[node].dtype for node in nodes[:2]] == [torch.int64, torch.float32]


def test_sizes_that_the_data_decide_stay_apart() -> None:
    graph = Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    first, second = (graph.call_function(aten.nonzero.default, (x,)) for x in (a, b))
    graph.output((first, second))
    run = propagate(graph, tokens("a"), tokens("b"))
    assert run.kinds[first] != run.kinds[second]
    assert str(run.values[first].shape[0]) != str(run.values[second].shape[0])
    with run.symbols.mode, enable_python_dispatcher():  # a trace that knows nothing of them
        make_fx(torch.neg)(run.values[a].clone())


def unsqueezed() -> tuple[Graph, Node]:
    graph = Graph()
    made = graph.call_function(aten.unsqueeze.default, (graph.placeholder("a"), -1))
    graph.output((made,))
    return graph, made


def test_nodes_of_two_programs_that_are_alike_are_inferred_once() -> None:
    (one, first), (other, second) = unsqueezed(), unsqueezed()
    assert propagate(one, tokens("a")).values[first] is propagate(other, tokens("a")).values[second]


def test_a_size_that_one_program_makes_a_number_stays_a_size_in_the_next() -> None:
    graph = Graph()
    graph.output((graph.call_function(aten.expand.default, (graph.placeholder("a"), [2, 7])),))
    spoilt = propagate(graph, tokens("a")).symbols
    replaced = spoilt.mode.shape_env
    assert replaced is not None and replaced.replacements
    graph, made = unsqueezed()
    run = propagate(graph, tokens("a"))
    assert run.symbols is not spoilt and str(run.values[made].shape[1]) == str(run.symbols("T"))
    assert run.symbols.mode.shape_env is not None and not run.symbols.mode.shape_env.replacements


def test_no_more_is_kept_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Known, "MOST", 0)
    graph, _ = unsqueezed()
    assert propagate(graph, tokens("a")).symbols is not propagate(graph, tokens("a")).symbols
    assert infer.known() is not infer.known()
