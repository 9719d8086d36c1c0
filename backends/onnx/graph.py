"""From a raised program to a graph of ATen ops and calls of ONNX functions, with the states that the file will have."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from memc.backends.onnx import attend, bank, calls, compact, events, functions, quantised, refreshed, sparse, window
from memc.backends.onnx.capability import has_kernel
from memc.backends.onnx.functions import Function
from memc.backends.onnx.simplify import simplify
from memc.backends.onnx.stored import mark_linears, refuse_negative_ids
from memc.backends.onnx.support import MICROSOFT, memory, plain_reason, rule, scores, segmentation
from memc.dialect import OPS, arguments, op_spec
from memc.errors import MemcError
from memc.kernels.sparse_attention.choose import Rule
from memc.prepare import (
    HALF,
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
from memc.program import Program, StateSpec, named_tensors, set_tensor

LARGE = 1 << 20
"""Elements from which a tensor is converted at writing time."""


@dataclass
class Prepared:
    """A program ready for export: placeholders are ``inputs`` (``keep`` last), then ``states``."""

    module: GraphModule
    states: tuple[StateSpec, ...]
    buffers: frozenset[str]
    """Names of the states that are fixed buffers, slot = position."""
    in_place: frozenset[str]
    """Names of the states whose input and output may be one piece of memory, the buffers among them."""
    functions: dict[str, Function]
    late: dict[str, torch.Tensor]
    """Large tensors of another precision, converted when they are written."""
    parts: frozenset[str]
    """Names of the inputs that the file takes in ``bank.PARTS``."""
    keep: bool


@dataclass
class _Rewriter:
    """Replaces dialect nodes one at a time; plans are shared by all nodes that agree on what they read."""

    graph: Graph
    states: dict[str, StateSpec]
    outputs: dict[str, Node]
    portable: bool
    functions: dict[str, Function] = field(default_factory=dict)
    plans: dict[tuple[Any, ...], Node] = field(default_factory=dict)
    rings: dict[tuple[Any, ...], Node] = field(default_factory=dict)
    buffers: set[str] = field(default_factory=set)
    in_place: set[str] = field(default_factory=set)
    dropped: set[str] = field(default_factory=set)
    matrices: dict[Node, dict[str, Node]] = field(default_factory=dict)

    def kernel(self, op: str, domain: str = "") -> bool:
        return not self.portable and has_kernel(op, domain)

    def call(self, target: Callable[..., Any], function: Function, *args: Any) -> Node:
        self.functions[function.name] = function
        return self.graph.call_function(target, (function.name, *args))

    def plan(self, target: Callable[..., Any], function: Function, *args: Any, sizes: Sequence[Node] = ()) -> Node:
        """Return the node that plans for all who read ``args`` alike.

        Of ``sizes`` only the size is read: buffers of one kind are equally long, so that the first ones serve for all.
        """
        key = (function.name, *(identity_of(argument) for argument in args))
        if key not in self.plans:
            self.plans[key] = self.call(target, function, *args, *sizes)
        return self.plans[key]

    def parts(self, node: Node, count: int) -> list[Node]:
        return [self.graph.call_function(operator.getitem, (node, index)) for index in range(count)]

    def forms(self) -> dict[str, Callable[[Node, Mapping[str, Any]], Sequence[Node | None]]]:
        """The lowering of each dialect op: the nodes of its outputs, None for one that nobody reads."""
        return {
            "rotary": self.rotary,
            "norm": self.norm,
            "full_attention": self.full_attention,
            "attention": self.attention,
            "sparse_attention": self.sparse_attention,
            "refreshed_attention": self.sparse_attention,
            "quantised_attention": self.quantised_attention,
            "compact_attention": self.compact_attention,
            "events": self.events,
            "window_memory": self.window_memory,
            "linear_memory": self.linear_memory,
            "bank_ffn": self.bank_ffn,
        }

    def rewrite(self, node: Node) -> None:
        spec = op_spec(node.target)
        if spec is None or spec.name not in self.forms():
            raise _refuse(node, "it is no dialect op that this backend knows")
        with self.graph.inserting_before(node):
            made = self.forms()[spec.name](node, arguments(node))
        if len(made) == 1:
            replace_node(node, made[0])
        else:
            for user in list(node.users):
                result = made[int(str(user.args[1]))]
                replace_node(user, result)
                if user.users:
                    raise _refuse(node, "an output that the lowered form does not have is read")
                self.graph.erase_node(user)
        self.graph.erase_node(node)

    def rotary(self, node: Node, a: Mapping[str, Any]) -> list[Node]:
        plan = self.plan(calls.rotary_plan, functions.rotary_plan(a["scaling"]), a["positions"], a["inv_freq"])
        rotated = 2 * shape(a["inv_freq"])[0]
        form = functions.rotary(shape(a["x"])[3], rotated, a["interleaved"], self.kernel("RotaryEmbedding"))
        return [self.call(calls.like_first, form, a["x"], *self.parts(plan, 2))]

    def norm(self, node: Node, a: Mapping[str, Any]) -> list[Node]:
        weight, bias, center = a["weight"], a["bias"], a["center"]
        if weight is not None and bias is None and not center and self._follows_residual(node, a["x"]):
            made = self.call(calls.skip_norm, functions.skip_norm(a["eps"]), *a["x"].args, weight)
            result, total = self.parts(made, 2)
            total.meta = dict(a["x"].meta)
            a["x"].replace_all_uses_with(total, delete_user_cb=lambda user: user is not node)
            return [result]
        kernel = self.kernel("LayerNormalization" if center else "RMSNormalization")
        form = functions.norm(a["eps"], center, weight is not None, bias is not None, kernel)
        return [self.call(calls.like_first, form, a["x"], *(x for x in (weight, bias) if x is not None))]

    def _follows_residual(self, node: Node, x: Node) -> bool:
        """Whether ``x`` is a sum of two such tensors, nobody reads it before ``node``, and a kernel adds and norms."""
        if x.target is not torch.ops.aten.add.Tensor or x.kwargs or len(shape(x)) != 3:
            return False
        alike = all(isinstance(part, Node) and shape(part) == shape(x) for part in x.args)
        first = all(user is node or node < user for user in x.users)
        return alike and first and self.kernel("SkipSimplifiedLayerNormalization", MICROSOFT)

    def full_attention(self, node: Node, a: Mapping[str, Any]) -> list[Node]:
        s = scores(node, a)
        form = attend.full_attention(s, self.kernel("Attention"), a["key_positions"] is not None)
        rest = [a[name] for name in ("key_positions", "bias", "sink_logits") if a[name] is not None]
        return [self.call(calls.full_attention, form, a["query"], a["key"], a["value"], *rest)]

    def attention(self, node: Node, a: Mapping[str, Any]) -> list[Node | None]:
        s = scores(node, a)
        for name, index in (("past_key", 1), ("past_value", 2), ("past_positions", 3)):
            self._direct(node, a[name], index)
        self.buffers |= {a["past_key"].target, a["past_value"].target}
        self.in_place |= {a["past_key"].target, a["past_value"].target}
        self._drop(a["past_positions"])
        kernel = plain_reason(s) is None and not self.portable
        plan_of = attend.attention_plan(s, a["window"], a["chunk"], a["prefix"], kernel)
        plan = self.parts(self.plan(calls.attention_plan, plan_of, a["positions"], sizes=[a["past_key"]]), 7)
        form = attend.attention(s, kernel)
        out = self.call(calls.attention, form, *_qkv(a), *plan, *_extra(a))
        return [*self.parts(out, 3), a["past_positions"]]

    def sparse_attention(self, node: Node, a: Mapping[str, Any]) -> list[Node | None]:
        write = refreshed.refreshed_attention if "refresh" in a else sparse.sparse_attention
        s, c = scores(node, a), rule(a)
        past = self._paged_states(node, a)
        plan = self._sparse_plan(s, c, a["positions"], past)
        form = write(s, c, plain_reason(s) is None and not self.portable)
        qkv = [a[name] for name in ("query", "key", "value")]
        rest = [a["positions"], *plan, *_extra(a)]
        if c.by_event and (numbers := a["events"]) is not None and numbers.target in self.states:
            rest.append(numbers)
        elif c.by_event:
            raise _refuse(node, "the numbers of its events are no state, whose slots are by position")
        made = self.call(calls.sparse_attention, form, s.lse, *qkv, past, *rest)
        output, *after = self.parts(made, len(past) + (2 if s.lse else 1))
        lse = after.pop(0) if s.lse else None
        return [output, lse, *after[:2], a["past_positions"], *after[2:]]

    def _sparse_plan(self, s: attend.Scores, c: Rule, positions: Node, past: Sequence[Node]) -> list[Node]:
        of = sparse.sparse_plan(s.groups, c.page, c.dense_below, c.by_level)
        plan = self.plan(calls.sparse_plan, of, positions, c.by_level, sizes=[past[0], past[2]])
        return self.parts(plan, len(sparse.planned(c.by_level)))

    def events(self, node: Node, a: Mapping[str, Any]) -> list[Node | None]:
        names = list(OPS["events"].states)
        for index, name in enumerate(names, 1):
            if name != "past_events":
                self._direct(node, a[name], index)
        self.buffers.add(str(a["past_events"].target))  # not in place: attention reads those of the call before
        self._drop(a["past_positions"])
        past = [a[name] for name in names if name != "past_positions"]
        given = (a[name] for name in ("logits", "tokens", "positions", "key"))
        made = self.call(calls.events, events.events(segmentation(a)), *given, *past)
        return [*self.parts(made, 5), a["past_positions"]]

    def compact_attention(self, node: Node, a: Mapping[str, Any]) -> list[Node | None]:
        # Up to the budget everything is read, chosen or not.
        s, c = scores(node, a), rule({**a, "rerank": 1, "dense_below": max(a["budget"], a["dense_below"])})
        past = self._paged_states(node, a)
        plan = self._sparse_plan(s, c, a["positions"], past)
        turn = compact.Turn(2 * shape(a["inv_freq"])[0], a["interleaved"], a["scaling"])
        form = compact.compact_attention(s, c, turn)
        rest = [a["positions"], *plan, a["inv_freq"], *_extra(a)]
        made = self.call(calls.sparse_attention, form, s.lse, *(a[x] for x in ("query", "key", "value")), past, *rest)
        output, *lse, next_key, next_value, next_pages = self.parts(made, 5 if s.lse else 4)
        return [output, lse[0] if lse else None, next_key, next_value, a["past_positions"], next_pages]

    def quantised_attention(self, node: Node, a: Mapping[str, Any]) -> list[Node | None]:
        s, c = scores(node, a), rule({**a, "method": "bounds", "own_page": True})
        past = self._paged_states(node, a)
        plan_of, sizes = quantised.quantised_plan(s.groups, c.page), [past[1], past[2]]
        plan = self.parts(self.plan(calls.quantised_plan, plan_of, a["positions"], sizes=sizes), len(quantised.PLAN))
        form = quantised.quantised_attention(s, c, a["bits"])
        qkv = [a[name] for name in ("query", "key", "value")]
        made = self.call(calls.sparse_attention, form, s.lse, *qkv, past, a["positions"], *plan, *_extra(a))
        output, *after = self.parts(made, 8 if s.lse else 7)
        lse = after.pop(0) if s.lse else None
        return [output, lse, *after[:2], a["past_positions"], *after[2:]]

    def _paged_states(self, node: Node, a: Mapping[str, Any]) -> list[Node]:
        """Make the states of a node that holds pages fixed buffers, where they grow, and leave the positions out."""
        row = op_spec(node.target)
        assert row is not None
        for name, index in row.states.items():
            self._direct(node, a[name], index)
        self._drop(a["past_positions"])
        past = [a[name] for name in row.states if name != "past_positions"]
        growing = {str(state.target) for state in past if self.states[str(state.target)].grows is not None}
        self.buffers |= growing
        self.in_place |= growing
        return past

    def window_memory(self, node: Node, a: Mapping[str, Any]) -> list[Node | None]:
        s = scores(node, a)
        past, sizes = a["past_positions"], (a["window"], a["sinks"])
        key = (a["positions"], *sizes)
        if self._is_state(node, past, 7):
            past = self.rings.setdefault(key, past)
            if past is not a["past_positions"]:
                self._drop(a["past_positions"])
        for name, index in (("past_key", 5), ("past_value", 6)):
            if self._is_state(node, a[name], index):
                self.in_place.add(a[name].target)
        kernel = plain_reason(s) is None and not self.portable
        plan_of = window.window_plan(s, *sizes, kernel)
        plan = self.parts(self.plan(calls.window_plan, plan_of, a["positions"], past, s.groups), 8)
        next_past = plan.pop(3)
        form = window.window_memory(s, kernel)
        made = self.call(calls.window_memory, form, s.lse, *_qkv(a), *plan, *_extra(a))
        output, *lse, keys, values, next_key, next_value = self.parts(made, 6 if s.lse else 5)
        return [
            output,
            lse[0] if lse else None,
            *self._left(node, a, past, keys, values),
            next_key,
            next_value,
            a["past_positions"] if a["past_positions"].target in self.dropped else next_past,
        ]

    def _left(self, node: Node, a: Mapping[str, Any], past: Node, keys: Node, values: Node) -> list[Node | None]:
        if not {2, 3, 4} & used_outputs(node):
            return [None, None, None]
        groups = shape(a["key"])[1]
        plan_of = window.window_left_plan(groups, a["window"], a["sinks"])
        position, index, found = self.parts(self.plan(calls.window_left_plan, plan_of, a["positions"], past, groups), 3)
        made = self.call(calls.window_left, window.window_left(), keys, values, index, found)
        return [*self.parts(made, 2), position]

    def linear_memory(self, node: Node, a: Mapping[str, Any]) -> list[Node]:
        plan = self.parts(self.plan(calls.linear_plan, functions.linear_plan(), a["positions"]), 3)
        form = functions.linear_memory(memory(a), self.kernel("LinearAttention", MICROSOFT))
        inputs = [a[name] for name in ("query", "key", "value", "log_decay", "state")]
        beta = [a["beta"]] if a["beta"] is not None else []
        return self.parts(self.call(calls.linear_memory, form, *inputs, *plan, *beta), 2)

    def bank_ffn(self, node: Node, a: Mapping[str, Any]) -> list[Node]:
        form, block = bank.bank_ffn(a["activation"], self.kernel("FusedMatMul", MICROSOFT)), a["block"]
        if block not in self.matrices:
            self.matrices[block] = bank.matrices(self.graph, block)
        return [self.call(calls.like_first, form, a["x"], *self.matrices[block].values())]

    def _is_state(self, node: Node, past: Node, index: int) -> bool:
        """Whether ``past`` is a state that only this node reads, and output ``index`` its next value and no more."""
        if past.target not in self.states or set(past.users) != {node}:
            return False
        nexts = [user for user in node.users if user.args[1] == index]
        return len(nexts) == 1 and self.outputs[str(past.target)] is nexts[0] and len(nexts[0].users) == 1

    def _direct(self, node: Node, past: Node, index: int) -> None:
        if not self._is_state(node, past, index):
            raise _refuse(node, f"its state {past} is read or changed by other ops, a fixed buffer cannot be")

    def _drop(self, past: Node) -> None:
        self.dropped.add(str(past.target))


def _qkv(a: Mapping[str, Any]) -> list[Node]:
    return [a[name] for name in ("query", "key", "value", "past_key", "past_value")]


def _extra(a: Mapping[str, Any]) -> list[Node]:
    return [a[name] for name in ("slopes", "sink_logits") if a.get(name) is not None]


def _refuse(node: Node, reason: str) -> MemcError:
    return MemcError("E601", f"onnx cannot lower {node.target}: {reason}", where=source_of(node))


def prepare(program: Program, *, portable: bool = False) -> Prepared:
    """Rewrite a copy of ``program`` for export, in float32.

    ``portable`` takes the forms that need no kernel beyond the plain ones. Raises ``MemcError`` E601.
    """
    copy = program.copy()
    module, graph = copy.module, copy.module.graph
    late = _to_float32(module)
    join_tied(module)
    returned = results(graph)
    count = len(copy.outputs)
    placeholders = copy.placeholders()[len(copy.inputs) :]
    states = {str(node.target): spec for node, spec in zip(placeholders, copy.states, strict=True)}
    rewriter = _Rewriter(graph, states, dict(zip(states, returned[count:], strict=True)), portable)
    for node in list(graph.nodes):
        if is_memc(node.target):
            rewriter.rewrite(node)
    keep = insert_keep(copy, placeholders[0] if placeholders else None)
    mark_linears(graph)
    refuse_negative_ids(graph)
    simplify(graph)
    returned = results(graph)
    kept = [result for result, name in zip(returned[count:], states, strict=True) if name not in rewriter.dropped]
    set_results(graph, [*returned[:count], *kept])
    parts = [block for block in rewriter.matrices if not block.users]
    for node in (*parts, *(node for node in placeholders if node.target in rewriter.dropped)):
        graph.erase_node(node)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    remaining = tuple(_float(spec) for name, spec in states.items() if name not in rewriter.dropped)
    buffers, in_place = (frozenset(states[n].name for n in names) for names in (rewriter.buffers, rewriter.in_place))
    taken = frozenset(str(node.target) for node in parts)
    return Prepared(module, remaining, buffers, in_place, rewriter.functions, late, taken, keep)


def _float(spec: StateSpec) -> StateSpec:
    return replace(spec, dtype=torch.float32) if spec.dtype in HALF else spec


def _to_float32(module: GraphModule) -> dict[str, torch.Tensor]:
    """Make every half-precision tensor and cast float32; return the large tensors, whose values come at writing time.

    A large one is replaced by memory that is never touched, so that no second copy of the model is held.
    """
    late: dict[str, torch.Tensor] = {}
    made: dict[int, torch.Tensor] = {}
    for name, tensor in list(named_tensors(module)):
        if tensor.dtype not in HALF:
            continue
        large = tensor.numel() >= LARGE
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty(tensor.shape) if large else tensor.detach().float()
        if large:
            late[name] = tensor.detach()
        set_tensor(module, name, made[id(tensor)], trainable=False)
    for node in module.graph.nodes:
        node.args = in_float32(node.args)
        node.kwargs = in_float32(node.kwargs)
    return late
