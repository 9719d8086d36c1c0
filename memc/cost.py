"""What a program costs on a target, predicted from its graph: work, bytes, state, time by roofline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from memc import machine
from memc.dialect import OPS, OpSpec, op_spec
from memc.dialect.base import Arguments
from memc.program import Program, get_tensor
from memc.report.facts import CONTEXTS
from memc.report.models import ByContext, Predicted
from memc.runtime.session import CHUNK
from memc.target import Target

aten = torch.ops.aten

# Index of the matrix argument whose second to last (or, for linear, last) axis is summed over.
_PRODUCTS = {
    aten.mm.default: 0,
    aten.bmm.default: 0,
    aten.matmul.default: 0,
    aten.linear.default: 0,
    aten.addmm.default: 1,
    aten.baddbmm.default: 1,
}
_LINEAR = (aten.linear.default, aten.mm.default, aten.addmm.default, aten.matmul.default)
_GATHERS = (aten.embedding.default, aten.index_select.default)

# Bytes of one weight. Quantised ones come in blocks of 32 with a float32 scale and a zero point.
WEIGHT_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1 + 4 / 32 + 1 / 32, "int4": 0.5 + 4 / 32 + 0.5 / 32}

SHORTEST, LONGEST = 128, 131_072
"""Contexts that curves of cost begin and end at."""

SMALL = 1_000_000_000
"""Bytes in float32 under which a half-precision model is read into memory as float32, where every check is faster.

A larger one stays in its file, in its own type, and its parameters are converted one at a time when they are used.
"""

WORKING = 6
"""Copies in float32 of the largest parameter that lowering and checking hold at once, at most."""

CHANNELS = 8
"""Cores that a socket's memory channels feed: more of them read no more."""

# Memory of the process itself, with torch and the runtime loaded, and time of a conversion for one graph node.
_BASE_RSS = 800_000_000
_BASE_SECONDS = 10.0
_NODE_SECONDS = 0.006


@dataclass(frozen=True)
class Work:
    """Work of one new token of one sequence. ``kernels`` counts launches."""

    flops: float
    state_bytes_read: float
    kernels: int


@dataclass(frozen=True)
class Demand:
    """What one new token of one sequence asks of the hardware at a context; ``state_bytes`` are held there."""

    flops: float
    weight_bytes: float
    state_bytes_read: float
    kernels: int
    state_bytes: int

    @property
    def bytes_read(self) -> float:
        """Bytes of weights and of states that are read."""
        return self.weight_bytes + self.state_bytes_read

    def __add__(self, other: Demand) -> Demand:
        """Return what both ask together."""
        return Demand(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Demand) -> Demand:
        """Return what this one asks more."""
        return Demand(*(mine - its for mine, its in zip(astuple(self), astuple(other), strict=True)))


NOTHING = Demand(0.0, 0.0, 0.0, 0, 0)


def demands(program: Program, contexts: Sequence[int], weights: str = "fp32") -> dict[int, Demand]:
    """Return what a token asks at each context, its weights (of a type) read once; as :func:`predict` counts it."""
    kinds, rows = _parameter_kinds(program), _rows_looked_up(program)
    read = sum(
        _read(tensor, kinds.get(name, set()), rows.get(name, 0.0), weights) for name, tensor in _parameters(program)
    )
    done = {context: work(program, context) for context in contexts}
    return {
        context: Demand(one.flops, read, one.state_bytes_read, one.kernels, program.state_bytes(context))
        for context, one in done.items()
    }


def prefill_ms(
    program: Program, lengths: Sequence[int], target: Target, weights: str = "fp32", threads: int | None = None
) -> dict[int, float]:
    """Predict the milliseconds of a prompt of each length, run as a session runs it: in pieces of ``CHUNK`` tokens.

    A piece takes the slower of computing, each of its tokens at the context where it ends, and of reading the weights
    and the state once, and its launches; the logits of its last token alone are computed. Ops that the target has a
    rate of their own for (``prompt_ops``) take what they take besides, those that choose what they read from where they
    do. Nothing without rates.
    """
    peak = _peak(target, weights, prompt=True)
    if not peak or not lengths:
        return {}
    # Work is all but linear in the context between one power of two and the next.
    knots = sorted({*_doubled(1, max(lengths)), *lengths})
    asked = demands(program, knots, weights)
    logits = _logits_flops(program)
    found: dict[int, float] = {}
    ends = sorted({*range(CHUNK, max(lengths) + 1, CHUNK), *lengths})
    flops, state = (
        dict(zip(ends, np.interp(ends, knots, [getattr(asked[knot], name) for knot in knots]), strict=True))
        for name in ("flops", "state_bytes_read")
    )
    slow = {
        name: dict(zip(ends, np.stack([np.interp(ends, knots, each) for each in apart], 1), strict=True))
        for name, apart in ((name, _apart(program, name, knots)) for name in target.prompt_ops)
    }
    cores = (threads or machine.cores()) if target.name == "cpu" else 1
    one = asked[knots[0]]
    for length in lengths:
        seconds = 0.0
        for end in [*range(CHUNK, length, CHUNK), length]:
            tokens = end - (end - 1) // CHUNK * CHUNK
            apart = {name: values[end] for name, values in slow.items()}
            work = tokens * (float(flops[end]) - sum(float(counted) for counted, _ in apart.values()) - logits) + logits
            piece = replace(one, flops=work, state_bytes_read=float(state[end]))
            seconds += _seconds_of(piece, target, peak, threads)
            seconds += tokens * sum(float(done) / target.prompt_ops[name] for name, (_, done) in apart.items()) / cores
        found[length] = 1e3 * seconds
    return found


def predict(
    program: Program,
    target: Target,
    contexts: Sequence[int] = CONTEXTS,
    *,
    weights: str = "fp32",
    threads: int | None = None,
) -> Predicted:
    """Predict the cost of a program on a target.

    Every node must have ``meta['val']`` (``memc.infer.infer``); parameters may be fake. Time per token is the
    slower of computing and reading at the target's peak rates, plus one launch per kernel; targets without rates
    get none, and none of prompts (:func:`prefill_ms`). State is read at the rate of attention where the target has
    one. The rates of the target ``cpu`` are per core: ``threads`` (default: all cores) multiplies them. Of a mixture
    of experts every expert counts, so its figures are upper bounds. An encoder holds no state and decodes nothing: it
    has neither bytes of state nor time per token.
    """
    decoded = contexts if program.model.decoder else ()
    kinds = _parameter_kinds(program)
    weight_bytes = sum(_stored(tensor, kinds.get(name, set()), weights) for name, tensor in _parameters(program))
    asked = demands(program, contexts, weights)
    source_bytes = sum(tensor.numel() * tensor.element_size() for _, tensor in _parameters(program))
    decode = {context: decode_ms(asked[context], target, weights, threads) for context in decoded}
    flops = {context: one.flops for context, one in asked.items()}
    return Predicted(
        parameters=program.parameter_count,
        flops_per_token=flops[min(flops)] if flops else 0.0,
        flops_by_context=flops,
        bytes_read_per_token={context: asked[context].bytes_read for context in decoded},
        decode_ms={context: ms for context, ms in decode.items() if ms is not None},
        prefill_ms=prefill_ms(program, decoded, target, weights, threads),
        state_bytes={context: asked[context].state_bytes for context in decoded},
        weight_bytes=int(weight_bytes),
        fetched_bytes=program.fetched_bytes,
        peak_rss_bytes=int(_BASE_RSS + _loaded(program, source_bytes, weight_bytes)),
        disk_bytes=int(source_bytes + weight_bytes),
        seconds=_seconds(program, source_bytes + weight_bytes, target),
    )


def curve(program: Program, target: Target, *, weights: str = "fp32", threads: int | None = None) -> ByContext:
    """Predict a program's cost at contexts from ``SHORTEST`` on, each twice the last, up to what it can run."""
    limit = program.model.longest or LONGEST
    contexts = [context for context in _doubled(SHORTEST, LONGEST) if context <= limit]
    found = predict(program, target, contexts, weights=weights, threads=threads)
    return ByContext(**{name: getattr(found, name) for name in ByContext.model_fields})


def _doubled(first: int, last: int) -> list[int]:
    return [first << step for step in range((last // first).bit_length())]


def _loaded(program: Program, source_bytes: float, weight_bytes: float) -> float:
    """Bytes of the model in memory at most: twice in float32 if small, else the files' pages and what is lowered."""
    if 4 * program.parameter_count < SMALL:
        return 2.0 * max(source_bytes, 4 * program.parameter_count)
    largest = max(tensor.numel() for _, tensor in _parameters(program))
    return source_bytes + weight_bytes + WORKING * 4 * largest


def _parameters(program: Program) -> list[tuple[str, Tensor]]:
    return list(program.module.named_parameters())


def _parameter_kinds(program: Program) -> dict[str, set[str]]:
    """Tell for each parameter, by the first of its names, how nodes use it: product, gather or other."""
    first = {id(tensor): name for name, tensor in _parameters(program)}
    kinds: dict[str, set[str]] = {}
    for node in program.module.graph.nodes:
        if node.op != "get_attr":
            continue
        name = first.get(id(get_tensor(program.module, str(node.target))))
        if name is not None:
            kinds.setdefault(name, set()).update(_uses(node))
    return kinds


def _uses(node: Node) -> set[str]:
    """Follow transposes and casts to what a parameter is used for."""
    found = set()
    for user in node.users:
        if user.target in (aten.t.default, aten.transpose.int, aten.permute.default, aten._to_copy.default):
            found |= _uses(user)
        elif user.target in _GATHERS and user.args[0] is node:
            found.add("gather")
        else:
            found.add("product" if user.target in _LINEAR else "other")
    return found


def _rows_looked_up(program: Program) -> dict[str, float]:
    """Return how many rows of each parameter that is looked up in one token of one sequence reads, 1 at least."""
    first = {id(tensor): name for name, tensor in _parameters(program)}
    tokens, found = _rows(program), dict[str, float]()
    for node in program.module.graph.nodes:
        if node.target in _GATHERS and node.args[0].op == "get_attr":
            tensor = get_tensor(program.module, str(node.args[0].target))
            rows = _numel(node.meta["val"]) / max(tensor[:1].numel(), 1) / tokens
            name = first.get(id(tensor), "")
            found[name] = found.get(name, 0.0) + max(rows, 1.0)
    return found


def _stored(tensor: Tensor, kinds: set[str], weights: str) -> float:
    quantised = weights in ("int8", "int4")
    if quantised and not ("product" in kinds and tensor.dim() == 2):
        return 4.0 * tensor.numel()
    return WEIGHT_BYTES[weights] * tensor.numel()


def _read(tensor: Tensor, kinds: set[str], rows: float, weights: str) -> float:
    """Bytes read for one token: all of it, or the ``rows`` that are read of what is only looked up in."""
    stored = _stored(tensor, kinds, weights)
    if not kinds:
        return 0.0
    return stored * min(max(rows, 1.0) / max(tensor.shape[0], 1), 1.0) if kinds == {"gather"} else stored


def work(program: Program, context: int) -> Work:
    """Return the work of one token at a context; every node must have ``meta['val']``."""
    rows = _rows(program)
    flops, state, kernels = 0.0, 0.0, 0
    for node in program.module.graph.nodes:
        if node.op != "call_function":
            continue
        spec = op_spec(node.target)
        if spec is not None:
            cost = _call(spec, node).cost(context)
            flops, state, kernels = flops + cost.flops, state + cost.bytes, kernels + 1
        elif node.target in _PRODUCTS:
            flops, kernels = flops + _product_flops(node) / rows, kernels + 1
    return Work(flops, state, kernels)


def op_flops(program: Program, name: str, context: int, *, prompt: bool = False) -> float:
    """Return the operations of one token, of a ``prompt`` or single, that a dialect op does at a context, all nodes."""
    calls = _calls(program, name)
    return sum(call.prompt_flops(context) if prompt else call.cost(context).flops for call in calls)


def _calls(program: Program, name: str) -> list[Arguments]:
    """Return the arguments of every node of a dialect op."""
    nodes = program.module.graph.find_nodes(op="call_function", target=OPS[name].overload)
    return [_call(OPS[name], node) for node in nodes]


def _call(spec: OpSpec, node: Node) -> Arguments:
    return spec.arguments(*_values(node.args), **{key: _value(value) for key, value in node.kwargs.items()})


def _apart(program: Program, name: str, contexts: Sequence[int]) -> tuple[list[float], list[float]]:
    """Return what a dialect op counts for at each context, and what it does there for a token of a prompt.

    Where an op that chooses still reads everything, both are 0: it is attention like any other there.
    """
    counted, done = [0.0] * len(contexts), [0.0] * len(contexts)
    for call in _calls(program, name):
        for index, context in enumerate(contexts):
            if call.reads_all_to is None or context > call.reads_all_to:
                counted[index] += call.cost(context).flops
                done[index] += call.prompt_flops(context)
    return counted, done


def _product_flops(node: Node) -> float:
    assert isinstance(node.target, torch._ops.OpOverload)
    summed = _hint(_value(node.args[_PRODUCTS[node.target]]).shape[-1])
    return 2.0 * summed * _numel(node.meta["val"])


def _rows(program: Program) -> int:
    """Return how many tokens, or inputs of a model that takes none, the example sizes of the graph stand for."""
    for node, spec in zip(program.placeholders(), program.inputs, strict=False):
        if spec.role == "tokens":
            return max(_numel(node.meta["val"]), 1)
        if spec.shape[:1] == ("B",):
            return max(_hint(node.meta["val"].shape[0]), 1)
    return 1


def _values(args: Sequence[Any]) -> list[Any]:
    return [_value(arg) for arg in args]


def _value(arg: Any) -> Any:
    return arg.meta["val"] if isinstance(arg, Node) else arg


def _numel(value: Any) -> int:
    count = 1
    for size in value.shape:
        count *= _hint(size)
    return count


def _hint(size: Any) -> int:
    """Return a size, or the example that a symbolic one was made from, without fixing it."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if hint is not None else 1


def decode_ms(asked: Demand, target: Target, weights: str = "fp32", threads: int | None = None) -> float | None:
    """Return the time of a token in milliseconds by the target's roofline, None where it has no rates."""
    peak = _peak(target, weights)
    return 1e3 * _seconds_of(asked, target, peak, threads) if peak else None


def _peak(target: Target, weights: str, *, prompt: bool = False) -> float | None:
    """Return operations per second with weights of a type, of single tokens or of a prompt; None without rates."""
    of_prompts = target.prompt_flops.get(weights) if prompt else None
    return (of_prompts or target.flops.get(weights) or target.flops.get("fp32")) if target.memory_bandwidth else None


def _seconds_of(asked: Demand, target: Target, peak: float, threads: int | None) -> float:
    """Return the time of one call: the slower of computing and reading, and its launches."""
    bandwidth = target.memory_bandwidth
    assert bandwidth
    computing = asked.flops / peak
    reading = asked.weight_bytes / bandwidth + asked.state_bytes_read / (target.state_bandwidth or bandwidth)
    if target.name == "cpu":
        used = threads or machine.cores()
        computing, reading = computing / used, reading / min(used, CHANNELS)
    return max(computing, reading) + asked.kernels * target.launch_overhead


def _logits_flops(program: Program) -> float:
    """Return the work of one token's logits: of the last product that they come from."""
    results = program.module.graph.output_node().args[0]
    assert isinstance(results, tuple | list)
    node = results[0]
    while isinstance(node, Node) and node.target not in _PRODUCTS:
        sources = node.all_input_nodes
        node = sources[0] if sources and node.op == "call_function" and op_spec(node.target) is None else None
    return _product_flops(node) / _rows(program) if isinstance(node, Node) else 0.0


def _seconds(program: Program, written: float, target: Target) -> float:
    """Estimate the conversion itself: a constant, so much for each node, and writing twice."""
    disk = target.disk_bandwidth or 5e8
    return _BASE_SECONDS + _NODE_SECONDS * len(program.module.graph.nodes) + 2 * written / disk
