"""Converters of the backend's own ops: each makes a TIR function and a call of it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
from torch.fx import Node
from tvm import relax, te, tirx
from tvm.ir import is_prim_expr

from memc.backends.tvm.isa import Tile
from memc.backends.tvm.kernels.attention import Range, attention, full_attention
from memc.backends.tvm.kernels.bank import bank_ffn
from memc.backends.tvm.kernels.codes import Codes
from memc.backends.tvm.kernels.common import SLOTS, PrimFunc, Scores, exp
from memc.backends.tvm.kernels.compact import Angles, compact_attention
from memc.backends.tvm.kernels.dots import dot_linear
from memc.backends.tvm.kernels.linear import head_linear, linear, quantised_linear
from memc.backends.tvm.kernels.memory import linear_memory
from memc.backends.tvm.kernels.memory_chunk import Memory
from memc.backends.tvm.kernels.quantised import memory_of, quantised_attention
from memc.backends.tvm.kernels.rank import Rule
from memc.backends.tvm.kernels.simple import embedding, norm, rotary, softmax
from memc.backends.tvm.kernels.sparse import SHARES, TOKENS, memory, sparse_attention
from memc.backends.tvm.kernels.window import window_memory
from memc.backends.tvm.kernels.window_chunk import Ring

Var = Any
Importer = Any
Converter = Callable[[Node, Importer], Var]


class Converters:
    """Makes the functions of one program; calls that agree on sizes and options share one."""

    def __init__(self, tile: Tile) -> None:
        """Start with no functions; products are made in tiles like ``tile``."""
        self._tile = tile
        self._made: dict[Hashable, Any] = {}

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
            "bank_ffn": self._bank_ffn,
        }
        own = {f"tvm_{name}.default": form for name, form in forms.items()}
        # The importer bounds whole numbers by infinity, which they do not have, knows a view by one name alone, lets an
        # index out of range, and one that counts from the end, read other memory, and loses the size of a table's
        # first rows where their number is not fixed.
        clamps = dict.fromkeys(("clamp.default", "clamp_min.default", "clamp_max.default"), _clamp)
        others = {
            "softmax.int": self._softmax,
            "_softmax.default": self._softmax,
            "silu.default": _silu,
            "sigmoid.default": _sigmoid,
            "_unsafe_view.default": _view,
            "index_select.default": _index_select,
            "select.int": _select,
            "slice.Tensor": _slice,
            "pow.Tensor_Scalar": _power,
        }
        return {**own, **clamps, **others}

    def _function(self, importer: Importer, make: Callable[..., PrimFunc], *args: Any, **options: Any) -> Any:
        key = (make.__name__, args, tuple(sorted(options.items())))
        if key not in self._made:
            self._made[key] = importer.block_builder.add_func(make(*args, **options), make.__name__)
        return self._made[key]

    def _linear(self, node: Node, importer: Importer) -> Var:
        x, weight, bias, out = _arguments(node)
        x, stored = importer.env[x], [importer.env[part] for part in weight]
        rows, into = _flat(importer, x), _size(x, -1)
        if len(stored) == 1:
            made = self._function(importer, linear, out, into, self._tile, bias=bias is not None)
        else:
            bits = 4 if len(stored) == 3 else 8
            options = {"bits": bits, "bias": bias is not None}
            quantised = dot_linear if self._tile.dots else quantised_linear
            made = self._function(importer, quantised, out, into, self._tile, **options)
            stored += [_nothing(importer, "uint8", 1)] if bits == 8 else []
        y = _call(importer, made, [rows, *stored, _or_nothing(importer, bias)], [_size(rows, 0), out])
        return _reshape(importer, y, [*_shape(x)[:-1], out])

    def _head_linear(self, node: Node, importer: Importer) -> Var:
        x, weight, out = _arguments(node)
        x, stored = importer.env[x], importer.env[weight]
        made = self._function(importer, head_linear, _size(x, 1), out, _size(x, 3), self._tile)
        return _call(importer, made, [x, stored], [*_shape(x)[:3], out])

    def _embedding(self, node: Node, importer: Importer) -> Var:
        table, ids, rows, width = _arguments(node)
        stored, ids = importer.env[table], importer.env[ids]
        flat = _reshape(importer, ids, [_product(_shape(ids))])
        columns = self._tile.columns if len(_shape(stored)) == 3 else None
        made = self._function(importer, embedding, rows, width, columns)
        y = _call(importer, made, [stored, flat], [_size(flat, 0), width])
        return _reshape(importer, y, [*_shape(ids), width])

    def _norm(self, node: Node, importer: Importer) -> Var:
        x, weight, bias, eps, center = _arguments(node)
        x = importer.env[x]
        rows = _flat(importer, x)
        alone = weight is None and bias is None
        options = {"center": center, "weight": weight is not None or alone, "bias": bias is not None}
        made = self._function(importer, norm, _size(x, -1), eps, **options)
        parts = [_or_nothing(importer, part) for part in (weight, bias)]
        if alone:
            # TVM takes a function that reads a single tensor for a view of it, and stops at the form of ours.
            parts[0] = importer.block_builder.emit(relax.const(np.ones(_size(x, -1), "float32"), "float32"))
        return _reshape(importer, _call(importer, made, [rows, *parts], _shape(rows)), _shape(x))

    def _softmax(self, node: Node, importer: Importer) -> Var:
        x, axis = _arguments(node)[:2]
        x = importer.env[x]
        width = _size(x, axis)
        if axis % x.ty.ndim != x.ty.ndim - 1 or not isinstance(width, int) or x.ty.dtype != "float32":
            return importer.block_builder.emit(relax.op.nn.softmax(x, axis))
        rows = _flat(importer, x)
        made = self._function(importer, softmax, width)
        # What the values sum up to, since TVM takes a function that reads a single tensor for a view of it.
        total = importer.block_builder.emit(relax.const(np.ones(1, "float32"), "float32"))
        return _reshape(importer, _call(importer, made, [rows, total], _shape(rows)), _shape(x))

    def _rotary(self, node: Node, importer: Importer) -> Var:
        x, cosine, sine = (importer.env[argument] for argument in node.args[:3])
        heads, width, pairs = _size(x, 1), _size(x, 3), _size(cosine, 2)
        made = self._function(importer, rotary, heads, width, pairs, interleaved=node.args[3])
        return _call(importer, made, [x, cosine, sine], _shape(x))

    def _attention(self, node: Node, importer: Importer) -> Var:
        *tensors, slopes, sinks, scale, softcap, window, chunk, prefix = _arguments(node)
        q, *rest = (importer.env[tensor] for tensor in tensors)
        s = _scores(q, rest[1], scale, softcap, slopes, sinks)
        made = self._function(importer, attention, s, Range(window, chunk, prefix))
        extra = [_or_nothing(importer, part) for part in (slopes, sinks)]
        return _call(importer, made, [q, *rest, *extra], [*_shape(q)[:3], s.value_dim])

    def _full_attention(self, node: Node, importer: Importer) -> Var:
        query, key, value, positions, bias, sinks, scale, softcap = _arguments(node)
        q, k, v = (importer.env[tensor] for tensor in (query, key, value))
        s = _scores(q, v, scale, softcap, None, sinks)
        added = _nothing(importer, "float32", 4)
        if bias is not None:
            added = importer.env[bias]
            added = _reshape(importer, added, [*[1] * (4 - len(_shape(added))), *_shape(added)])
        sized = None if bias is None else tuple(not _is_one(size) for size in _shape(added))
        made = self._function(importer, full_attention, s, masked=positions is not None, bias=sized)
        places = importer.env[positions] if positions is not None else _nothing(importer, "int64", 2)
        held = _size(k, 2)
        tiles = -(-held // SLOTS) if isinstance(held, int) else tirx.ceildiv(held, SLOTS)
        shapes = [[*_shape(q)[:3], s.value_dim], [*_shape(k)[:2], tiles, s.key_dim, SLOTS]]
        return _calls(importer, made, [q, k, v, places, added, _or_nothing(importer, sinks)], shapes)[0]

    def _window_memory(self, node: Node, importer: Importer) -> Var:
        *tensors, slopes, sink_logits, scale, softcap, window, sinks, lse, left = _arguments(node)
        q, k, v, *rest = (importer.env[tensor] for tensor in tensors)
        s = _scores(q, v, scale, softcap, slopes, sink_logits)
        made = self._function(importer, window_memory, s, Ring(window, sinks, lse, left), self._tile)
        extra = [_or_nothing(importer, part) for part in (slopes, sink_logits)]
        shapes = [
            [*_shape(q)[:3], s.value_dim],
            _shape(q)[:3] if lse else [1],
            _shape(k) if left else [1],
            _shape(v) if left else [1],
        ]
        return _calls(importer, made, [q, k, v, *rest, *extra], shapes)

    def _linear_memory(self, node: Node, importer: Importer) -> Var:
        *tensors, beta = _arguments(node)
        q, k, v, decay, places, state = (importer.env[tensor] for tensor in tensors)
        sizes = _size(q, 1), _size(k, 1), _size(k, 3), _size(v, 3)
        m = Memory(*sizes, per_channel=_size(decay, 3) > 1, delta=beta is not None)
        made = self._function(importer, linear_memory, m, self._tile)
        inputs = [q, k, v, decay, places, state, _or_nothing(importer, beta)]
        return _call(importer, made, inputs, [*_shape(q)[:3], m.value_dim])

    def _sparse_attention(self, node: Node, importer: Importer) -> Var:
        given = _arguments(node)
        (*tensors, choice, sink_logits, scale, softcap), chosen = given[:11], given[11:]
        names = ("method", "page", "budget", "sinks", "window", "rerank", "dense_below", "channels", "mass", "refresh")
        rule = Rule(scale=float(scale), **dict(zip((*names, "lse"), chosen, strict=True)))
        q, k, v, *rest = (importer.env[tensor] for tensor in tensors)
        s = _scores(q, v, scale, softcap, None, sink_logits)
        made = self._function(importer, sparse_attention, s, rule)
        batch, _, tokens = _shape(q)[:3]
        pages = tirx.ceildiv(_size(rest[-1], 2), SLOTS) if rule.rows else _size(rest[-1], 2)
        needed = memory(s, rule, _units(s, batch, tokens), pages * SLOTS)
        listed = _nothing(importer, "int32", 1) if choice is None else importer.env[choice]
        inputs = [q, k, v, *rest, listed, _or_nothing(importer, sink_logits)]
        return _attend(importer, made, inputs, s, rule, needed)

    def _quantised_attention(self, node: Node, importer: Importer) -> Var:
        given = _arguments(node)
        (*tensors, sink_logits, scale, softcap, bits), chosen = given[:14], given[14:]
        names = ("page", "budget", "sinks", "window", "rerank", "dense_below", "lse")
        options = dict(zip(names, chosen, strict=True))
        rule = Rule(scale=float(scale), method="bounds", own_page=True, **options)
        q, k, v, *rest = (importer.env[tensor] for tensor in tensors)
        s = _scores(q, v, scale, softcap, None, sink_logits)
        made = self._function(importer, quantised_attention, s, rule, Codes(bits, rule.page))
        batch, _, tokens = _shape(q)[:3]
        needed = memory_of(s, rule, batch, tokens, _units(s, batch, tokens), _size(rest[3], 2) * SLOTS)
        return _attend(importer, made, [q, k, v, *rest, _or_nothing(importer, sink_logits)], s, rule, needed)

    def _compact_attention(self, node: Node, importer: Importer) -> Var:
        given = _arguments(node)
        (*tensors, sink_logits, scale, softcap, interleaved), chosen = given[:12], given[12:]
        names = ("method", "page", "budget", "sinks", "window", "dense_below", "lse")
        rule = Rule(scale=float(scale), **dict(zip(names, chosen, strict=True)))
        q, k, v, *rest = (importer.env[tensor] for tensor in tensors)
        s = _scores(q, v, scale, softcap, None, sink_logits)
        made = self._function(importer, compact_attention, s, rule, Angles(_size(rest[-1], 2), interleaved))
        batch, _, tokens = _shape(q)[:3]
        needed = memory(s, rule, _units(s, batch, tokens), _size(rest[3], 2) * SLOTS)
        needed = {name: needed[name] for name in ("rank", "list", "slots", "scores")}
        return _attend(importer, made, [q, k, v, *rest, _or_nothing(importer, sink_logits)], s, rule, needed)

    def _bank_ffn(self, node: Node, importer: Importer) -> Var:
        x, block = (importer.env[argument] for argument in node.args[:2])
        made = self._function(importer, bank_ffn, _size(block, 2), _size(x, 2), node.args[2])
        return _call(importer, made, [x, block], _shape(x))


def _units(s: Scores, batch: Any, tokens: Any) -> Any:
    """Return how many units of work the tokens of a call are dealt to."""
    return batch * s.groups * tirx.min(tirx.ceildiv(tokens, TOKENS), tirx.IntImm("int64", SHARES))


def _attend(
    importer: Importer, function: Any, inputs: Sequence[Var], s: Scores, rule: Rule, needed: Mapping[str, Any]
) -> Var:
    """Call a function that chooses what it reads: its output, log-sum-exp, and the memory that it needs."""
    rows = _shape(inputs[0])[:3]
    shapes = [[*rows, s.value_dim], rows if rule.lse else [1], *(shape for shape, _ in needed.values())]
    kinds = ["float32", "float32", *(kind for _, kind in needed.values())]
    return _calls(importer, function, inputs, shapes, kinds)


def _clamp(node: Node, importer: Importer) -> Var:
    """Convert ``aten.clamp`` with the bounds that are there."""
    x, *values = importer.retrieve_args(node)
    name = str(node.target).split(".")[1]
    given = dict(zip({"clamp_min": ["min"], "clamp_max": ["max"]}.get(name, ["min", "max"]), values, strict=False))
    bounds = {**given, **node.kwargs}
    for bound, form in (("min", relax.op.maximum), ("max", relax.op.minimum)):
        if bounds.get(bound) is not None:
            x = importer.block_builder.emit(form(x, relax.const(bounds[bound], x.ty.dtype)))
    return x


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


def _index_select(node: Node, importer: Importer) -> Var:
    x, axis, index = importer.retrieve_args(node)
    return importer.block_builder.emit(relax.op.take(x, index, axis, mode="clip"))


def _select(node: Node, importer: Importer) -> Var:
    x, axis, index = importer.retrieve_args(node)
    axis %= x.ty.ndim
    start = index if index >= 0 else _size(x, axis) + index
    one = importer.block_builder.emit(relax.op.strided_slice(x, [axis], [start], [start + 1]))
    return importer.block_builder.emit(relax.op.squeeze(one, [axis]))


def _slice(node: Node, importer: Importer) -> Var:
    given = list(importer.retrieve_args(node))
    x, axis, start, end, step = given + [0, None, None, 1][len(given) - 1 :]
    if is_prim_expr(end) and isinstance(_size(x, axis), int) and (start or 0, step) == (0, 1):
        first = importer.block_builder.emit(relax.op.arange(0, end, 1, "int64"))
        return importer.block_builder.emit(relax.op.take(x, first, axis % x.ty.ndim, mode="clip"))
    return importer._slice(node)


def _power(node: Node, importer: Importer) -> Var:
    """Convert ``aten.pow`` by a small whole number into products, which are exact for what is negative too."""
    x, exponent = importer.retrieve_args(node)
    if exponent not in range(1, 9):
        return importer.block_builder.emit(relax.op.power(x, relax.const(exponent, x.ty.dtype)))
    power = x
    for _ in range(int(exponent) - 1):
        power = importer.block_builder.emit(relax.op.multiply(power, x))
    return power


def _view(node: Node, importer: Importer) -> Var:
    x, shape = importer.retrieve_args(node)
    return _reshape(importer, x, shape)


def _arguments(node: Node) -> list[Any]:
    return list(node.args)


def _scores(q: Var, v: Var, scale: float, softcap: float, slopes: Node | None, sinks: Node | None) -> Scores:
    sizes = _size(q, 1), _size(v, 1), _size(q, 3), _size(v, 3)
    return Scores(*sizes, float(scale), float(softcap), slopes is not None, sinks is not None)


def _call(importer: Importer, function: Any, inputs: Sequence[Var], shape: Sequence[Any]) -> Var:
    out = relax.TensorType(list(shape), "float32")
    return importer.block_builder.emit(relax.call_tir(function, list(inputs), out_ty=out))


def _calls(
    importer: Importer,
    function: Any,
    inputs: Sequence[Var],
    shapes: Sequence[Sequence[Any]],
    dtypes: Sequence[str] | None = None,
) -> Var:
    kinds = dtypes or ["float32"] * len(shapes)
    out = [relax.TensorType(list(shape), kind) for shape, kind in zip(shapes, kinds, strict=True)]
    return importer.block_builder.emit(relax.call_tir(function, list(inputs), out_ty=out))


def _or_nothing(importer: Importer, node: Any) -> Var:
    return _nothing(importer, "float32", 1) if node is None else importer.env[node]


def _nothing(importer: Importer, dtype: str, rank: int) -> Var:
    """Return what is passed for a tensor that a function does not read."""
    return importer.block_builder.emit(relax.const(np.zeros((1,) * rank, dtype), dtype))


def _flat(importer: Importer, x: Var) -> Var:
    """View all axes of ``x`` but the last as one."""
    *rows, width = _shape(x)
    return _reshape(importer, x, [_product(rows), width])


def _reshape(importer: Importer, x: Var, shape: Sequence[Any]) -> Var:
    return importer.block_builder.emit(relax.op.reshape(x, list(shape)))


def _product(sizes: Sequence[Any]) -> Any:
    return reduce(operator.mul, sizes, tirx.IntImm("int64", 1))


def _shape(x: Var) -> list[Any]:
    if x.ty.shape is None:
        raise ValueError("the sizes of what it reads are lost in the import")
    return list(x.ty.shape)


def _size(x: Var, axis: int) -> Any:
    """Return a size as a number where it is fixed."""
    size = _shape(x)[axis]
    return int(size) if isinstance(size, tirx.IntImm) else size


def _is_one(size: Any) -> bool:
    return isinstance(size, tirx.IntImm) and int(size) == 1
