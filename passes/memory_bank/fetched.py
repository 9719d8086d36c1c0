"""``kind=ffn``: hidden units of a gated feed-forward network, fetched for each sequence (arXiv 2510.02375)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memc.blocks import FeedForwardBlock
from memc.passes.memory_bank.beside import Inserted, Values, add_beside
from memc.rewrite import Editor

PLAIN = "silu"
"""Activation of a bank's block beside a feed-forward block that has no gate, and so no activation of a gate."""


def insert_fetched(editor: Editor, block: FeedForwardBlock, units: int) -> Inserted:
    """Give a block an input ``bank_LAYER [B, 3, units, C]`` and add what the network of these weights gives."""
    activation = block.activation if block.gate is not None else PLAIN
    name = fetched_name(block.layer)
    fetched = editor.add_fetched(name, ("B", 3, units, block.width))

    def read(t: Values) -> Tensor:
        made: Tensor = torch.ops.memc.bank_ffn.default(t["x"], t["block"], activation=activation)
        return made

    add_beside(editor, block, read, {"block": fetched}, ("bank", activation))
    facts = {
        "input": name,
        "units": units,
        "activation": activation,
        "activation_of": "the block's gate" if block.gate is not None else "the bank, since the block has no gate",
        "fetched_bytes": math.prod(fetched.meta["val"].shape[1:]) * fetched.meta["val"].dtype.itemsize,
    }
    return Inserted(facts)


def fetched_name(layer: int) -> str:
    """Return the name of the input that holds the blocks of a layer."""
    return f"bank_{layer}"
