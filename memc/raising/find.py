"""Read the blocks off a raised program."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Node

from memc.blocks import (
    Alibi,
    AttentionBlock,
    Bias,
    Bidirectional,
    Block,
    Causal,
    Chunked,
    FeedForwardBlock,
    Mask,
    OtherBias,
    OtherMask,
    Prefix,
    Projection,
    RelativeBias,
    Rotary,
    SlidingWindow,
)
from memc.dialect import arguments
from memc.program import Program, get_tensor
from memc.raising.evaluate import UnknownValueError, content_nodes, evaluate, hints, shape
from memc.raising.feed_forward import LINEAR, find_feed_forward, linear_input, linear_parts

aten = torch.ops.aten

_ATTENTION = {torch.ops.memc.attention.default, torch.ops.memc.full_attention.default}
_ROTARY = torch.ops.memc.rotary.default
_NORM = torch.ops.memc.norm.default
_THROUGH = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.transpose.int,
    aten.permute.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.unflatten.int,
    aten.flatten.using_ints,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.dropout.default,
    aten.to.dtype,
    aten._to_copy.default,
    aten.type_as.default,
    aten.clamp.default,
    aten.cat.default,
    aten.expand.default,
    aten.index.Tensor,
    operator.getitem,
}


def find_blocks(program: Program) -> tuple[Block, ...]:
    """Return every attention and feed-forward block of a raised program in graph order."""
    return tuple(sorted([*_attention(program), *_feed_forward(program), *_experts(program)], key=_position(program)))


def _position(program: Program) -> Any:
    order = {node: index for index, node in enumerate(program.module.graph.nodes)}
    return lambda block: order[block.attention if isinstance(block, AttentionBlock) else block.output]


def block_parameters(program: Program, blocks: Iterable[Block]) -> int:
    """Count the parameters of the projections of every attention and feed-forward block, tied ones once."""
    found: dict[int, int] = {}
    for block in blocks:
        if isinstance(block, AttentionBlock):
            linears = [projection.node for projection in block.projections.values()]
        else:
            linears = [node for node in (block.up, block.gate, block.down) if node is not None]
        for linear in linears:
            for node in linear_parts(linear)[:2]:
                if node is not None and node.op == "get_attr":
                    value = get_tensor(program.module, str(node.target))
                    found[id(value)] = value.numel()
    return sum(found.values())


def path_of(node: Node) -> str:
    """Return the module path that a node came from."""
    return str(node.meta.get("memc", {}).get("path", ""))


def layer_of(path: str, ordinal: int) -> int:
    """Return the first number in a module path, or the ordinal where there is none."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return int(match.group(1)) if match else ordinal


def _attention(program: Program) -> Iterator[AttentionBlock]:
    seen: dict[Node, str] = {}
    nodes = [node for node in program.module.graph.nodes if node.target in _ATTENTION]
    inputs = zip(program.placeholders(), program.inputs, strict=False)
    content = content_nodes(program.module, [node for node, spec in inputs if spec.role != "positions"])
    for ordinal, node in enumerate(nodes):
        bound = arguments(node)
        query, key, value = bound["query"], bound["key"], bound["value"]
        stateful = node.target == torch.ops.memc.attention.default
        output = node
        if stateful:
            output = next(user for user in node.users if user.target is operator.getitem and user.args[1] == 0)
        path = path_of(node)
        layer = layer_of(path, ordinal)
        projections = dict(_projections(program.module, query, key, value, output))
        sources = {name: _see(linear_input(p.node)) for name, p in projections.items() if name != "output"}
        # Where keys are held by position they are of the same tokens, though either may go through a tensor of its own.
        cross = not stateful and "query" in sources and "key" in sources and sources["query"] is not sources["key"]
        shared = seen.get(key)
        seen.setdefault(key, f"layer {layer}")
        hidden = None
        if len(set(sources.values())) == 1 and len(sources) == 3:
            hidden = linear_input(projections["query"].node)
        elif stateful:
            hidden = _meeting(content, query, key, value)
        rotary = _rotary(key)
        yield AttentionBlock(
            layer=layer,
            path=path,
            kind="cross_attention" if cross else "attention",
            attention=node,
            query=query,
            key=key,
            value=value,
            output=output,
            hidden=_token_major(hidden, query),
            query_pre_rotary=_before_rotary(query),
            key_pre_rotary=_before_rotary(key),
            projections=projections,
            num_heads=hints(query)[1],
            num_kv_heads=hints(key)[1],
            head_dim=hints(query)[3],
            value_dim=hints(value)[3],
            scale=bound["scale"],
            mask=_mask(node, bound),
            bias=_bias(program, node, bound),
            softcap=bound["softcap"] or None,
            sink_logits=bound["sink_logits"],
            rotary=rotary,
            qk_norm=_before_rotary(query).target == _NORM or _norm_above(_before_rotary(query)) is not None,
            kv_source="cross" if cross else (shared or "self"),
            streamable=stateful,
        )


def _meeting(content: set[Node], *ends: Node) -> Node | None:
    """Return the nearest tensor ``[B, T, width]`` that all of ``ends`` come from and nothing but it; None for none.

    So what is projected in steps (multi-head latent attention) has an input too. Not behind another attention.
    """
    frontier = set(ends)
    while True:
        last = max(frontier)
        if len(frontier) == 1 and last not in ends and len(shape(last)) == 3:
            return last
        frontier.remove(last)
        if last.op != "call_function" or last.target in _ATTENTION:
            return None
        frontier.update(source for source in last.all_input_nodes if source in content)
        if not frontier:
            return None


def _token_major(hidden: Node | None, query: Node) -> Node | None:
    """Return the projections' input as ``[B, T, width]``, seen through flattening and swapped axes (or None)."""
    batch, _, tokens, _ = map(str, shape(query))
    node = hidden
    while node is not None and tuple(map(str, shape(node)[:-1])) != (batch, tokens):
        if node.target not in _THROUGH:
            return None
        node = node.all_input_nodes[0]
    return node


def _mask(node: Node, bound: dict[str, Any]) -> Mask:
    if node.target == torch.ops.memc.attention.default:
        for name, kind in (("window", SlidingWindow), ("chunk", Chunked), ("prefix", Prefix)):
            if bound[name]:
                mask: Mask = kind(bound[name])
                return mask
        return Causal()
    match node.meta.get("memc", {}).get("mask", "other" if bound["bias"] is not None else "bidirectional"):
        case "bidirectional":
            return Bidirectional()
        case "causal":
            return Causal()
        case other:
            return OtherMask(str(other))


def _bias(program: Program, node: Node, bound: dict[str, Any]) -> Bias | None:
    slopes = bound.get("slopes")
    if slopes is not None:
        return Alibi(tuple(get_tensor(program.module, str(slopes.target)).tolist()))
    match node.meta.get("memc", {}).get("bias"):
        case None:
            return None
        case "relative":
            return RelativeBias()
        case other:
            return OtherBias(str(other))


def _rotary(node: Node) -> Rotary | None:
    while node.target in _THROUGH:
        node = node.all_input_nodes[0]
    if node.target != _ROTARY:
        return None
    bound = arguments(node)
    return Rotary(2 * hints(bound["inv_freq"])[0], bound["interleaved"], bound["scaling"])


def _before_rotary(node: Node) -> Node:
    if node.target != _ROTARY:
        return node
    source: Node = arguments(node)["x"]
    return source


def _norm_above(node: Node) -> Node | None:
    """Return the norm that a query or key went through on its way from the projection, or None."""
    while (below := _below(node)) is not None:
        node = below
    return node if node.target == _NORM else None


def _below(node: Node) -> Node | None:
    """Go one step back through a view, or through a factor with a weight per head and channel."""
    if node.target in _THROUGH and node.all_input_nodes:
        return node.all_input_nodes[0]
    if node.target == aten.mul.Tensor:
        weights = [source for source in node.all_input_nodes if _see(source).op == "get_attr"]
        others = [source for source in node.all_input_nodes if source not in weights]
        return others[0] if len(weights) == 1 and len(others) == 1 else None
    return None


def _see(node: Node) -> Node:
    while node.target in _THROUGH and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _projections(
    module: GraphModule, query: Node, key: Node, value: Node, output: Node
) -> Iterator[tuple[str, Projection]]:
    for name, node in (("query", query), ("key", key), ("value", value)):
        found = _projection(module, node)
        if found is not None:
            yield name, found
    stack = list(output.users)
    while stack:
        user = stack.pop()
        if user.target in LINEAR:
            yield "output", _describe(user, None)
            return
        if user.target in _THROUGH or user.target == _NORM:  # BitNet b1.58 normalises what it projects
            stack += list(user.users)


def _projection(module: GraphModule, node: Node) -> Projection | None:
    """Find the linear op that a query, key or value is made by, and which of its channels it takes, by probing."""
    node = _before_rotary(node)
    top = node
    while True:
        norm = _norm_above(top)
        if norm is None:
            break
        top = arguments(norm)["x"]
        node = top
    trail = node
    while trail.target not in LINEAR:
        inputs = trail.all_input_nodes
        if trail.target not in _THROUGH or not inputs:
            return None
        trail = inputs[0]
    return _describe(trail, _rows(module, trail, node))


def _rows(module: GraphModule, linear: Node, node: Node) -> tuple[int, ...] | None:
    width = hints(linear)[-1]
    codes = torch.arange(float(width)).expand([1] * (len(shape(linear)) - 1) + [width])
    feeds: dict[Node, Any] = {linear: codes}
    for placeholder in module.graph.find_nodes(op="placeholder"):
        sizes = [1 if not isinstance(s, int) else s for s in shape(placeholder)]
        feeds[placeholder] = torch.zeros(sizes, dtype=placeholder.meta["val"].dtype)
    try:
        rows = tuple(int(code) for code in evaluate(module, [node], feeds)[0].flatten())
    except (UnknownValueError, RuntimeError, IndexError):
        return None
    return None if rows == tuple(range(width)) else rows


def _describe(linear: Node, rows: tuple[int, ...] | None) -> Projection:
    if linear.target == aten.addmm.default:
        bias, weight = linear.args[0], linear.args[2]
    else:
        weight, bias = linear.args[1], linear.args[2] if len(linear.args) > 2 else None
    names = [str(n.target) if isinstance(n, Node) and n.op == "get_attr" else "" for n in (weight, bias)]
    return Projection(linear, names[0], names[1], rows, linear.target != aten.linear.default)


def _feed_forward(program: Program) -> Iterator[FeedForwardBlock]:
    for ordinal, found in enumerate(find_feed_forward(program.module)):
        path = _common(path_of(found.up), path_of(found.down))
        yield FeedForwardBlock(
            layer=layer_of(path, ordinal),
            path=path,
            kind="feed_forward",
            input=found.input,
            output=found.output,
            up=found.up,
            gate=found.gate,
            down=found.down,
            activation=found.activation,
            width=hints(found.output)[-1],
            hidden=found.hidden,
        )


def _common(first: str, second: str) -> str:
    parts = []
    for left, right in zip(first.split("."), second.split("."), strict=False):
        if left != right:
            break
        parts.append(left)
    return ".".join(parts)


def _experts(program: Program) -> Iterator[FeedForwardBlock]:
    """Name mixtures of experts: a top-k choice made from a projection of the hidden states.

    What a pass added, whose parameters are below ``memc``, may choose as well and is none.
    """
    graph, seen = program.module.graph, set[str]()
    for ordinal, node in enumerate(n for n in graph.nodes if n.target == aten.topk.default):
        router = node
        while router.target not in LINEAR and router.all_input_nodes:
            router = router.all_input_nodes[0]
        if router.target not in LINEAR or _describe(router, None).weight.startswith("memc."):
            continue
        path = path_of(router)
        owner = path.rpartition(".")[0] or path
        if owner in seen:  # groups of experts are chosen before experts
            continue
        seen.add(owner)
        inside = [n for n in graph.nodes if (path_of(n) + ".").startswith(owner + ".") and "val" in n.meta]
        entry = _see(linear_input(router))
        kind: Literal["moe"] = "moe"
        yield FeedForwardBlock(
            layer=layer_of(owner, ordinal),
            path=owner,
            kind=kind,
            input=entry,
            output=inside[-1],
            up=None,
            gate=None,
            down=None,
            activation="",
            width=hints(entry)[-1],
            hidden=0,
        )
