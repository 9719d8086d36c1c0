"""What backends do alike to a program before they lower it: choose logits, join tied tensors, export, name ports."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from memc.artifact import Port, State
from memc.backend import LowerOptions, No, Yes
from memc.errors import MemcError
from memc.program import OutputSpec, Program, StateSpec, named_tensors
from memc.target import Target

HALF = (torch.float16, torch.bfloat16)

SYMBOLS = {
    "B": "sequences",
    "T": "new tokens",
    "U": "tokens of the decoder of an encoder-decoder",
    "K": "columns whose logits are wanted",
    "S": "slots: capacity + 1",
}

DEFAULT_CAPACITY = 4096
"""Tokens that a growing state holds when neither the user nor the model names a limit."""

TensorSpec = tuple[torch.dtype, tuple[int | str, ...]]

# At least 2 and all distinct: export specialises on 0 and 1, and takes equal sizes for one.
EXAMPLE = {"K": 2, "B": 3, "T": 5, "U": 7, "S": 11}

_aten = torch.ops.aten
ELEMENTWISE = frozenset(
    {
        _aten.mul.Tensor,
        _aten.mul.Scalar,
        _aten.div.Tensor,
        _aten.div.Scalar,
        _aten.tanh.default,
        _aten.to.dtype,
        _aten._to_copy.default,
    }
)


def is_memc(target: object) -> bool:
    """Tell whether a node's target is of the ``memc::`` namespace, known to the dialect or not."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "memc"


def shape(node: Node) -> tuple[Any, ...]:
    """Return the recorded shape of a node's tensor."""
    return tuple(node.meta["val"].shape)


def used_outputs(node: Node) -> set[int]:
    """Return which outputs of a node with several are read."""
    return {int(str(user.args[1])) for user in node.users if user.users}


def source_of(node: Node) -> str:
    """Return the line of the model's own source that a node comes from, as raising recorded it."""
    return str(node.meta.get("memc", {}).get("source", "")) or node.name


def replace_node(old: Node, new: Node | None) -> None:
    """Let the readers of a node read another, which takes its recorded shape; None for one that nobody reads."""
    if new is not None:
        # Later forms read sizes off the nodes that they take.
        if new.op != "placeholder":
            new.meta = dict(old.meta)
        old.replace_all_uses_with(new)


def identity_of(argument: Any) -> Any:
    """Return what tells apart what nodes read: two ``get_attr`` nodes of one tensor are the same."""
    return ("attr", argument.target) if isinstance(argument, Node) and argument.op == "get_attr" else argument


def in_float32(argument: Any) -> Any:
    """Return a node's arguments with float32 for the types of half precision."""
    return map_aggregate(argument, lambda item: torch.float32 if item in HALF else item)


def join_tied(module: GraphModule) -> None:
    """Read a tensor that has several names by the first of them, so that it is written once."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(tensor), name) for name, tensor in named_tensors(module)}
    for node in module.graph.find_nodes(op="get_attr"):
        node.target = names.get(node.target, node.target)


def insert_keep(program: Program, before: Node | None) -> bool:
    """Add the input ``keep [K]`` and select its columns where that first suffices: at the input of the last linear.

    Walks back from the logits through ops on each element alone; where that ends elsewhere, selects the logits.
    A program whose first output has no token axis gets no such input.
    """
    if program.outputs[0].shape[:2] != ("B", "T"):
        return False
    graph = program.module.graph
    outputs = results(graph)
    node = outputs[0]
    while len(node.users) == 1 and node.target in ELEMENTWISE and _others_constant(node):
        node = node.all_input_nodes[0]
    linear = len(node.users) == 1 and node.target is torch.ops.aten.linear.default
    with graph.inserting_before(before or _first_compute(graph)):
        keep = graph.placeholder("keep")
    chosen = node.all_input_nodes[0] if linear else outputs[0]
    with graph.inserting_after(chosen):
        selected = graph.call_function(torch.ops.aten.index_select.default, (chosen, 1, keep))
    if linear:
        node.args = (selected, *node.args[1:])
    else:
        set_results(graph, [selected, *outputs[1:]])
    return True


def match_linear(node: Node) -> tuple[bool, Node, Node, Node | None] | None:
    """Read a product with a stored matrix: whether it is ``[in, out]``, what it multiplies, the matrix and the bias."""
    match node.target, node.args:
        case _aten.linear.default, (Node() as x, Node(op="get_attr") as weight, *bias):
            return False, x, weight, bias[0] if bias and isinstance(bias[0], Node) else None
        case _aten.addmm.default, (Node() as bias_, Node() as x, Node(op="get_attr") as weight) if not node.kwargs:
            return True, x, weight, bias_
        case ((_aten.mm.default | _aten.matmul.default), (Node() as x, Node(op="get_attr") as weight)):
            return (True, x, weight, None) if len(shape(weight)) == 2 else None
    return None


def results(graph: Graph) -> list[Node]:
    """Return the outputs of a graph, which returns a flat tuple."""
    returned = graph.output_node().args[0]
    assert isinstance(returned, tuple | list)
    return [result for result in returned if isinstance(result, Node)]


def set_results(graph: Graph, outputs: list[Node]) -> None:
    """Let a graph return these nodes."""
    graph.output_node().args = (tuple(outputs),)


def export_module(program: Program, module: GraphModule, specs: Mapping[str, TensorSpec]) -> ExportedProgram:
    """Run ``torch.export`` on a module whose placeholders are among ``specs``, named sizes dynamic.

    Raises whatever torch raises for what it cannot export.
    """
    inputs = [specs[str(node.target)] for node in module.graph.find_nodes(op="placeholder")]
    names = {symbol for _, sizes in inputs for symbol in sizes if isinstance(symbol, str)}
    longest = _longest(program)
    # The pages of a state have a size of their own here: what ties it to the tokens' is arithmetic that no op checks.
    dims = {
        name: Dim(name.replace("/", "_"), min=1, max=longest if name in ("T", "U") else None) for name in sorted(names)
    }
    example = tuple(
        torch.zeros([_example(size) if isinstance(size, str) else size for size in sizes], dtype=dtype)
        for dtype, sizes in inputs
    )
    dynamic = tuple({i: dims[s] for i, s in enumerate(sizes) if isinstance(s, str)} for _, sizes in inputs)
    with torch.no_grad():
        return torch.export.export(module, example, dynamic_shapes=dynamic)


def named_node(program: Program, text: str) -> Node | None:
    """Find the first node whose op an error's text names, as it is or as what it was decomposed into."""
    named = set(re.findall(r"torch\.ops\.\w+\.(\w+)", text)) | set(re.findall(r"\b\w+::(\w+)", text))
    for node in program.module.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            op = str(node.target).split(".")[1]
            if any(op == name or op.endswith(f"_{name}") for name in named):
                found: Node = node
                return found
    return None


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def forms_of(
    program: Program, target: Target, backend: str, supports: Callable[[Node, Target], Yes | No]
) -> dict[str, str]:
    """Return how each dialect op of a program is lowered, its commonest form first.

    Raises ``MemcError`` E601 with the source line at the first op that the backend does not support.
    """
    forms: dict[str, Counter[str]] = {}
    for node in program.module.graph.nodes:
        if node.op != "call_function":
            continue
        match supports(node, target):
            case No(reason):
                reason = f"{backend} cannot lower {node.target}: {reason}"
                raise MemcError("E601", reason, source_of(node), "another --backend or --target")
            case Yes(how) if is_memc(node.target):
                forms.setdefault(node.target.name().partition("::")[2], Counter())[how] += 1
    return {op: "; ".join(f"{how} (x{n})" for how, n in found.most_common()) for op, found in forms.items()}


def capacity_of(program: Program, options: LowerOptions, *, grows: bool) -> int | None:
    """Return the most tokens that a sequence may have, None for no limit; ``grows``: it has buffers of fixed size."""
    limit = program.model.longest
    if grows:
        return options.context or program.model.max_positions or DEFAULT_CAPACITY
    return min(filter(None, (options.context, limit)), default=None) if limit else None


def ports(
    program: Program, states: Sequence[StateSpec], in_place: frozenset[str], *, keep: bool, halves: bool = False
) -> tuple[list[Port], list[Port], list[State], dict[str, str]]:
    """Describe inputs, outputs and states of what is lowered, and what their symbols mean.

    ``halves``: what is of half precision stays so; else it is float32.
    """
    kind = _name if halves else _dtype
    inputs = [
        Port(name=spec.name, role=spec.role, dtype=kind(spec.dtype), shape=list(spec.shape)) for spec in program.inputs
    ]
    if keep:
        inputs.append(Port(name="keep", role="keep", dtype="int64", shape=["K"]))
    outputs = [_output(spec, kind(spec.dtype), index, keep) for index, spec in enumerate(program.outputs)]
    held = [
        State(
            input=spec.name,
            output=spec.output,
            dtype=kind(spec.dtype),
            shape=list(spec.shape),
            init=spec.init,
            update="alias" if spec.name in in_place else "swap",
            grows=spec.grows,
        )
        for spec in states
    ]
    used = {size for shapes in (inputs, outputs, held) for port in shapes for size in port.shape}
    symbols = {symbol: meaning for symbol, meaning in SYMBOLS.items() if symbol in used}
    symbols |= {size: f"pages: ceil(S / {size[2:]})" for size in sorted(map(str, used)) if size.startswith("S/")}
    return inputs, outputs, held, symbols


def _output(spec: OutputSpec, dtype: str, index: int, keep: bool) -> Port:
    sizes = list(spec.shape)
    if index == 0 and keep:
        sizes[1] = "K"
    return Port(name=spec.name, role="logits" if index == 0 else "other", dtype=dtype, shape=sizes)


def _dtype(dtype: torch.dtype) -> str:
    return _name(in_float32(dtype))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _longest(program: Program) -> int | None:
    """Return the bound of a length that an encoder cuts its table of positions to; a decoder looks positions up.

    One less than the table: at the whole of it the cut is none, which export takes for another graph. It runs the same.
    """
    limit = program.model.longest
    return None if program.model.decoder or limit is None else limit - 1


def _example(symbol: str) -> int:
    """Return an example of a size; pages get one for each page size."""
    _, _, page = symbol.partition("/")
    return max(EXAMPLE.values()) + 2 + int(page) if page else EXAMPLE[symbol]


def _first_compute(graph: Graph) -> Node:
    node: Node = next(node for node in graph.nodes if node.op != "placeholder")
    return node


def _others_constant(node: Node) -> bool:
    return isinstance(node.args[0], Node) and all(
        not isinstance(argument, Node) or (argument.op == "get_attr" and argument.meta["val"].numel() == 1)
        for argument in node.args[1:]
    )
