"""Find feed-forward blocks: an elementwise function of one or two projections of one input, projected back."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from memc.program import get_tensor
from memc.raising.evaluate import UnknownValueError, ancestors, content_nodes, evaluate, hints, shape

aten = torch.ops.aten

LINEAR = {aten.linear.default, aten.addmm.default, aten.mm.default}
_VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.dropout.default,
    aten.to.dtype,
    aten._to_copy.default,
    aten.type_as.default,
    aten.flatten.using_ints,
}
_SPLITS = {aten.split.Tensor, aten.chunk.default, aten.split_with_sizes.default, aten.slice.Tensor, operator.getitem}
ELEMENTWISE = {
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.add.Tensor,
    aten.add.Scalar,
    aten.div.Tensor,
    aten.pow.Tensor_Scalar,
    aten.pow.Tensor_Tensor,
    aten.tanh.default,
    aten.sigmoid.default,
    aten.erf.default,
    aten.exp.default,
    aten.relu.default,
    aten.silu.default,
    aten.gelu.default,
    aten.square.default,
    aten.softplus.default,
    aten.hardtanh.default,
    aten.clamp.default,
    aten.mish.default,
    aten.elu.default,
    aten.leaky_relu.default,
    aten.hardswish.default,
    aten.rsub.Scalar,
    aten.sub.Tensor,
    aten.neg.default,
    aten.where.self,
    aten.gt.Scalar,
    aten.lt.Scalar,
    aten.min.other,
    aten.max.other,
    aten.minimum.default,
    aten.maximum.default,
    aten.expm1.default,
    aten.abs.default,
}

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "identity": lambda x: x,
    "elu": F.elu,
    "mish": F.mish,
}

OTHER = "other"
"""Any other elementwise function of one projection, such as one with parameters of its own (xIELU)."""


@dataclass(frozen=True)
class FoundFeedForward:
    """The nodes of one feed-forward network; for packed weights ``gate`` and ``up`` are the same projection.

    What ``down`` projects may be normalised first (BitNet b1.58).
    """

    input: Node
    up: Node
    gate: Node | None
    down: Node
    output: Node
    activation: str
    hidden: int


def find_feed_forward(module: GraphModule) -> Iterator[FoundFeedForward]:
    """Yield every feed-forward network in graph order."""
    content = content_nodes(module, module.graph.find_nodes(op="placeholder"))
    for down in module.graph.nodes:
        if down.target not in LINEAR or down not in content:
            continue
        entry = _before_norm(linear_input(down))
        sources = _projections(entry, content)
        if not sources or len(sources) > 2:
            continue
        inputs = {_see_through(linear_input(source)) for source in sources}
        if len(inputs) != 1:
            continue
        if entry is not linear_input(down) and hints(down)[-1] != hints(next(iter(inputs)))[-1]:
            continue  # as what makes logits of masked tokens: a layer, a norm and the vocabulary
        found = _classify(module, entry, sources)
        if found is None:
            continue
        activation, gate, up, hidden = found
        if activation == "identity":
            continue
        output = down
        while output.target in LINEAR | _VIEWS and len(output.users) == 1 and next(iter(output.users)).target in _VIEWS:
            output = next(iter(output.users))
        yield FoundFeedForward(inputs.pop(), up, gate, down, output, activation, hidden)


def linear_input(node: Node) -> Node:
    """Return the activations that a linear op multiplies."""
    source = node.args[1] if node.target == aten.addmm.default else node.args[0]
    assert isinstance(source, Node)
    return source


def linear_weight(node: Node) -> Node:
    """Return the weight that a linear op multiplies by."""
    weight = node.args[2] if node.target == aten.addmm.default else node.args[1]
    assert isinstance(weight, Node)
    return weight


def linear_parts(node: Node) -> tuple[Node, Node | None, int, int]:
    """Return weight and bias of a linear op, and the weight's axes of outputs and of inputs."""
    if node.target == aten.addmm.default:
        bias, _, weight = node.args
    elif node.target == aten.mm.default:
        (_, weight), bias = node.args, None
    else:
        weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
    assert isinstance(weight, Node) and (bias is None or isinstance(bias, Node))
    return (weight, bias, 0, 1) if node.target == aten.linear.default else (weight, bias, 1, 0)


def _see_through(node: Node) -> Node:
    while node.target in _VIEWS:
        node = node.all_input_nodes[0]
    return node


def _before_norm(entry: Node) -> Node:
    """Return what is normalised before it is projected, or the entry itself."""
    node = _see_through(entry)
    source = node.args[0] if node.target == torch.ops.memc.norm.default else entry
    assert isinstance(source, Node)
    return source


def _projections(entry: Node, content: set[Node]) -> list[Node]:
    """Return the linear ops that elementwise ops and views lead back to, in graph order; empty if others are met."""
    found: list[Node] = []
    seen: set[Node] = set()
    stack = [entry]
    elementwise = False
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in LINEAR:
            found.append(node)
            continue
        if node not in content:
            continue
        if node.target not in _VIEWS | _SPLITS | ELEMENTWISE:
            return []
        elementwise |= node.target in ELEMENTWISE
        stack += node.all_input_nodes
        if len(seen) > 40:
            return []
    if not elementwise:
        return []
    order = {node: index for index, node in enumerate(entry.graph.nodes)}
    return sorted(found, key=order.__getitem__)


def _classify(module: GraphModule, entry: Node, sources: list[Node]) -> tuple[str, Node | None, Node, int] | None:
    """Settle by evaluation what lies between the projections and ``entry``: activation, gate, up and hidden width."""
    hidden = hints(entry)[-1]
    widths = [hints(source)[-1] for source in sources]
    grid = torch.linspace(-4.0, 4.0, hidden)
    other = torch.linspace(0.3, 1.7, hidden).flip(0)
    if len(sources) == 1 and widths == [hidden]:
        name = _activation(_run(module, entry, {sources[0]: grid}), grid, None)
        if name is None and _bends(module, entry, sources[0], grid):
            name = OTHER
        return (name, None, sources[0], hidden) if name else None
    if len(sources) == 1 and widths == [2 * hidden]:
        pairs = {
            "halves": torch.cat([grid, other]),
            "interleaved": torch.stack([grid, other], dim=-1).flatten(),
        }
        for packed in pairs.values():
            for swapped in (False, True):
                feed = packed if not swapped else _swap(packed, packed is pairs["halves"])
                name = _activation(_run(module, entry, {sources[0]: feed}), grid, other)
                if name:
                    return name, sources[0], sources[0], hidden
        return None
    if len(sources) == 2 and widths == [hidden, hidden]:
        for gate, up in (sources, sources[::-1]):
            name = _activation(_run(module, entry, {gate: grid, up: other}), grid, other)
            if name:
                return name, gate, up, hidden
    return None


def _swap(packed: Tensor, halves: bool) -> Tensor:
    if halves:
        first, second = packed.chunk(2)
        return torch.cat([second, first])
    return packed.reshape(-1, 2).flip(-1).flatten()


def _run(
    module: GraphModule, entry: Node, feeds: dict[Node, Tensor], stand_ins: Mapping[Node, Tensor] | None = None
) -> Tensor | None:
    """Evaluate the elementwise part on one token: ``feeds [width]`` -> ``[hidden]``, ``stand_ins`` as they are."""
    made = dict(stand_ins or {})
    for node, values in feeds.items():
        rank = len(shape(node))
        made[node] = values.reshape([1] * (rank - 1) + [-1])
    for placeholder in module.graph.find_nodes(op="placeholder"):
        made[placeholder] = torch.zeros([1] * len(shape(placeholder)), dtype=placeholder.meta["val"].dtype)
    try:
        value: Tensor = evaluate(module, [entry], made)[0]
    except (UnknownValueError, RuntimeError, IndexError):
        return None
    return value.flatten()


def _bends(module: GraphModule, entry: Node, source: Node, grid: Tensor) -> bool:
    """Tell whether the elementwise part is no straight line; parameters of its own have some value there."""
    made = {
        node: torch.full(hints(node), 0.7)
        for node in ancestors([entry], [source])
        if node.op == "get_attr" and isinstance(get_tensor(module, str(node.target)), FakeTensor)
    }
    values = [_run(module, entry, {source: factor * grid}, made) for factor in (0.0, 1.0, 2.0)]
    if any(value is None or value.shape != grid.shape for value in values):
        return False
    zero, once, twice = values
    return not torch.allclose(twice - once, once - zero, atol=1e-4)  # type: ignore[operator]


def _activation(value: Tensor | None, grid: Tensor, other: Tensor | None) -> str | None:
    if value is None or value.numel() != grid.numel():
        return None
    for name, function in ACTIVATIONS.items():
        expected = function(grid) * (other if other is not None else 1.0)
        if torch.allclose(value, expected, atol=1e-5, rtol=1e-5):
            return name
    return None
