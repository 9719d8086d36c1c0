"""``kind=side``: a side copy of one down projection, which only what was edited is routed to (WISE, arXiv 2405.14768).

The copy W' is kept as its change W' - W from the projection W: what it gives is the projection's output plus the change
of it, and the size of that, the activation difference of the paper's equation 3, says whether a token is about an edit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from memc.blocks import FeedForwardBlock
from memc.passes.memory_bank.beside import ROOT, SEED, Inserted, Values, add_last_state, columns, replace_output, total
from memc.program import StateSpec
from memc.raising.evaluate import hints
from memc.raising.feed_forward import linear_input
from memc.rewrite import Editor, constant

STATE = "side_routed"
"""The state that tells, for each sequence, whether a token of it so far was about an edit."""


@dataclass(frozen=True)
class Side:
    """A side copy beside one block."""

    def insert(self, editor: Editor, block: FeedForwardBlock) -> Inserted:
        """Route each sequence of a block from the token on whose activation difference is over the threshold."""
        assert block.down is not None
        entry = linear_input(block.down)
        new = {"change": constant((block.width, hints(entry)[-1]), 0.0), "threshold": constant((1,), 0.0)}
        prefix = f"{ROOT}.{block.layer}"
        nodes = editor.add_parameters(prefix, new, SEED, "memory_bank", block.output)
        past = add_last_state(editor, StateSpec(STATE, torch.int64, ("B", 1)))
        positions = editor.program.placeholders()[1]

        def read(t: Values) -> tuple[Tensor, ...]:
            change = functional.linear(t["entry"].float(), t["change"])
            over = (change.square().sum(-1) > t["threshold"].square()) & (t["positions"] >= 0)
            found, last = routed(over, t["positions"], t["past"])
            return torch.where(found.unsqueeze(-1), total(t["output"], change), t["output"]), last

        inputs = {**nodes, "positions": positions, "past": past}
        (after,) = replace_output(editor, block, read, {"entry": entry}, inputs, self)
        editor.set_next(past, after)
        return Inserted({"new_parameters": sum(item.count for item in new.values()), "state_bytes": 8})


def routed(over: Tensor, positions: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each token ``[B,T]`` whether one of its sequence up to it is ``over``, and that of the last ``[B,1]``.

    That is the running maximum, over a sequence, of whether its activation difference is over the threshold. ``past
    [B,1]`` is what the sequence that goes on brought along, 0 or 1; one that begins brings nothing.
    """
    order = columns(positions)
    count = over.long().cumsum(1)
    line = torch.cat([past * 0, positions * 0], 1)
    started = (order - positions - 1).clamp_min(0)
    before = line.scatter(1, order, torch.where(order > 0, count, 0)).gather(1, started)
    carried = torch.where(positions >= order, past, 0)
    found = (count - before + carried) > 0
    last = (order > 0).long().sum(1, keepdim=True)
    return found, line.scatter(1, order, torch.where(order > 0, found.long(), past)).gather(1, last)
