"""``kind=head``: an attention-free stack on a tapped hidden state, mixed into the next-token distribution.

MLP Memory (arXiv 2508.01832), which learns what a nearest-neighbour datastore (kNN-LM) would say and takes its place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from memc.blocks import FeedForwardBlock
from memc.passes.memory_bank.beside import ROOT, SEED, Inserted, Values, normed
from memc.raising.evaluate import hints, shape
from memc.rewrite import Editor, New, constant

WIDER = 8 / 3
"""Hidden units of a block of the stack per channel, which makes a gated one as large as a plain one of four."""

MOST = 60.0
"""Largest logarithm of how much likelier a token the memory finds than the model does: its exponential is finite."""


@dataclass(frozen=True)
class Head:
    """A stack of ``depth`` blocks, whose distribution weighs ``mix`` beside the model's."""

    depth: int
    mix: float

    def insert(self, editor: Editor, block: FeedForwardBlock) -> Inserted:
        """Tap the input of a block, and mix what the stack makes of it into the program's logits."""
        logits = editor.output(0)
        new = self.parameters(block.width, hints(logits)[-1])
        nodes = editor.add_parameters(f"{ROOT}.head", new, SEED, "memory_bank", logits)
        flat = {"tokens": editor.program.placeholders()[0]} if len(shape(block.input)) == 2 else {}
        inputs: dict[str, Node] = {**nodes, **flat, "x": block.input, "logits": logits}
        (mixed,) = editor.insert(self.read, inputs, logits.next, "memory head", self)
        editor.set_output(0, mixed)
        facts = {"new_parameters": sum(item.count for item in new.values()), "mix": self.mix}
        return Inserted(facts, {name: str(node.target) for name, node in nodes.items()})

    def parameters(self, width: int, vocabulary: int) -> dict[str, New]:
        """List gate, up and down of each block, and the head, which is zero."""
        hidden = -(-int(WIDER * width) // 8) * 8

        def normal(rows: int, columns: int, scale: float = 1.0) -> New:
            return New((rows, columns), lambda g: torch.randn(rows, columns, generator=g) * scale * columns**-0.5)

        made = {}
        for index in range(self.depth):
            made[f"gate{index}"] = normal(hidden, width)
            made[f"up{index}"] = normal(hidden, width)
            made[f"down{index}"] = normal(width, hidden, self.depth**-0.5)
        return {**made, "vocabulary": constant((vocabulary, width), 0.0)}

    def read(self, t: Values) -> tuple[Tensor, ...]:
        """Return the logarithm of ``(1 - mix) p + mix q``, up to a constant, with p the model's distribution.

        The memory's own, q, has the model's logits plus those of the stack, so that it is p while the head is zero.
        Then log(q / p) is exactly 0, and so is what is added to the model's logits: log(1 + mix (q / p - 1)).
        """
        x = t["x"].unflatten(0, (t["tokens"].shape[0], -1)) if "tokens" in t else t["x"]
        x = normed(x)
        for index in range(self.depth):
            h = normed(x)
            gate = functional.silu(functional.linear(h, t[f"gate{index}"]))
            x = x + functional.linear(gate * functional.linear(h, t[f"up{index}"]), t[f"down{index}"])
        logits = t["logits"].float()
        own = logits + functional.linear(normed(x), t["vocabulary"])
        likelier = (own.log_softmax(-1) - logits.log_softmax(-1)).clamp_max(MOST)
        added = torch.log1p(self.mix * torch.expm1(likelier))
        return (t["logits"] + added.to(t["logits"].dtype),)
