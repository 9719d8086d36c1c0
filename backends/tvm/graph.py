"""From a raised program to a graph of ATen ops and the backend's own, all of whose tensors are inputs."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from memc.backends.tvm import ops
from memc.backends.tvm.kernels.common import SLOTS
from memc.backends.tvm.parameters import take_parameters
from memc.backends.tvm.weights import Parameter, Parameters
from memc.dialect import OPS, arguments, op_spec
from memc.dialect.compact_attention import span
from memc.dialect.selectors import SELECTORS
from memc.errors import MemcError
from memc.prepare import (
    TensorSpec,
    identity_of,
    in_float32,
    insert_keep,
    is_memc,
    join_tied,
    replace_node,
    results,
    set_results,
    shape,
    source_of,
    used_outputs,
)
from memc.program import Program, StateSpec, get_tensor

_aten = torch.ops.aten


@dataclass
class Prepared:
    """A program ready for import: placeholders are the inputs (``keep`` last), the states, then the parameters.

    It returns the outputs, then the next values of the states that it ``returned``, which no dialect op takes: all
    others are written in place. ``limits`` are the rows of the tables that whole inputs are looked up in.
    """

    module: GraphModule
    specs: dict[str, TensorSpec]
    states: tuple[StateSpec, ...]
    parameters: list[Parameter]
    limits: dict[str, int]
    keep: bool
    summary: str
    returned: tuple[str, ...] = ()


@dataclass
class _Rewriter:
    """Replaces dialect nodes one at a time."""

    graph: Graph
    states: dict[str, StateSpec]
    outputs: dict[str, Node]
    angles: dict[tuple[Any, ...], tuple[Node, Node]] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)

    def forms(self) -> dict[str, Callable[[Node, Mapping[str, Any]], Sequence[Node | None]]]:
        """The lowering of each dialect op: the nodes of its outputs but states, None for one that nobody reads."""
        return {
            "rotary": self.rotary,
            "norm": self.norm,
            "full_attention": self.full_attention,
            "attention": self.attention,
            "window_memory": self.window_memory,
            "linear_memory": self.linear_memory,
            "sparse_attention": self.sparse_attention,
            "refreshed_attention": self.sparse_attention,
            "quantised_attention": self.quantised_attention,
            "compact_attention": self.compact_attention,
            "events": self.events,
            "bank_ffn": self.bank_ffn,
        }

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        return self.graph.call_function(target, args, kwargs)

    def rewrite(self, node: Node) -> None:
        spec = op_spec(node.target)
        assert spec is not None, "checked before anything is rewritten"
        a = arguments(node)
        for name, index in spec.states.items():
            if name != "past_events":  # which attention reads too: it is not written in place
                self._require_direct(node, a[name], index)
        with self.graph.inserting_before(node):
            made = self.forms()[spec.name](node, a)
        if not spec.states and len(made) == 1:
            replace_node(node, made[0])
            self.graph.erase_node(node)
            return
        for user in list(node.users):
            index = int(str(user.args[1]))
            replace_node(user, made[index] if index < len(made) else a[_state_of(spec.states, index)])
            self.graph.erase_node(user)
        self.graph.erase_node(node)

    def rotary(self, node: Node, a: Mapping[str, Any]) -> list[Node]:
        key = (a["positions"], identity_of(a["inv_freq"]), a["scaling"])
        if key not in self.angles:
            places = self.call(_aten._to_copy.default, a["positions"], dtype=torch.float32)
            angle = self.call(_aten.mul.Tensor, self.call(_aten.unsqueeze.default, places, -1), a["inv_freq"])
            turned = self.call(_aten.cos.default, angle), self.call(_aten.sin.default, angle)
            scaled = [self.call(_aten.mul.Tensor, part, a["scaling"]) if a["scaling"] != 1 else part for part in turned]
            self.angles[key] = scaled[0], scaled[1]
        return [self.call(ops.rotary, a["x"], *self.angles[key], a["interleaved"])]

    def norm(self, node: Node, a: Mapping[str, Any]) -> list[Node]:
        return [self.call(ops.norm, a["x"], a["weight"], a["bias"], float(a["eps"]), a["center"])]

    def full_attention(self, node: Node, a: Mapping[str, Any]) -> list[Node]:
        names = ("query", "key", "value", "key_positions", "bias", "sink_logits", "scale", "softcap")
        return [self.call(ops.full_attention, *(a[name] for name in names))]

    def attention(self, node: Node, a: Mapping[str, Any]) -> list[Node]:
        self._pack(a["past_key"])
        self.dropped.add(str(a["past_positions"].target))
        names = ("query", "key", "value", "positions", "past_key", "past_value", "slopes", "sink_logits")
        rule = ("scale", "softcap", "window", "chunk", "prefix")
        return [self.call(ops.attention, *(a[name] for name in (*names, *rule)))]

    def window_memory(self, node: Node, a: Mapping[str, Any]) -> list[Node | None]:
        self._pack(a["past_key"])
        self.dropped.add(str(a["past_positions"].target))
        used = used_outputs(node)
        names = ("query", "key", "value", "positions", "past_key", "past_value", "slopes", "sink_logits")
        rule = ("scale", "softcap", "window", "sinks")
        made = self.call(ops.window_memory, *(a[name] for name in (*names, *rule)), 1 in used, bool({2, 3} & used))
        parts = [self.call(operator.getitem, made, index) for index in range(4)]
        return [*parts, self._left_position(a) if 4 in used else None]

    def linear_memory(self, node: Node, a: Mapping[str, Any]) -> list[Node]:
        names = ("query", "key", "value", "log_decay", "positions", "state", "beta")
        return [self.call(ops.linear_memory, *(a[name] for name in names))]

    def sparse_attention(self, node: Node, a: Mapping[str, Any]) -> list[Node]:
        keys, pages = str(a["past_key"].target), str(a["past_pages"].target)
        if SELECTORS[a["method"]].choice == "tokens":  # all keys once more, for which tiles serve as well as pages
            self.states[pages] = replace(self.states[keys], name=self.states[pages].name)
        else:
            self._pack(a["past_key"])
        if SELECTORS[a["method"]].choice == "levels":  # what is held of a super-page is one piece
            spec = self.states[pages]
            self.states[pages] = replace(spec, shape=(*spec.shape[:3], math.prod(map(int, spec.shape[3:]))))
        elif SELECTORS[a["method"]].choice != "tree":  # a search reads few descriptions, each by itself
            self._pack(a["past_pages"])
        self.dropped.add(str(a["past_positions"].target))
        names = ("query", "key", "value", "positions", "past_key", "past_value", "past_pages")
        rule = ("scale", "softcap", "method", "page", "budget", "sinks", "window", "rerank", "dense_below", "channels")
        given = [*(a[name] for name in names), self._lists(a), a["sink_logits"], *(a[name] for name in rule), a["mass"]]
        given += [a["beam"], a.get("refresh", 1), float(a.get("contiguity", 0)), a.get("delay", 0)]
        made = self.call(ops.sparse_attention, *given, 1 in used_outputs(node))
        return [self.call(operator.getitem, made, index) for index in range(2)]

    def quantised_attention(self, node: Node, a: Mapping[str, Any]) -> list[Node]:
        spec = self.states[str(a["past_key"].target)]
        batch, groups, pages, _, size = spec.shape
        tiles = f"{str(pages).partition('/')[0]}/{SLOTS}"
        self.states[str(a["past_key"].target)] = replace(spec, shape=(batch, groups, tiles, size, SLOTS))
        self._pack(a["past_pages"])
        self.dropped.add(str(a["past_positions"].target))
        held = ("past_key", "past_value", "past_pages", "past_ranges", "past_key_tail", "past_value_tail")
        rule = ("scale", "softcap", "bits", "page", "budget", "sinks", "window", "rerank", "dense_below")
        names = ("query", "key", "value", "positions", *held, "sink_logits", *rule)
        made = self.call(ops.quantised_attention, *(a[name] for name in names), 1 in used_outputs(node))
        return [self.call(operator.getitem, made, index) for index in range(2)]

    def compact_attention(self, node: Node, a: Mapping[str, Any]) -> list[Node]:
        self._pack(a["past_pages"])
        self.dropped.add(str(a["past_positions"].target))
        names = ("query", "key", "value", "positions", "past_key", "past_value", "past_pages")
        rule = ("scale", "softcap", "interleaved", "method", "page", "budget", "sinks", "window", "dense_below")
        given = [*(a[name] for name in names), self._places(a), a["sink_logits"], *(a[name] for name in rule)]
        made = self.call(ops.compact_attention, *given, 1 in used_outputs(node))
        return [self.call(operator.getitem, made, index) for index in range(2)]

    def _places(self, a: Mapping[str, Any]) -> Node:
        """Return cosines and sines ``[places,2,R/2]`` of all places that keys are turned to, stored once."""
        module = self.graph.owning_module
        assert module is not None
        places = span(a["method"], a["budget"], a["window"], a["dense_below"])
        source = str(a["inv_freq"].target)
        name = f"memc_places_{source.replace('.', '_')}_{places}_{str(a['scaling']).replace('.', '_')}"
        if not hasattr(module, name):
            turned = get_tensor(module, source).detach().float() * torch.arange(places, dtype=torch.float32)[:, None]
            module.register_buffer(name, torch.stack([turned.cos(), turned.sin()], 1) * a["scaling"])
        return self.graph.get_attr(name)

    def _lists(self, a: Mapping[str, Any]) -> Node | None:
        """Let the state of tokens that share a choice hold a list as :mod:`memc.backends.tvm.kernels.turns` has it.

        Of tokens that are taken by their events it is the numbers of these.
        """
        if "refresh" not in a:
            numbers: Node | None = a["events"]
            return numbers
        past: Node = a["past_choice"]
        if a["refresh"] == 1:  # every token chooses for itself
            self.dropped.add(str(past.target))
            return None
        spec = self.states[str(past.target)]
        batch, groups, most = spec.shape
        assert isinstance(most, int)
        places = -(-most // SLOTS) * SLOTS
        self.states[str(past.target)] = replace(spec, dtype=torch.int32, shape=(batch, groups, 2, places))
        return past

    def events(self, node: Node, a: Mapping[str, Any]) -> list[Node]:
        self.dropped.add(str(a["past_positions"].target))
        held = ("past_logits", "past_surprises", "past_keys", "past_events")
        names = ("logits", "tokens", "positions", "key", *held, "gamma", "longest", "refine")
        made = self.call(ops.events, *(a[name] for name in names))
        return [self.call(operator.getitem, made, index) for index in range(5)]

    def bank_ffn(self, node: Node, a: Mapping[str, Any]) -> list[Node]:
        return [self.call(ops.bank_ffn, a["x"], a["block"], a["activation"])]

    def _left_position(self, a: Mapping[str, Any]) -> Node:
        place = self.call(_aten.sub.Tensor, a["positions"], a["window"])
        nothing = self.call(_aten.full_like.default, place, -1)
        return self.call(_aten.where.self, self.call(_aten.ge.Scalar, place, a["sinks"]), place, nothing)

    def _pack(self, past: Node) -> None:
        """Let a state of rows ``[B,G,S,D]``, of keys or of pages, hold them a tile of slots at a time."""
        spec = self.states[str(past.target)]
        batch, groups, slots, size = spec.shape
        if isinstance(slots, str):
            symbol, _, each = slots.partition("/")
            tiles: int | str = f"{symbol}/{int(each or 1) * SLOTS}"
        else:
            tiles = -(-slots // SLOTS)
        self.states[str(past.target)] = replace(spec, shape=(batch, groups, tiles, size, SLOTS))

    def _require_direct(self, node: Node, past: Node, index: int) -> None:
        """Refuse a state that is not read by this node alone, or whose next value is not just this node's."""
        nexts = [user for user in node.users if user.args[1] == index]
        alone = past.target in self.states and set(past.users) == {node}
        if not alone or len(nexts) != 1 or self.outputs[str(past.target)] is not nexts[0] or len(nexts[0].users) != 1:
            reason = f"its state {past} is read or changed by other ops, one that is written in place cannot be"
            raise MemcError("E601", f"tvm cannot lower {node.target}: {reason}", where=source_of(node))


def _state_of(states: Mapping[str, int], index: int) -> str:
    return next(name for name, output in states.items() if output == index)


def prepare(program: Program, parameters: Parameters) -> Prepared:
    """Rewrite a copy of ``program`` for import, in float32; ``parameters`` decides how each tensor is stored.

    Raises ``MemcError`` E601.
    """
    copy = program.copy()
    module, graph = copy.module, copy.module.graph
    join_tied(module)
    placeholders = copy.placeholders()
    inputs, held = placeholders[: len(copy.inputs)], placeholders[len(copy.inputs) :]
    states = {str(node.target): spec for node, spec in zip(held, copy.states, strict=True)}
    count = len(copy.outputs)
    after = dict(zip(states, results(graph)[count:], strict=True))
    rewriter = _Rewriter(graph, states, after)
    returned = {name: place for place, (name, node) in enumerate(after.items(), count) if _is_plain(node)}
    for node in list(graph.nodes):
        node.args, node.kwargs = in_float32(node.args), in_float32(node.kwargs)
        if is_memc(node.target):
            rewriter.rewrite(node)
    keep = insert_keep(copy, held[0] if held else None)
    made = results(graph)
    set_results(graph, [*made[:count], *(made[place] for place in returned.values())])
    for node in held:
        if node.target in rewriter.dropped:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    _count_from_the_front(graph)
    limits = take_parameters(graph, module, parameters, {node: str(node.target) for node in inputs})
    graph.eliminate_dead_code()
    graph.lint()
    # In a module without tensors: the importer reads whatever there is, and what it reads it may have to copy.
    module = GraphModule({}, graph)
    remaining = tuple(replace(s, dtype=in_float32(s.dtype)) for n, s in states.items() if n not in rewriter.dropped)
    read = {str(node.target) for node in graph.find_nodes(op="placeholder")}
    used = [parameter for parameter in parameters.values() if parameter.name in read]
    specs: dict[str, TensorSpec] = {spec.name: (in_float32(spec.dtype), spec.shape) for spec in copy.inputs}
    specs |= {"keep": (torch.int64, ("K",))} if keep else {}
    specs |= {str(node.target): _spec_of(states[str(node.target)]) for node in held if node.target in read}
    specs |= {parameter.name: (parameter.dtype, parameter.shape) for parameter in used}
    return Prepared(module, specs, remaining, used, limits, keep, parameters.summary, tuple(returned))


def _is_plain(after: Node) -> bool:
    """Tell whether the next value of a state is computed by ordinary ops, and not by a dialect op that holds it.

    Events are as if they were: their states are not written in place, but for the positions, which no slot needs.
    """
    if after.op == "call_function" and op_spec(after.all_input_nodes[0].target) is OPS["events"]:
        return int(str(after.args[1])) < 5
    return after.op == "call_function" and not any(is_memc(source.target) for source in (after, *after.all_input_nodes))


def _spec_of(spec: StateSpec) -> TensorSpec:
    return in_float32(spec.dtype), spec.shape


def _count_from_the_front(graph: Graph) -> None:
    """Make indices that count from the end count from the front: the importer reads them as they are.

    Raises ``MemcError`` E601 for one on an axis whose size is known at run time only.
    """
    for target, places in ((_aten.select.int, (2,)), (_aten.slice.Tensor, (2, 3))):
        for node in graph.find_nodes(op="call_function", target=target):
            args = list(node.args)
            for place in places:
                if place < len(args) and isinstance(args[place], int) and args[place] < 0:
                    size = shape(args[0])[args[1]]
                    if not isinstance(size, int):
                        reason = "it counts from the end of an axis whose size is known at run time only"
                        raise MemcError("E601", f"tvm cannot lower {target}: {reason}", where=source_of(node))
                    args[place] += size
            node.args = tuple(args)
