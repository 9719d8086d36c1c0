"""Quantised weights as a program that can be measured: its products take the values that the codes stand for."""

from __future__ import annotations

import torch
from torch.fx import Node

from memc.program import Program, get_tensor, set_tensor
from memc.quantise import BITS, NARROW, quantise
from memc.raising.feed_forward import LINEAR, linear_weight

aten = torch.ops.aten


def quantised(program: Program, kind: str) -> Program:
    """Return a copy of a program whose products take weights as ``kind`` (int8, int4) holds them; itself for others.

    What backends quantise is: matrices that are not narrow, in blocks, the last one of ``int4``, which makes the
    logits, in 8 bits. Tables that are looked up in keep their values, and activations theirs.
    """
    if kind not in BITS:
        return program
    result = program.copy()
    products = [node for node in result.module.graph.nodes if node.target in LINEAR]
    made: dict[tuple[str, int], Node] = {}
    for node in products:
        weight = linear_weight(node)
        if weight.op != "get_attr":
            continue
        name, bits = str(weight.target), 8 if node is products[-1] else BITS[kind]
        value = get_tensor(result.module, name)
        turned = node.target != aten.linear.default
        out, into = value.shape[::-1] if turned else value.shape
        if value.dim() != 2 or out * NARROW < into:
            continue
        if (name, bits) not in made:
            found = quantise((value.T if turned else value).detach().float().numpy(), bits).values(into)
            values = torch.from_numpy(found.T.copy() if turned else found).to(value.dtype)
            target = f"memc.quantised.weight_{len(made)}"
            set_tensor(result.module, target, values, trainable=True)
            with result.module.graph.inserting_before(node):
                made[name, bits] = result.module.graph.get_attr(target)
            made[name, bits].meta = dict(weight.meta)
        node.replace_input_with(weight, made[name, bits])
    result.module.graph.lint()
    result.module.recompile()
    return result
