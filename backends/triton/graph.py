"""From a raised program to the module that runs on a GPU: states written in place, products of halves in halves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from memc.dialect import OpSpec, arguments, op_spec
from memc.dialect.in_place import in_place
from memc.errors import MemcError
from memc.prepare import HALF, insert_keep, join_tied, replace_node, results, set_results, source_of
from memc.program import Program

_aten = torch.ops.aten


@dataclass(frozen=True)
class Prepared:
    """A module whose placeholders are the program's inputs, ``keep`` where it has one, and the states.

    It returns the outputs, then the next values of the states that are ``swapped``, by name; all others it writes where
    they lie.
    """

    module: GraphModule
    swapped: tuple[str, ...]
    keep: bool


def prepare(program: Program) -> Prepared:
    """Rewrite a copy of ``program``. Raises ``MemcError`` E601 for a growing state that has no form in place."""
    copy = program.copy()
    graph = copy.module.graph
    join_tied(copy.module)
    placeholders = copy.placeholders()
    held = placeholders[len(copy.inputs) :]
    returned, count = results(graph), len(copy.outputs)
    nexts = dict(zip(held, returned[count:], strict=True))
    for node in list(graph.nodes):
        spec = op_spec(node.target)
        form = in_place(spec) if spec is not None and spec.states else None
        if spec is None or form is None:
            continue
        if _owns_states(node, spec, nexts):
            for name in spec.states:
                del nexts[arguments(node)[name]]
            _replace(node, spec, form)
    for state, placeholder in zip(copy.states, held, strict=True):
        if placeholder in nexts and state.grows is not None:
            reader = next(iter(placeholder.users), placeholder)
            reason = f"its growing state {state.name} has no form that is written in place on a GPU"
            raise MemcError("E601", f"triton cannot lower {reader.target}: {reason}", where=source_of(reader))
    set_results(graph, [*results(graph)[:count], *nexts.values()])
    keep = insert_keep(copy, held[0] if held else None)
    _multiply_halves(copy)
    graph.eliminate_dead_code()
    graph.lint()
    copy.module.recompile()
    return Prepared(copy.module, tuple(str(node.target) for node in nexts), keep)


def _owns_states(node: Node, spec: OpSpec, nexts: dict[Node, Node]) -> bool:
    """Tell whether each state of a node is read by it alone, and goes on as it leaves it."""
    for name, index in spec.states.items():
        past = arguments(node)[name]
        left = [user for user in node.users if user.args[1] == index]
        if past not in nexts or set(past.users) != {node} or len(left) != 1:
            return False
        if nexts[past] is not left[0] or len(left[0].users) != 1:
            return False
    return True


def _replace(node: Node, spec: OpSpec, form: torch._ops.OpOverload) -> None:
    """Put the form in place where ``node`` was; the readers of its outputs read the form's."""
    graph = node.graph
    kept = [index for index in range(len(spec.overload._schema.returns)) if index not in spec.states.values()]
    with graph.inserting_before(node):
        made = graph.call_function(form, node.args, node.kwargs)
        single = len(kept) == 1
        made.meta = {**node.meta, "val": node.meta["val"][kept[0]] if single else None}
    for user in list(node.users):
        index = int(str(user.args[1]))
        if index in spec.states.values():
            user.replace_all_uses_with(made)  # among the results, which are cut off
        elif single:
            replace_node(user, made)
        else:
            user.args = (made, kept.index(index))
            continue
        graph.erase_node(user)
    graph.erase_node(node)


def _multiply_halves(program: Program) -> None:
    """Multiply by weights that are stored as halves in halves, with sums in float32, rather than widen them.

    What is stored in one type and computed with in another is ``linear(x, to(w, float32))``: it becomes
    ``to(linear(to(x, half), w), float32)``, which reads half the bytes and runs on the tensor cores.
    """
    graph = program.module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not _aten.linear.default:
            continue
        weight = node.args[1]
        if not isinstance(weight, Node) or weight.target is not _aten._to_copy.default:
            continue
        stored = weight.args[0]
        kind = stored.meta["val"].dtype if isinstance(stored, Node) and stored.op == "get_attr" else None
        if kind not in HALF:
            continue
        value = node.meta["val"]
        x, _, *bias = node.args
        with graph.inserting_before(node):
            narrow = graph.call_function(_aten._to_copy.default, (x,), {"dtype": kind})
            product = graph.call_function(_aten.linear.default, (narrow, stored))
            wide = graph.call_function(_aten._to_copy.default, (product,), {"dtype": value.dtype})
            if bias and isinstance(bias[0], Node):
                wide = graph.call_function(_aten.add.Tensor, (wide, bias[0]))
        wide.meta = dict(node.meta)
        node.replace_all_uses_with(wide)
        graph.erase_node(node)
