"""Converters of the backend's own ops: each makes a TIR function and a call of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch.fx import Node
from tvm import relax, te, tirx

from memc.backends.tvm.aten import ATEN
from memc.backends.tvm.emit import (
    Converter,
    Importer,
    Maker,
    Var,
    arguments,
    call,
    calls,
    flat,
    is_one,
    nothing,
    or_nothing,
    product,
    reshape,
    scores_of,
    shape,
    size,
)
from memc.backends.tvm.kernels.attention import Range, attention, full_attention
from memc.backends.tvm.kernels.bank import bank_ffn
from memc.backends.tvm.kernels.codes import Codes
from memc.backends.tvm.kernels.common import SLOTS, Scores, exp
from memc.backends.tvm.kernels.compact import Angles, compact_attention
from memc.backends.tvm.kernels.dots import maker
from memc.backends.tvm.kernels.events import events
from memc.backends.tvm.kernels.linear import head_linear
from memc.backends.tvm.kernels.memory import linear_memory
from memc.backends.tvm.kernels.memory_chunk import Memory
from memc.backends.tvm.kernels.quantised import memory_of, quantised_attention
from memc.backends.tvm.kernels.rank import Rule
from memc.backends.tvm.kernels.simple import embedding, norm, rotary, softmax
from memc.backends.tvm.kernels.sparse import SHARES, TOKENS, memory, sparse_attention
from memc.backends.tvm.kernels.window import window_memory
from memc.backends.tvm.kernels.window_chunk import Ring
from memc.backends.tvm.tiles import Product, Tiles
from memc.kernels.events.rule import Segmentation


class Converters(Maker):
    """Makes the functions of one program for a CPU."""

    def __init__(self, tiles: Tiles) -> None:
        """Start with no functions; products are made in ``tiles``."""
        super().__init__()
        self._tiles, self._tile = tiles, tiles.default

    def table(self) -> dict[str, Converter]:
        """Return the converters by the names under which the importer looks them up."""
        forms = {
            "linear": self._linear,
            "head_linear": self._head_linear,
            "embedding": self._embedding,
            "norm": self._norm,
            "rotary": self._rotary,
            "attention": self._attention,
            "full_attention": self._full_attention,
            "window_memory": self._window_memory,
            "linear_memory": self._linear_memory,
            "sparse_attention": self._sparse_attention,
            "quantised_attention": self._quantised_attention,
            "compact_attention": self._compact_attention,
            "events": self._events,
            "bank_ffn": self._bank_ffn,
        }
        own = {f"tvm_{name}.default": form for name, form in forms.items()}
        elements = {"softmax.int": self._softmax, "_softmax.default": self._softmax, "silu.default": _silu}
        return {**own, **ATEN, **elements, "sigmoid.default": _sigmoid}

    def _linear(self, node: Node, importer: Importer) -> Var:
        x, weight, bias, out = arguments(node)
        x, stored = importer.env[x], [importer.env[part] for part in weight]
        rows, into = flat(importer, x), size(x, -1)
        bits = {1: 32, 2: 8, 3: 4}[len(stored)]
        tile = self._tiles.tile(Product(bits, out, into))
        make, options = maker(bits, tile)
        made = self.function(importer, make, out, into, tile, bias=bias is not None, **options)
        stored += [nothing(importer, "uint8", 1)] if bits == 8 else []
        y = call(importer, made, [rows, *stored, or_nothing(importer, bias)], [size(rows, 0), out])
        return reshape(importer, y, [*shape(x)[:-1], out])

    def _head_linear(self, node: Node, importer: Importer) -> Var:
        x, weight, out = arguments(node)
        x, stored = importer.env[x], importer.env[weight]
        made = self.function(importer, head_linear, size(x, 1), out, size(x, 3), self._tile)
        return call(importer, made, [x, stored], [*shape(x)[:3], out])

    def _embedding(self, node: Node, importer: Importer) -> Var:
        table, ids, rows, width = arguments(node)
        stored, ids = importer.env[table], importer.env[ids]
        flat = reshape(importer, ids, [product(shape(ids))])
        columns = size(stored, 2) if len(shape(stored)) == 3 else None  # that of a product in tiles
        made = self.function(importer, embedding, rows, width, columns)
        y = call(importer, made, [stored, flat], [size(flat, 0), width])
        return reshape(importer, y, [*shape(ids), width])

    def _norm(self, node: Node, importer: Importer) -> Var:
        x, weight, bias, eps, center = arguments(node)
        x = importer.env[x]
        rows = flat(importer, x)
        alone = weight is None and bias is None
        options = {"center": center, "weight": weight is not None or alone, "bias": bias is not None}
        made = self.function(importer, norm, size(x, -1), eps, **options)
        parts = [or_nothing(importer, part) for part in (weight, bias)]
        if alone:
            # TVM takes a function that reads a single tensor for a view of it, and stops at the form of ours.
            parts[0] = importer.block_builder.emit(relax.const(np.ones(size(x, -1), "float32"), "float32"))
        return reshape(importer, call(importer, made, [rows, *parts], shape(rows)), shape(x))

    def _softmax(self, node: Node, importer: Importer) -> Var:
        x, axis = arguments(node)[:2]
        x = importer.env[x]
        width = size(x, axis)
        if axis % x.ty.ndim != x.ty.ndim - 1 or not isinstance(width, int) or x.ty.dtype != "float32":
            return importer.block_builder.emit(relax.op.nn.softmax(x, axis))
        rows = flat(importer, x)
        made = self.function(importer, softmax, width)
        # What the values sum up to, since TVM takes a function that reads a single tensor for a view of it.
        total = importer.block_builder.emit(relax.const(np.ones(1, "float32"), "float32"))
        return reshape(importer, call(importer, made, [rows, total], shape(rows)), shape(x))

    def _rotary(self, node: Node, importer: Importer) -> Var:
        x, cosine, sine = (importer.env[argument] for argument in node.args[:3])
        heads, width, pairs = size(x, 1), size(x, 3), size(cosine, 2)
        made = self.function(importer, rotary, heads, width, pairs, interleaved=node.args[3])
        return call(importer, made, [x, cosine, sine], shape(x))

    def _attention(self, node: Node, importer: Importer) -> Var:
        *tensors, slopes, sinks, scale, softcap, window, chunk, prefix = arguments(node)
        q, *rest = (importer.env[tensor] for tensor in tensors)
        s = scores_of(q, rest[1], scale, softcap, slopes, sinks)
        made = self.function(importer, attention, s, Range(window, chunk, prefix))
        extra = [or_nothing(importer, part) for part in (slopes, sinks)]
        return call(importer, made, [q, *rest, *extra], [*shape(q)[:3], s.value_dim])

    def _full_attention(self, node: Node, importer: Importer) -> Var:
        query, key, value, positions, bias, sinks, scale, softcap = arguments(node)
        q, k, v = (importer.env[tensor] for tensor in (query, key, value))
        s = scores_of(q, v, scale, softcap, None, sinks)
        added = nothing(importer, "float32", 4)
        if bias is not None:
            added = importer.env[bias]
            added = reshape(importer, added, [*[1] * (4 - len(shape(added))), *shape(added)])
        sized = None if bias is None else tuple(not is_one(size) for size in shape(added))
        made = self.function(importer, full_attention, s, masked=positions is not None, bias=sized)
        places = importer.env[positions] if positions is not None else nothing(importer, "int64", 2)
        held = size(k, 2)
        tiles = -(-held // SLOTS) if isinstance(held, int) else tirx.ceildiv(held, SLOTS)
        shapes = [[*shape(q)[:3], s.value_dim], [*shape(k)[:2], tiles, s.key_dim, SLOTS]]
        return calls(importer, made, [q, k, v, places, added, or_nothing(importer, sinks)], shapes)[0]

    def _window_memory(self, node: Node, importer: Importer) -> Var:
        *tensors, slopes, sink_logits, scale, softcap, window, sinks, lse, left = arguments(node)
        q, k, v, *rest = (importer.env[tensor] for tensor in tensors)
        s = scores_of(q, v, scale, softcap, slopes, sink_logits)
        made = self.function(importer, window_memory, s, Ring(window, sinks, lse, left), self._tile)
        extra = [or_nothing(importer, part) for part in (slopes, sink_logits)]
        shapes = [
            [*shape(q)[:3], s.value_dim],
            shape(q)[:3] if lse else [1],
            shape(k) if left else [1],
            shape(v) if left else [1],
        ]
        return calls(importer, made, [q, k, v, *rest, *extra], shapes)

    def _linear_memory(self, node: Node, importer: Importer) -> Var:
        *tensors, beta = arguments(node)
        q, k, v, decay, places, state = (importer.env[tensor] for tensor in tensors)
        sizes = size(q, 1), size(k, 1), size(k, 3), size(v, 3)
        m = Memory(*sizes, per_channel=size(decay, 3) > 1, delta=beta is not None)
        made = self.function(importer, linear_memory, m, self._tile)
        inputs = [q, k, v, decay, places, state, or_nothing(importer, beta)]
        return call(importer, made, inputs, [*shape(q)[:3], m.value_dim])

    def _sparse_attention(self, node: Node, importer: Importer) -> Var:
        given = arguments(node)
        (*tensors, choice, sink_logits, scale, softcap), chosen = given[:11], given[11:]
        names = ("method", "page", "budget", "sinks", "window", "rerank", "dense_below", "channels", "mass", "beam")
        more = ("refresh", "contiguity", "delay", "lse")
        rule = Rule(scale=float(scale), **dict(zip((*names, *more), chosen, strict=True)))
        q, k, v, *rest = (importer.env[tensor] for tensor in tensors)
        s = scores_of(q, v, scale, softcap, None, sink_logits)
        made = self.function(importer, sparse_attention, s, rule)
        batch, _, tokens = shape(q)[:3]
        pages = tirx.ceildiv(size(rest[-1], 2), SLOTS) if rule.by_tree else size(rest[-1], 2)
        needed = memory(s, rule, _units(s, batch, tokens), pages * SLOTS)
        listed = nothing(importer, "int32", 1) if choice is None else importer.env[choice]
        inputs = [q, k, v, *rest, listed, or_nothing(importer, sink_logits)]
        return _attend(importer, made, inputs, s, rule, needed)

    def _quantised_attention(self, node: Node, importer: Importer) -> Var:
        given = arguments(node)
        (*tensors, sink_logits, scale, softcap, bits), chosen = given[:14], given[14:]
        names = ("page", "budget", "sinks", "window", "rerank", "dense_below", "lse")
        options = dict(zip(names, chosen, strict=True))
        rule = Rule(scale=float(scale), method="bounds", own_page=True, **options)
        q, k, v, *rest = (importer.env[tensor] for tensor in tensors)
        s = scores_of(q, v, scale, softcap, None, sink_logits)
        made = self.function(importer, quantised_attention, s, rule, Codes(bits, rule.page))
        batch, _, tokens = shape(q)[:3]
        needed = memory_of(s, rule, batch, tokens, _units(s, batch, tokens), size(rest[3], 2) * SLOTS)
        return _attend(importer, made, [q, k, v, *rest, or_nothing(importer, sink_logits)], s, rule, needed)

    def _compact_attention(self, node: Node, importer: Importer) -> Var:
        given = arguments(node)
        (*tensors, sink_logits, scale, softcap, interleaved), chosen = given[:12], given[12:]
        names = ("method", "page", "budget", "sinks", "window", "dense_below", "lse")
        rule = Rule(scale=float(scale), **dict(zip(names, chosen, strict=True)))
        q, k, v, *rest = (importer.env[tensor] for tensor in tensors)
        s = scores_of(q, v, scale, softcap, None, sink_logits)
        made = self.function(importer, compact_attention, s, rule, Angles(size(rest[-1], 2), interleaved))
        batch, _, tokens = shape(q)[:3]
        needed = memory(s, rule, _units(s, batch, tokens), size(rest[3], 2) * SLOTS)
        needed = {name: needed[name] for name in ("rank", "list", "slots", "scores")}
        return _attend(importer, made, [q, k, v, *rest, or_nothing(importer, sink_logits)], s, rule, needed)

    def _events(self, node: Node, importer: Importer) -> Var:
        *tensors, gamma, longest, refine = arguments(node)
        logits, *rest = (importer.env[tensor] for tensor in tensors)
        past = rest[3:]
        sizes = size(logits, 2), size(past[2], 1), size(past[2], 3), size(past[1], 1)
        made = self.function(importer, events, Segmentation(*sizes, longest, float(gamma), refine))
        batch, tokens = shape(logits)[:2]
        shapes = [[batch, tokens], *map(shape, past), [batch, longest + 1, longest + 1], shape(past[2])]
        return calls(importer, made, [logits, *rest], shapes, ["float32"] * 4 + ["int64", "float32", "float32"])

    def _bank_ffn(self, node: Node, importer: Importer) -> Var:
        x, block = (importer.env[argument] for argument in node.args[:2])
        made = self.function(importer, bank_ffn, size(block, 2), size(x, 2), node.args[2])
        return call(importer, made, [x, block], shape(x))


def _units(s: Scores, batch: Any, tokens: Any) -> Any:
    """Return how many units of work the tokens of a call are dealt to."""
    return batch * s.groups * tirx.min(tirx.ceildiv(tokens, TOKENS), tirx.IntImm("int64", SHARES))


def _attend(
    importer: Importer, function: Any, inputs: Sequence[Var], s: Scores, rule: Rule, needed: Mapping[str, Any]
) -> Var:
    """Call a function that chooses what it reads: its output, log-sum-exp, and the memory that it needs."""
    rows = shape(inputs[0])[:3]
    shapes = [[*rows, s.value_dim], rows if rule.lse else [1], *(sizes for sizes, _ in needed.values())]
    kinds = ["float32", "float32", *(kind for _, kind in needed.values())]
    return calls(importer, function, inputs, shapes, kinds)


def _sigmoid(node: Node, importer: Importer) -> Var:
    return _by_element(importer, node, lambda x: _one(x) / (_one(x) + exp(-x)))


def _silu(node: Node, importer: Importer) -> Var:
    return _by_element(importer, node, lambda x: x / (_one(x) + exp(-x)))


def _one(x: Any) -> Any:
    return tirx.const(1, x.ty.dtype)


def _by_element(importer: Importer, node: Node, form: Callable[[Any], Any]) -> Var:
    """Convert an op that takes numbers one by one, with the exponential that is computed by vectors."""
    x = importer.env[node.args[0]]
    name = str(node.target).split(".")[1]
    return importer.block_builder.emit_te(
        lambda given: te.compute(given.shape, lambda *place: form(given(*place)), name=name), x, primfunc_name_hint=name
    )
