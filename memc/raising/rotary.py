"""Raise rotary position embeddings: the subgraph between projection and attention is probed with unit vectors."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import Node

from memc.raising.build import call, transpose
from memc.raising.evaluate import UnknownValueError, ancestors, evaluate, hints, is_symbolic, shape
from memc.raising.probe import Probe, RotaryForm

aten = torch.ops.aten

_ROTARY_OPS = {
    aten.mul.Tensor,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.neg.default,
    aten.rsub.Scalar,
    aten.cat.default,
    aten.stack.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.unflatten.int,
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.to.dtype,
    aten._to_copy.default,
    aten.to.dtype_layout,
    aten.type_as.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.expand_as.default,
    aten.expand.default,
    aten.view_as_complex.default,
    aten.view_as_real.default,
}
_TOLERANCE = 2e-5
_PROBED = 12


def raise_rotary(probe: Probe, node: Node, content: set[Node]) -> Node:
    """Return ``memc::rotary`` in place of the subgraph that ends in ``node [B,H,T,D]``, or ``node`` itself."""
    positions = probe.node("positions")
    if positions is None:
        return node
    for source, static in _candidates(node, content):
        if not static or len(shape(source)) != 4:
            continue
        tokens_first = _tokens_first(source)
        if tokens_first is None or hints(source)[3] != hints(node)[3]:
            continue
        region = _signature(source, node, static)
        if region not in probe.rotary_forms:
            probe.rotary_forms[region] = _fit(probe, source, node, tokens_first)
        form = probe.rotary_forms[region]
        if form is None:
            continue
        graph = probe.module.graph
        name = _frequency_name(probe, form, static)
        with graph.inserting_before(node.next):
            frequencies = graph.get_attr(name)
            with node.meta["val"].fake_mode:
                frequencies.meta["val"] = torch.empty(form.inv_freq.shape)
            plain = transpose(graph, source, 1, 2) if tokens_first else source
            return call(
                graph,
                torch.ops.memc.rotary.default,
                plain,
                positions,
                frequencies,
                interleaved=form.interleaved,
                scaling=form.scaling,
                like=node,
            )
    return node


def _candidates(node: Node, content: set[Node]) -> Iterator[tuple[Node, set[Node]]]:
    """Yield, going back from ``node``, each node that all content flows through, and the static operands met so far."""
    order = {each: index for index, each in enumerate(node.graph.nodes)}
    frontier = {node}
    static: set[Node] = set()
    while frontier:
        if len(frontier) == 1:
            yield next(iter(frontier)), static
        last = max(frontier, key=order.__getitem__)
        if last.target not in _ROTARY_OPS and last.target is not operator.getitem:
            return
        frontier.remove(last)
        for source in last.all_input_nodes:
            if source in content:
                frontier.add(source)
            elif isinstance(source.meta.get("val"), Tensor):
                static.add(source)


def _signature(source: Node, node: Node, static: set[Node]) -> str:
    """Describe the region from ``source`` to ``node`` so that layers which rotate alike are probed once."""
    region = ancestors([node], {source, *static})
    names = {source: "x", **{each: each.name for each in static}}
    lines = [str(hints(source)[2:])]
    for each in node.graph.nodes:
        if each in region:
            names[each] = f"n{len(names)}"
            arguments = torch.fx.node.map_arg((each.args, each.kwargs), lambda other: names.get(other, other.name))
            lines.append(f"{each.target}{arguments}")
    return "\n".join(lines)


def _tokens_first(source: Node) -> bool | None:
    sizes = shape(source)
    symbolic = [axis for axis in (1, 2) if is_symbolic(sizes[axis])]
    if len(symbolic) != 1:
        return None
    return symbolic[0] == 1


def _matrices(probe: Probe, source: Node, node: Node, tokens_first: bool, positions: Tensor) -> Tensor | None:
    """Return the linear map ``[positions, D, D]`` that head 0 goes through at each position; None if it is none."""
    width = hints(source)[3]
    count = len(positions)
    sizes = {"B": width, "T": count}
    unit = torch.zeros(probe.shape_at(source, sizes))
    for channel in range(width):
        unit[channel, ..., channel] = 1.0
    try:
        result = probe.run(node, {source: unit}, sizes, positions)
        generator = torch.Generator().manual_seed(0)
        random = torch.randn(unit.shape, generator=generator)
        mixed = probe.run(node, {source: random}, sizes, positions)
    except (UnknownValueError, RuntimeError, IndexError):
        return None
    if result.dim() != 4 or result.shape[-1] != width:
        return None
    maps = result[:, 0].permute(1, 2, 0).to(torch.float64)
    plain = (random.transpose(1, 2) if tokens_first else random).to(torch.float64)
    if plain.shape != mixed.shape or not torch.allclose(result, result[:, :1].expand_as(result)):
        return None
    expected = torch.einsum("tij,bhtj->bhti", maps, plain)
    return maps if torch.allclose(expected, mixed.to(torch.float64), atol=1e-4) else None


def _fit(probe: Probe, source: Node, node: Node, tokens_first: bool) -> RotaryForm | None:
    positions = torch.arange(_PROBED)
    maps = _matrices(probe, source, node, tokens_first, positions)
    if maps is None:
        return None
    width = maps.shape[1]
    off_diagonal = maps - torch.diag_embed(maps.diagonal(dim1=1, dim2=2))
    rotated = (off_diagonal.abs().amax(dim=(0, 1)) > 1e-12).nonzero().flatten()
    if len(rotated) < 2 or len(rotated) % 2 or int(rotated[-1]) != len(rotated) - 1:
        return None
    size = len(rotated)
    for interleaved in (False, True):
        first = torch.arange(0, size, 2) if interleaved else torch.arange(size // 2)
        second = first + 1 if interleaved else first + size // 2
        cosine, sine = maps[:, first, first], maps[:, second, first]
        scaling = float((cosine[1] ** 2 + sine[1] ** 2).sqrt().mean())
        rebuilt = torch.diag_embed(torch.ones(len(positions), width, dtype=torch.float64))
        rebuilt[:, first, first], rebuilt[:, second, second] = cosine, cosine
        rebuilt[:, second, first], rebuilt[:, first, second] = sine, -sine
        if not torch.allclose(rebuilt, maps, atol=1e-6):
            continue
        inv_freq = torch.atan2(sine[1], cosine[1])
        inv_freq = _refine(probe, source, node, tokens_first, inv_freq, (first, second))
        angles = positions[:, None] * inv_freq
        ok = torch.allclose(angles.cos() * scaling, cosine, atol=_TOLERANCE) and torch.allclose(
            angles.sin() * scaling, sine, atol=_TOLERANCE
        )
        if ok:
            return RotaryForm(inv_freq, interleaved, 1.0 if abs(scaling - 1) < 1e-6 else scaling)
    return None


def _refine(
    probe: Probe, source: Node, node: Node, tokens_first: bool, inv_freq: Tensor, pair: tuple[Tensor, Tensor]
) -> Tensor:
    """Sharpen angles per token by reading them off at doubling positions, where rounding weighs less and less."""
    first, second = pair
    position = 2
    while position <= 4096:
        maps = _matrices(probe, source, node, tokens_first, torch.tensor([0, position]))
        if maps is None:
            break
        seen = torch.atan2(maps[1, second, first], maps[1, first, first])
        turns = ((inv_freq * position - seen) / (2 * torch.pi)).round()
        better = (seen + turns * 2 * torch.pi) / position
        if not torch.allclose(better, inv_freq, rtol=1e-4, atol=1e-6):
            break
        inv_freq = better
        position *= 2
    return inv_freq


def _frequency_name(probe: Probe, form: RotaryForm, static: set[Node]) -> str:
    """Return the name of the model's own frequency buffer, or of a new one with the fitted values."""
    module = probe.module
    for candidate in ancestors(static):
        if candidate.op != "get_attr":
            continue
        try:
            value = evaluate(module, [candidate], {})[0]
        except UnknownValueError:
            continue
        if (
            value.dtype == torch.float32
            and value.shape == form.inv_freq.shape
            and torch.allclose(value.to(torch.float64), form.inv_freq, rtol=1e-4, atol=1e-7)
        ):
            return str(candidate.target)
    values = form.inv_freq.to(torch.float32)
    made = [name for name, _ in module.named_buffers() if name.startswith("memc_inv_freq_")]
    for name in made:
        held = module.get_buffer(name)
        if held.shape == values.shape and torch.equal(held, values):
            return name
    name = f"memc_inv_freq_{len(made)}"
    module.register_buffer(name, values)
    return name
