"""Running programs for verification: node by node, in another precision, or in pieces through their state."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from memc.dialect import arguments, op_spec
from memc.program import Program, get_tensor
from memc.verify.inputs import inputs_of, positions_of

PIECE = 256
"""Most tokens that are run at once where a program allows any split: bounds the logits held."""


def run(
    program: Program,
    inputs: Sequence[Tensor],
    state: Sequence[Tensor],
    precision: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    """Run a program in ``precision`` whatever its parameters' type, and return its outputs and next states.

    Parameters of another type are converted one at a time, so that memory for the model as it is stored is enough.
    """
    if _computes_in(program, precision):
        return program(*inputs, *state)
    return run_nodes(program, (*inputs, *state), precision=precision)


def _computes_in(program: Program, precision: torch.dtype) -> bool:
    """Tell whether every parameter has this type: new ones are float32 and may be more than a small model's own."""
    return all(value.dtype == precision for value in program.module.parameters() if value.is_floating_point())


def run_all(
    program: Program, cases: Sequence[Sequence[Tensor]], precision: torch.dtype = torch.float32
) -> list[tuple[Tensor, ...]]:
    """Run a program as :func:`run` does on several inputs; a parameter of another type is converted once for all."""
    if _computes_in(program, precision):
        return [program(*inputs) for inputs in cases]
    return _run_nodes(program, cases, precision)


def whole_all(
    program: Program, texts: Sequence[Tensor], precision: torch.dtype = torch.float32, *, fetch: bool = False
) -> list[Tensor]:
    """Return what :func:`whole` does for each of several ``tokens [B, T]``, run side by side where that is one call.

    Where parameters are converted as they are used, a layer's states are made when it is reached and gone after it.
    """
    given = [inputs_of(program, tokens, fetch=fetch) for tokens in texts]
    if any(len(cut(program, tokens.shape[1])) > 1 for tokens in texts):
        return [
            torch.cat([*pieces(program, tokens, cut(program, tokens.shape[1]), precision, inputs[2:])], 1)
            for tokens, inputs in zip(texts, given, strict=True)
        ]
    if _computes_in(program, precision):
        return [
            program(*inputs, *program.new_state(tokens.shape[0], tokens.device))[0].to(precision)
            for tokens, inputs in zip(texts, given, strict=True)
        ]
    cases: list[tuple[Any, ...]] = [
        (*inputs, *(partial(spec.empty, tokens.shape[0], tokens.device) for spec in program.states))
        for tokens, inputs in zip(texts, given, strict=True)
    ]
    return [results[0].to(precision) for results in _run_nodes(program, cases, precision, outputs=1)]


def whole(program: Program, tokens: Tensor, precision: torch.dtype = torch.float32, *, fetch: bool = False) -> Tensor:
    """Return the first output (logits ``[B, T, vocab]``) for ``tokens [B, T]`` in one call from an empty state.

    In several where a call cannot be as long, see :func:`longest_call`.

    What else the program takes, and what ``fetch`` says, is that of :func:`memc.verify.inputs.inputs_of`.
    """
    return whole_all(program, [tokens], precision, fetch=fetch)[0]


def rows(tokens: Tensor) -> list[Tensor]:
    """Return each sequence of ``tokens [B, T]`` as a batch of one."""
    return [tokens[index : index + 1] for index in range(tokens.shape[0])]


def streams(program: Program) -> bool:
    """Tell whether any split of a sequence gives the same outputs: a raised decoder of split-invariant ops.

    Into calls of no more tokens than :func:`longest_call` says, where it says any.
    """
    specs = (op_spec(node.target) for node in program.module.graph.nodes if node.op == "call_function")
    return program.model.decoder and program.raised and all(spec.split_invariant for spec in specs if spec is not None)


def longest_call(program: Program) -> int | None:
    """Return the most tokens of a call up to which any split gives the same outputs, None for no limit.

    Attention by events sees those that had numbers when the call began, of tokens ``delay`` back or more.
    """
    named = [(op_spec(node.target), node) for node in program.module.graph.nodes if node.op == "call_function"]
    bound = [(spec.name, arguments(node)) for spec, node in named if spec is not None]
    late = max((a["longest"] for name, a in bound if name == "events"), default=0)
    return min((a["delay"] - late for _, a in bound if a.get("events") is not None), default=None)


def cut(program: Program, length: int, most: int | None = None) -> list[int]:
    """Return the sizes of calls that ``length`` tokens are cut into, of at most ``most`` and what a program allows."""
    limits = [limit for limit in (most, longest_call(program)) if limit is not None]
    size = max(1, min(limits, default=length))
    return [min(size, length - start) for start in range(0, length, size)]


def pieces(
    program: Program,
    tokens: Tensor,
    sizes: Sequence[int],
    precision: torch.dtype = torch.float32,
    fetched: Sequence[Tensor] | None = None,
) -> Iterator[Tensor]:
    """Yield the logits ``[B, size, vocab]`` of consecutive pieces of ``tokens [B, T]``, the state carried along.

    Nothing is ``fetched`` where that is not given.
    """
    batch, device = tokens.shape[0], tokens.device
    state, start = program.new_state(batch, device), 0
    fetched = program.nothing_fetched(batch, device) if fetched is None else fetched
    for size in sizes:
        part = tokens[:, start : start + size]
        outputs = run(program, (part, positions_of(part, start), *fetched), state, precision)
        state = outputs[len(program.outputs) :]
        start += size
        yield outputs[0].to(precision)


def logits(
    program: Program, tokens: Tensor, precision: torch.dtype = torch.float32, most: int = PIECE
) -> Iterator[Tensor]:
    """Yield the logits of ``tokens [B, T]``, whole or in pieces of at most ``most`` where that is the same."""
    sizes = cut(program, tokens.shape[1], most)
    if not streams(program) or len(sizes) == 1:
        yield whole(program, tokens, precision)
        return
    yield from pieces(program, tokens, sizes, precision)


def run_nodes(
    program: Program,
    inputs: Sequence[Tensor],
    *,
    precision: torch.dtype | None = None,
    visit: Callable[[Node, Any], None] | None = None,
) -> tuple[Tensor, ...]:
    """Run a program node by node on its inputs and states and return its outputs.

    ``precision`` replaces every floating type: parameters are converted one at a time when used, so that no second copy
    of the model is held. ``visit`` sees every node's value, which is dropped after its last use.
    """
    seen = None if visit is None else lambda node, values: visit(node, values[0])
    return _run_nodes(program, [inputs], precision, seen)[0]


def _run_nodes(
    program: Program,
    cases: Sequence[Sequence[Tensor | Callable[[], Tensor]]],
    precision: torch.dtype | None,
    visit: Callable[[Node, list[Any]], None] | None = None,
    outputs: int | None = None,
) -> list[tuple[Tensor, ...]]:
    """Run several inputs side by side, so that a parameter is converted once for all of them.

    An input may be a function that makes it, called where it is used. ``outputs`` keeps that many of the first alone.
    """
    feeds = [iter(inputs) for inputs in cases]
    last: dict[Node, Node] = {}
    nodes = list(program.module.graph.nodes)
    results: Any = program.module.graph.output_node().args[0]
    kept = tuple(results[:outputs])
    for node in nodes:
        for source in node.all_input_nodes if node.op != "output" else kept:
            last[source] = node
    values: dict[Node, list[Any]] = {}

    def convert(value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(precision) if is_float and precision is not None else value

    for node in nodes:
        if node.op == "placeholder":
            values[node] = [convert(next(feed)) for feed in feeds]
        elif node.op == "get_attr":
            # As it is stored: every parameter may stand before the first use of any.
            values[node] = [get_tensor(program.module, str(node.target))] * len(cases)
        elif node.op == "output":
            return [map_arg(kept, lambda source: convert(values[source][case])) for case in range(len(cases))]  # noqa: B023
        else:
            values[node] = _call(node, values, len(cases), precision, convert)
        if visit is not None:
            visit(node, values[node])
        for source in (node, *node.all_input_nodes):
            if last.get(source, node) is node:
                values.pop(source, None)
    raise ValueError("the graph has no output")


def layer_of(node: Node) -> tuple[int | None, str]:
    """Return the layer's number and the module path that a node was traced under, as far as known."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(node.meta.get("memc", {}).get("path") or (next(reversed(stack.values()))[0] if stack else ""))
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return (int(number[1]) if number else None), path


def _call(
    node: Node,
    values: dict[Node, list[Any]],
    cases: int,
    precision: torch.dtype | None,
    convert: Callable[[Any], Any],
) -> list[Any]:
    """Call a node's op for each case; parameters are converted for this call alone, of a table only what it gives."""

    def made(value: Any) -> Any:
        return convert(value()) if callable(value) else value

    target: Any = node.target
    table = target is torch.ops.aten.embedding.default
    stored = {} if table else {s: convert(values[s][0]) for s in node.all_input_nodes if s.op == "get_attr"}
    results = []
    for case in range(cases):
        known = {s: stored[s] if s in stored else made(values[s][case]) for s in node.all_input_nodes}
        args, kwargs = map_arg((node.args, dict(node.kwargs)), known.__getitem__)
        if precision is not None:
            args, kwargs = _replace_dtype(args, precision), _replace_dtype(kwargs, precision)
        result = target(*args, **kwargs)
        results.append(convert(result) if table else result)
    return results


def _replace_dtype(value: Any, precision: torch.dtype) -> Any:
    if isinstance(value, torch.dtype):
        return precision if value.is_floating_point else value
    if isinstance(value, tuple | list):
        return type(value)(_replace_dtype(item, precision) for item in value)
    if isinstance(value, dict):
        return {key: _replace_dtype(item, precision) for key, item in value.items()}
    return value
