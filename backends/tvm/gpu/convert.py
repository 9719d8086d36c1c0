"""Converters of the backend's own ops for GPUs: each makes the functions of an op, and calls of them in turn."""

from __future__ import annotations

from typing import Any

from torch.fx import Node
from tvm import relax

from memc.backends.tvm.aten import ATEN
from memc.backends.tvm.emit import (
    Converter,
    Importer,
    Maker,
    Var,
    arguments,
    call,
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
from memc.backends.tvm.gpu.kernels.attention import attention_scores, full_scores
from memc.backends.tvm.gpu.kernels.common import row_shares, row_top, row_total, weigh
from memc.backends.tvm.gpu.kernels.memory import linear_memory
from memc.backends.tvm.gpu.kernels.simple import bank_sum, bank_units, embedding, head_linear, linear, norm, rotary
from memc.backends.tvm.gpu.kernels.window import (
    first_position,
    hand_out,
    log_sum,
    newest_position,
    sequence_numbers,
    take_in,
    window_scores,
    window_values,
)
from memc.backends.tvm.kernels.attention import Range
from memc.backends.tvm.kernels.common import Scores
from memc.backends.tvm.kernels.memory_chunk import Memory
from memc.backends.tvm.kernels.window_chunk import Ring


class GpuConverters(Maker):
    """Makes the functions of one program for a GPU."""

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
            "bank_ffn": self._bank_ffn,
        }
        return {**{f"tvm_{name}.default": form for name, form in forms.items()}, **ATEN}

    def _linear(self, node: Node, importer: Importer) -> Var:
        x, (weight,), bias, out = arguments(node)
        x, stored = importer.env[x], importer.env[weight]
        rows = flat(importer, x)
        made = self.function(importer, linear, out, size(x, -1), str(stored.ty.dtype), bias=bias is not None)
        y = call(importer, made, [rows, stored, or_nothing(importer, bias)], [size(rows, 0), out])
        return reshape(importer, y, [*shape(x)[:-1], out])

    def _head_linear(self, node: Node, importer: Importer) -> Var:
        x, weight, out = arguments(node)
        x, stored = importer.env[x], importer.env[weight]
        made = self.function(importer, head_linear, size(x, 1), out, size(x, 3))
        return call(importer, made, [x, stored], [*shape(x)[:3], out])

    def _embedding(self, node: Node, importer: Importer) -> Var:
        table, ids, rows, width = arguments(node)
        stored, ids = importer.env[table], importer.env[ids]
        one_axis = reshape(importer, ids, [product(shape(ids))])
        made = self.function(importer, embedding, rows, width, str(stored.ty.dtype))
        y = call(importer, made, [stored, one_axis], [size(one_axis, 0), width])
        return reshape(importer, y, [*shape(ids), width])

    def _norm(self, node: Node, importer: Importer) -> Var:
        x, weight, bias, eps, center = arguments(node)
        x = importer.env[x]
        rows = flat(importer, x)
        options = {"center": center, "weight": weight is not None, "bias": bias is not None}
        made = self.function(importer, norm, size(x, -1), eps, **options)
        parts = [or_nothing(importer, part) for part in (weight, bias)]
        return reshape(importer, call(importer, made, [rows, *parts], shape(rows)), shape(x))

    def _rotary(self, node: Node, importer: Importer) -> Var:
        x, cosine, sine = (importer.env[argument] for argument in node.args[:3])
        made = self.function(importer, rotary, size(x, 1), size(x, 3), size(cosine, 2), interleaved=bool(node.args[3]))
        return call(importer, made, [x, cosine, sine], shape(x))

    def _attention(self, node: Node, importer: Importer) -> Var:
        *tensors, slopes, sinks, scale, softcap, window, chunk, prefix = arguments(node)
        q, k, v, positions, keys, values = (importer.env[tensor] for tensor in tensors)
        s = scores_of(q, v, scale, softcap, slopes, sinks)
        newest = self._newest(importer, positions, self._numbers(importer, positions))
        made = self.function(importer, attention_scores, s, Range(window, chunk, prefix))
        inputs = [q, k, v, positions, keys, values, or_nothing(importer, slopes), newest]
        scores = call(importer, made, inputs, [*shape(q)[:3], size(values, 2)])
        return self._weigh(importer, s, scores, values, or_nothing(importer, sinks))[0]

    def _full_attention(self, node: Node, importer: Importer) -> Var:
        query, key, value, positions, bias, sinks, scale, softcap = arguments(node)
        q, k, v = (importer.env[tensor] for tensor in (query, key, value))
        s = scores_of(q, v, scale, softcap, None, sinks)
        added = nothing(importer, "float32", 4)
        if bias is not None:
            added = importer.env[bias]
            added = reshape(importer, added, [*[1] * (4 - len(shape(added))), *shape(added)])
        sized = None if bias is None else tuple(not is_one(extent) for extent in shape(added))
        made = self.function(importer, full_scores, s, masked=positions is not None, bias=sized)
        places = importer.env[positions] if positions is not None else nothing(importer, "int64", 2)
        scores = call(importer, made, [q, k, places, added], [*shape(q)[:3], size(k, 2)])
        return self._weigh(importer, s, scores, v, or_nothing(importer, sinks))[0]

    def _window_memory(self, node: Node, importer: Importer) -> Var:
        *tensors, slopes, sink_logits, scale, softcap, window, sinks, lse, left = arguments(node)
        q, k, v, positions, keys, values = (importer.env[tensor] for tensor in tensors)
        s, r = scores_of(q, v, scale, softcap, slopes, sink_logits), Ring(window, sinks, lse, left)
        batch, tokens = size(q, 0), size(q, 2)
        numbers = self._numbers(importer, positions)
        first = call(importer, self.function(importer, first_position), [positions, numbers], [batch], "int64")
        made = self.function(importer, window_scores, s, r)
        inputs = [q, k, positions, numbers, keys, or_nothing(importer, slopes), first]
        scores = call(importer, made, inputs, [*shape(q)[:3], r.slots + tokens])
        made = self.function(importer, window_values, s.groups, s.value_dim, r.slots)
        everything = call(importer, made, [values, v], [batch, s.groups, r.slots + tokens, s.value_dim])
        read, top, total = self._weigh(importer, s, scores, everything, or_nothing(importer, sink_logits))
        parts = [nothing(importer, "float32", 1)] * 3
        if lse:
            made = self.function(importer, log_sum, s.heads)
            parts[0] = call(importer, made, [top, total, positions], shape(q)[:3])
        if left:
            for place, (new, held, width) in enumerate([(k, keys, s.key_dim), (v, values, s.value_dim)], 1):
                made = self.function(importer, hand_out, s.groups, width, r, tiled=place == 1)
                parts[place] = call(importer, made, [new, positions, numbers, held, first], shape(new))
        return self._stored(importer, s, r, [k, v, positions, numbers, keys, values], read, parts)

    def _stored(self, importer: Importer, s: Scores, r: Ring, inputs: list[Var], read: Var, parts: list[Var]) -> Var:
        """Write the ring, once all that was ``read`` from it has been made, and return it with the other results."""
        newest = self._newest(importer, *inputs[2:4])
        made = self.function(importer, take_in, s, r)
        y = call(importer, made, [*inputs, newest, read], shape(read))
        return importer.block_builder.emit(relax.Tuple([y, *parts]))

    def _linear_memory(self, node: Node, importer: Importer) -> Var:
        *tensors, beta = arguments(node)
        q, k, v, decay, places, state = (importer.env[tensor] for tensor in tensors)
        sizes = size(q, 1), size(k, 1), size(k, 3), size(v, 3)
        m = Memory(*sizes, per_channel=size(decay, 3) > 1, delta=beta is not None)
        made = self.function(importer, linear_memory, m)
        strength = nothing(importer, "float32", 3) if beta is None else importer.env[beta]
        inputs = [q, k, v, decay, places, state, strength]
        return call(importer, made, inputs, [*shape(q)[:3], m.value_dim])

    def _bank_ffn(self, node: Node, importer: Importer) -> Var:
        x, block = (importer.env[argument] for argument in node.args[:2])
        units, width = size(block, 2), size(x, 2)
        made = self.function(importer, bank_units, units, width, node.args[2])
        hidden = call(importer, made, [x, block], [*shape(x)[:2], units])
        return call(importer, self.function(importer, bank_sum, units, width), [hidden, block], shape(x))

    def _weigh(self, importer: Importer, s: Scores, scores: Var, values: Var, sinks: Var) -> tuple[Var, Var, Var]:
        """Return the output of an attention from its scores, and of each row the largest and the sum."""
        rows = shape(scores)[:3]
        made = self.function(importer, row_top, s.heads, sink_logits=s.sink_logits)
        top = call(importer, made, [scores, sinks], rows)
        made = self.function(importer, row_total, s.heads, sink_logits=s.sink_logits)
        total = call(importer, made, [scores, top, sinks], rows)
        shares = call(importer, self.function(importer, row_shares, s.heads), [scores, top, total], shape(scores))
        made = self.function(importer, weigh, s.heads, s.groups, s.value_dim)
        return call(importer, made, [shares, values], [*rows, s.value_dim]), top, total

    def _numbers(self, importer: Importer, positions: Var) -> Var:
        made = self.function(importer, sequence_numbers)
        return call(importer, made, [positions], shape(positions), "int64")

    def _newest(self, importer: Importer, positions: Any, numbers: Any) -> Var:
        made = self.function(importer, newest_position)
        return call(importer, made, [positions, numbers], [size(positions, 0)], "int64")
