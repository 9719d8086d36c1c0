"""Rewrite found attention into ``memc::attention`` or ``memc::full_attention``, with states for the causal ones."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from memc.blocks import Alibi, Bidirectional, Causal, Chunked, OtherBias, OtherMask, Prefix, RelativeBias, SlidingWindow
from memc.infer import fill_in
from memc.raising.attention import SDPA, MismatchError, Site
from memc.raising.build import call, transpose
from memc.raising.evaluate import UnknownValueError, hints, is_symbolic, shape
from memc.raising.masks import Scores, classify, constants_of, table_of
from memc.raising.probe import Probe
from memc.raising.rotary import raise_rotary

aten = torch.ops.aten

_REPEATING = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.clone.default,
    aten.contiguous.default,
    aten.repeat_interleave.self_int,
    aten.repeat.default,
    aten.broadcast_to.default,
    aten.transpose.int,
    aten.permute.default,
    aten.flatten.using_ints,
    aten.expand_as.default,
}


@dataclass(frozen=True)
class Operands:
    """Query ``[B,H,T,D]``, key ``[B,G,S,D]`` and value ``[B,G,S,E]`` nodes of one attention."""

    query: Node
    key: Node
    value: Node


def operands(probe: Probe, site: Site, content: set[Node]) -> Operands:
    """Bring a site's query, key and value to four axes, undo repeated heads, and raise rotary embeddings."""
    graph = probe.module.graph
    with graph.inserting_before(site.output):
        query, key, value = site.query, site.key, site.value
        if site.key_transposed:
            key = transpose(graph, key, -1, -2)
        query, key, value = (split_heads(probe, node) for node in (query, key, value))
        heads = hints(query)[1]
        key, value = unrepeat(probe, key, heads), unrepeat(probe, value, heads)
    query, key = raise_rotary(probe, query, content), raise_rotary(probe, key, content)
    if key.target == torch.ops.memc.rotary.default:
        # Heads may have been repeated before they were rotated.
        with graph.inserting_before(key):
            plain = unrepeat(probe, key.args[0], heads)  # type: ignore[arg-type]
            if plain is not key.args[0]:
                key = call(graph, key.target, plain, *key.args[1:], like=key, **key.kwargs)
    if hints(key)[1] != hints(value)[1]:
        raise MismatchError("grouped-query attention", "key and value have different numbers of heads", site.output)
    return Operands(query, key, value)


def split_heads(probe: Probe, node: Node) -> Node:
    """Return ``node`` with four axes: ``[B * H, T, D]`` is taken apart, ``[B, T, D]`` becomes one head."""
    if len(shape(node)) == 4:
        return node
    if len(shape(node)) != 3:
        raise MismatchError("attention", f"operand of {len(shape(node))} axes", node)
    graph = probe.module.graph
    batch_input, axis = probe.input_of("B")
    heads = hints(node)[0] // hints(batch_input)[axis]
    # The new nodes stand right behind the operand, before whatever may use it.
    with graph.inserting_after(node):
        batch = call(graph, aten.sym_size.int, batch_input, axis, like=node)
    with graph.inserting_after(batch):
        return call(graph, aten.reshape.default, node, [batch, heads, -1, hints(node)[2]], like=node)


def unrepeat(probe: Probe, node: Node, heads: int) -> Node:
    """Return the node before its heads were repeated for grouped queries, as ``[B, G, S, D]``, or ``node`` itself.

    Settled by evaluation: head ``h`` of the repeated tensor must hold head ``h // (H // G)`` of the other.
    """
    width = hints(node)[3]
    found, trail = node, node
    while trail.target in _REPEATING:
        trail = trail.all_input_nodes[0]
        groups = _groups(trail, node, width)
        if groups is not None and groups < heads and heads % groups == 0 and _repeats(probe, trail, node, groups):
            found = trail
    if found is node:
        return node
    return _as_heads(probe, found, node)


def _groups(candidate: Node, node: Node, width: int) -> int | None:
    """Return how many heads a candidate holds for each token, or None when it holds something else."""
    sizes = hints(candidate)
    batch, _, tokens, _ = hints(node)
    count = 1
    for size in sizes:
        count *= size
    if len(sizes) < 4 or sizes[-1] != width or count % (batch * tokens * width):
        return None
    return count // (batch * tokens * width)


def _repeats(probe: Probe, candidate: Node, node: Node, groups: int) -> bool:
    sizes = {"B": 1, "T": 3, "U": 4}
    source_shape = probe.shape_at(candidate, sizes)
    codes = torch.arange(float(torch.Size(source_shape).numel())).reshape(source_shape)
    try:
        repeated = probe.run(node, {candidate: codes}, sizes)
    except (UnknownValueError, RuntimeError):
        return False
    plain = _heads_first(probe, candidate, codes, groups)
    return plain is not None and torch.equal(repeated, plain.repeat_interleave(repeated.shape[1] // groups, dim=1))


def _layout(probe: Probe, candidate: Node, groups: int) -> tuple[list[int], bool] | None:
    """Return the axes of (batch, heads or tokens, tokens or heads, channels) and whether tokens come before heads."""
    sizes = shape(candidate)
    last = len(sizes) - 1
    axes = [axis for axis in range(1, last) if is_symbolic(sizes[axis]) or sizes[axis] != 1]
    tokens = [axis for axis in axes if is_symbolic(sizes[axis])]
    if len(tokens) != 1:
        return None
    rest = [axis for axis in axes if axis not in tokens]
    if groups == 1 and not rest:
        ones = [axis for axis in range(1, last) if axis not in tokens]
        if not ones:
            return None
        rest = ones[:1]
    if len(rest) != 1:
        return None
    return [0, *sorted([tokens[0], rest[0]]), last], tokens[0] < rest[0]


def _heads_first(probe: Probe, candidate: Node, value: Tensor, groups: int) -> Tensor | None:
    layout = _layout(probe, candidate, groups)
    if layout is None:
        return None
    axes, tokens_first = layout
    plain = value.reshape([value.shape[axis] for axis in axes])
    return plain.transpose(1, 2) if tokens_first else plain


def _as_heads(probe: Probe, candidate: Node, node: Node) -> Node:
    groups = _groups(candidate, node, hints(node)[3])
    assert groups is not None
    layout = _layout(probe, candidate, groups)
    assert layout is not None
    axes, tokens_first = layout
    graph = probe.module.graph
    result = candidate
    for axis in reversed([axis for axis in range(len(shape(candidate))) if axis not in axes]):
        result = call(graph, aten.squeeze.dim, result, axis, like=node)
    return transpose(graph, result, 1, 2) if tokens_first else result


def scores_of(probe: Probe, site: Site) -> Scores:
    """Settle by evaluation what is added to and masked from a site's scores."""
    if site.output.target == SDPA and site.mask is None:
        return Scores(Causal() if site.is_causal else Bidirectional(), None)
    target = site.mask if site.output.target == SDPA else site.logits
    assert target is not None
    stop = {site.query, site.key}
    if not _square(probe, site):
        return _cross_scores(probe, site, target)
    constants = constants_of(probe.module, [target], stop)

    def matrix(tokens: int, replace: dict[int, int]) -> Tensor:
        sizes = {"B": 1, "T": tokens, "U": tokens}
        feeds = {} if site.mask is not None else {node: torch.zeros(probe.shape_at(node, sizes)) for node in stop}
        value = probe.run(target, {**probe.stand_ins([target], stop), **feeds}, sizes, replace=replace)
        if value.dtype == torch.bool:
            value = torch.where(value, 0.0, -torch.inf)
        value = value.reshape(-1, *value.shape[-2:])
        return value.expand(-1, *(tokens if size == 1 else size for size in value.shape[1:]))

    length = shape(site.query)[-2]
    fixed = None if is_symbolic(length) else length
    return classify(matrix, constants, site.is_causal, fixed, table_of(probe.module, [target], stop))


def _cross_scores(probe: Probe, site: Site, target: Node) -> Scores:
    """Settle whether anything is masked or added where queries and keys are different tokens."""
    sizes = {"B": 1, "T": 4, "U": 6}
    feeds = {} if site.mask is not None else {n: torch.zeros(probe.shape_at(n, sizes)) for n in (site.query, site.key)}
    value = probe.run(target, {**probe.stand_ins([target], feeds), **feeds}, sizes)
    nothing = bool(value.all()) if value.dtype == torch.bool else not value.any()
    return Scores(Bidirectional() if nothing else OtherMask("cross attention with a mask or bias"), None)


def _square(probe: Probe, site: Site) -> bool:
    """Tell whether queries and keys are the same tokens, going by their symbolic number."""
    keys = shape(site.key)[-1 if site.key_transposed else -2]
    queries = shape(site.query)[-2]
    if is_symbolic(keys) and is_symbolic(queries):
        return bool(keys.node.expr == queries.node.expr)
    return bool(keys == queries)


def lower_site(probe: Probe, site: Site, index: int, scores: Scores, own: Operands) -> bool:
    """Replace a site by its canonical op; returns whether it carries state (and so can run in pieces)."""
    graph = probe.module.graph
    positions = probe.node("positions")
    causal = isinstance(scores.mask, Causal | SlidingWindow | Chunked | Prefix)
    plain_bias = scores.bias is None or isinstance(scores.bias, Alibi)
    with graph.inserting_before(site.output):
        if causal and plain_bias and positions is not None:
            out = _stateful(probe, site, index, scores, own, positions)
        else:
            bias = None
            if not (isinstance(scores.mask, Bidirectional) and scores.bias is None):
                bias = _bias_node(probe, site)
            out = call(
                graph,
                torch.ops.memc.full_attention.default,
                own.query,
                own.key,
                own.value,
                None,
                bias,
                site.sink_logits,
                scale=site.scale,
                softcap=site.softcap,
                like=site.output,
            )
        describe(out, scores)
        if len(shape(site.output)) == 3:
            result = call(graph, aten.flatten.using_ints, out, 0, 1, like=site.output)
        else:
            result = out
    site.output.replace_all_uses_with(result)
    # scaled_dot_product_attention counts as random, so dead-code elimination would keep it.
    graph.erase_node(site.output)
    return causal and plain_bias and positions is not None


def describe(node: Node, scores: Scores) -> None:
    """Note mask and bias at the op, for those that its arguments do not show."""
    noted = dict(node.meta.get("memc", {}))
    match scores.mask:
        case Bidirectional():
            noted["mask"] = "bidirectional"
        case OtherMask(reason):
            noted["mask"] = reason
        case _:
            noted["mask"] = "causal"
    match scores.bias:
        case RelativeBias():
            noted["bias"] = "relative"
        case OtherBias(reason):
            noted["bias"] = reason
    node.meta["memc"] = noted


def _stateful(probe: Probe, site: Site, index: int, scores: Scores, own: Operands, positions: Node) -> Node:
    graph = probe.module.graph
    options: dict[str, int] = {}
    match scores.mask:
        case SlidingWindow(size):
            options["window"] = size
        case Chunked(size):
            options["chunk"] = size
        case Prefix(size):
            options["prefix"] = size
    slopes = None
    if isinstance(scores.bias, Alibi):
        name = f"memc_slopes_{index}"
        probe.module.register_buffer(name, torch.tensor(scores.bias.slopes, dtype=torch.float32))
        slopes = graph.get_attr(name)
        slopes.meta["val"] = _fake_like(own.query, (len(scores.bias.slopes),), torch.float32)
    past = [state_input(probe, index, part, own) for part in ("key", "value", "positions")]
    node = graph.call_function(
        torch.ops.memc.attention.default,
        (own.query, own.key, own.value, positions, *past, slopes, site.sink_logits),
        {"scale": site.scale, "softcap": site.softcap, **options},
    )
    node.meta["memc"] = dict(site.output.meta.get("memc", {}))
    fill_in(node)
    parts = [call(graph, operator.getitem, node, item, like=site.output) for item in range(4)]
    node.meta["next"] = parts[1:]
    return parts[0]


def _fake_like(node: Node, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    with node.meta["val"].fake_mode:
        return torch.empty(sizes, dtype=dtype)


def state_input(probe: Probe, index: int, part: str, own: Operands) -> Node:
    """Add the placeholder of one state behind the others."""
    graph = probe.module.graph
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(f"layer_{index}_{part}")
    batch, groups, _, width = shape(own.key)
    if part == "value":
        width = shape(own.value)[3]
    # Any length will do until the whole graph is inferred again with a symbol of its own.
    with own.key.meta["val"].fake_mode:
        if part == "positions":
            node.meta["val"] = torch.empty((batch, 0), dtype=torch.int64)
        else:
            node.meta["val"] = torch.empty((batch, groups, 0, width), dtype=own.key.meta["val"].dtype)
    return node


def _bias_node(probe: Probe, site: Site) -> Node | None:
    """Return one additive bias node for everything that a site adds to or masks from its scores."""
    graph = probe.module.graph
    if site.output.target == SDPA:
        mask = site.mask
        if mask is None:
            raise MismatchError("sdpa", "is_causal without a mask where queries and keys differ", site.output)
        if mask.meta["val"].dtype == torch.bool:
            return _where(graph, mask, site.output)
        return mask
    if site.maskings:
        # The masked entries are what softmax's input is when the scores are zero.
        raise MismatchError(
            "softmax attention", "masked_fill with a mask that is neither causal nor bidirectional", site.output
        )
    total: Node | None = None
    for addend in site.addends:
        part = addend.node
        if addend.factor != 1.0:
            part = call(graph, aten.mul.Tensor, part, addend.factor, like=part)
        total = part if total is None else call(graph, aten.add.Tensor, total, part, like=site.output)
    return total


def _where(graph: torch.fx.Graph, mask: Node, like: Node) -> Node:
    return call(graph, aten.where.Scalar, mask, 0.0, float("-inf"), like=like)


__all__ = ["Operands", "lower_site", "operands", "scores_of", "split_heads", "unrepeat"]
