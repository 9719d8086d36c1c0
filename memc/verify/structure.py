"""Well-formedness: whether a program is what its specification says, without running it on values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.fx import Node

from memc.artifact import held
from memc.dialect import op_spec
from memc.errors import MemcError
from memc.infer import EXAMPLE_SIZES, Propagation, Symbols
from memc.program import Dim, InputSpec, OutputSpec, Program, StateSpec, get_tensor


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a program; ``node`` names the graph node or the specification's entry."""

    node: str
    reason: str


def well_formed(program: Program) -> list[Problem]:
    """Return everything that is wrong with a program's graph, specification or recorded values.

    Checks the graph's own rules, that every ``memc::`` op is in the dialect table, that placeholders and outputs agree
    in number, type and shape with inputs, outputs and states (a state comes out as it went in, longer by ``T`` where it
    grows), that a run on fake tensors reproduces every recorded ``meta["val"]``, and that no size became a number.
    """
    problems = list(_graph_problems(program))
    if problems:
        return problems
    run = Propagation(program.module, _fed(program))
    for node in program.module.graph.nodes:
        try:
            run.step(node)
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AssertionError, AttributeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return [Problem(node.name, f"does not run on its inputs' shapes: {reason}")]
    problems += _recorded_problems(program, run.values, run.symbols)
    problems += _output_problems(program, run.values, run.symbols)
    problems += _specialised(program, run.symbols)
    return problems


def require_well_formed(program: Program, where: str = "") -> None:
    """Raise ``MemcError`` E401 naming the first problem of a program; ``where`` says after which step."""
    problems = well_formed(program)
    if problems:
        first = problems[0]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        place = f"{where}: {first.node}" if where else first.node
        raise MemcError("E401", f"program is not well formed: {first.reason}{more}", place)


def _fed(program: Program) -> list[InputSpec | StateSpec]:
    return [*program.inputs, *program.states]


def _graph_problems(program: Program) -> Iterator[Problem]:
    graph = program.module.graph
    try:
        graph.lint()
    except RuntimeError as error:
        yield Problem("graph", str(error).splitlines()[0])
        return
    specs = _fed(program)
    placeholders = program.placeholders()
    if len(placeholders) != len(specs):
        yield Problem("inputs", f"{len(placeholders)} placeholders for {len(specs)} inputs and states")
    for node, spec in zip(placeholders, specs, strict=False):
        if str(node.target) != spec.name:
            yield Problem(node.name, f"placeholder is called {node.target}, its specification {spec.name}")
    yield from _duplicates([spec.name for spec in specs] + [spec.name for spec in program.outputs])
    outputs = graph.find_nodes(op="output")
    if len(outputs) != 1 or not isinstance(outputs[0].args[0], tuple | list):
        yield Problem("output", "the graph returns no flat tuple")
    elif (found := len(outputs[0].args[0])) != (expected := len(program.outputs) + len(program.states)):
        yield Problem("output", f"{found} results for {expected} outputs and states")
    for node in graph.nodes:
        if node.op == "get_attr":
            try:
                get_tensor(program.module, str(node.target))
            except AttributeError:
                yield Problem(node.name, f"there is no tensor {node.target}")
        elif node.op in ("call_module", "call_method"):
            yield Problem(node.name, f"{node.op} has no place in a program")
        elif getattr(node.target, "namespace", "") == "memc" and op_spec(node.target) is None:
            yield Problem(node.name, f"{node.target} is not in the dialect table")


def _duplicates(names: Iterable[str]) -> Iterator[Problem]:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            yield Problem(name, "two inputs, outputs or states have this name")
        seen.add(name)


def _output_problems(program: Program, values: Mapping[Node, Any], symbols: Symbols) -> Iterator[Problem]:
    results: Any = program.module.graph.find_nodes(op="output")[0].args[0]
    specs: list[OutputSpec | StateSpec] = [*program.outputs, *program.states]
    for node, spec in zip(results, specs, strict=True):
        value = values[node] if isinstance(node, Node) else None
        name = node.name if isinstance(node, Node) else "output"
        if not isinstance(value, Tensor):
            yield Problem(name, f"{spec.name} is not a tensor")
            continue
        if value.dtype != spec.dtype:
            yield Problem(name, f"{spec.name} has type {value.dtype}, its specification {spec.dtype}")
        expected = _expected_shape(spec, symbols)
        if not _same_shape(value.shape, expected):
            shapes = f"{_render(value.shape)}, its specification {_render(expected)}"
            yield Problem(name, f"{spec.name} has shape {shapes}")


def _expected_shape(spec: InputSpec | OutputSpec | StateSpec, symbols: Symbols) -> list[Any]:
    sizes: list[Any] = [symbols(size) for size in spec.shape]
    if isinstance(spec, StateSpec) and spec.grows is not None:
        sizes[spec.grows] = held(spec.shape[spec.grows], symbols("S") + symbols("T"))
    return sizes


def _recorded_problems(program: Program, values: Mapping[Node, Any], symbols: Symbols) -> Iterator[Problem]:
    names = _recorded_symbols(program)
    sizes = {symbol: EXAMPLE_SIZES[name] for symbol, name in names.items() if name in EXAMPLE_SIZES}
    for node, value in values.items():
        recorded = node.meta.get("val")
        if recorded is None:
            continue
        old, new = _flat(recorded), _flat(value)
        if len(old) != len(new):
            yield Problem(node.name, f"{len(old)} values were recorded, {len(new)} are inferred")
        for before, after in zip(old, new, strict=False):
            if before.dtype != after.dtype:
                yield Problem(node.name, f"type {before.dtype} was recorded, {after.dtype} is inferred")
            elif not _agree(before.shape, after.shape, sizes):
                shapes = f"{_render(before.shape)} was recorded, {_render(after.shape)} is inferred"
                yield Problem(node.name, f"shape {shapes}")


def _recorded_symbols(program: Program) -> dict[sympy.Symbol, Dim]:
    """Map the symbols of the recorded values to the names of the specification, by way of the placeholders."""
    found: dict[sympy.Symbol, Dim] = {}
    for node, spec in zip(program.placeholders(), _fed(program), strict=True):
        recorded = node.meta.get("val")
        for size, name in zip(getattr(recorded, "shape", ()), spec.shape, strict=False):
            if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                found[size.node.expr] = name
    return found


def _agree(before: Iterable[Any], after: Iterable[Any], sizes: Mapping[sympy.Symbol, int]) -> bool:
    """Compare two shapes under different symbols; a size that cannot be evaluated agrees with anything."""
    left, right = list(before), list(after)
    if len(left) != len(right):
        return False
    for old, new in zip(left, right, strict=True):
        first = _number(old, sizes)
        second = _number(new, None)
        if first is not None and second is not None and first != second:
            return False
    return True


def _number(size: Any, sizes: Mapping[sympy.Symbol, int] | None) -> int | None:
    if not isinstance(size, torch.SymInt):
        return int(size)
    if sizes is None:
        hint = size.node.hint if size.node.has_hint() else None
        return None if hint is None else int(hint)
    expression = sympy.sympify(size.node.expr).subs(dict(sizes))
    return int(expression) if expression.is_number else None


def _same_shape(found: Iterable[Any], expected: Iterable[Any]) -> bool:
    left, right = list(found), list(expected)
    return len(left) == len(right) and all(_expression(a) == _expression(b) for a, b in zip(left, right, strict=True))


def _expression(size: Any) -> Any:
    return sympy.expand(size.node.expr) if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def _render(shape: Iterable[Any]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"


def _specialised(program: Program, symbols: Symbols) -> Iterator[Problem]:
    shape_env = symbols.mode.shape_env
    names = {size for spec in _fed(program) for size in spec.shape if isinstance(size, str)}
    for name in sorted(names):
        size = symbols(name)
        if shape_env is not None and isinstance(size, torch.SymInt):
            expression = shape_env.replace(size.node._expr)
            if not expression.free_symbols:
                yield Problem("graph", f"size {name} was turned into the number {expression}")


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in _flat(item)]
    return []
