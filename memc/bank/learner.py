"""The frozen model that blocks of a bank are trained beside, and what a sequence costs with a block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional

from memc.bank.layout import BankShape, Cluster
from memc.bank.manifest import BankManifest, require_model
from memc.bank.sequences import PackedSequence
from memc.dialect import arguments, op_spec
from memc.errors import MemcError
from memc.frontend import capture_source
from memc.pipeline import Pass
from memc.plugins import load_kernels, load_plugin
from memc.program import Program
from memc.raising import raise_program
from memc.runtime.text import Text
from memc.target import get_target
from memc.train.blocks import Teacher
from memc.train.device import CPU, lent
from memc.train.products import Rounded, narrowed
from memc.weights import materialize

MEASURED = 4
"""Sequences that the scale of a block's first values is measured on."""


@dataclass(frozen=True)
class Learner:
    """A model with inputs for a bank's blocks; ``text`` is its tokenizer.

    ``module`` computes its losses, on ``device``: that of the program itself, or one that is there for training.
    """

    program: Program
    shape: BankShape
    text: Text
    module: GraphModule | None = None
    device: torch.device = CPU

    @classmethod
    def load(cls, model: str, manifest: BankManifest, *, remote_code: bool = False) -> Learner:
        """Capture the model of a bank, and give it the bank's inputs.

        Raises ``MemcError`` as ``capture_source``, and E308 for a model without a tokenizer, E310 for one that is not
        the bank's.
        """
        captured = capture_source(model, remote_code=remote_code)
        require_model(manifest, captured.program.model.digest, model)
        file = next((path for path in captured.tokenizer_files if path.name == "tokenizer.json"), None)
        if file is None:
            raise MemcError("E308", "model has no tokenizer", model, "give one that has a tokenizer.json beside it")
        program = captured.program
        if captured.weights is not None:
            program = materialize(program, captured.weights)
        return cls(with_bank(raise_program(program).program, manifest.shape), manifest.shape, Text(Path(file).parent))

    @contextmanager
    def learning(self, device: torch.device, products: torch.dtype | None) -> Iterator[Learner]:
        """Yield the same model on ``device``, its products with the model's weights in the type of ``products``."""
        with lent(device, self.program):
            rounded = Rounded(products) if products is not None else None
            yield replace(self, module=narrowed(self.program, rounded, ()), device=device)

    def first_values(self, cluster: Cluster, seed: int, scale: Tensor) -> Tensor:
        """Return an untrained block ``[layers, 3, units, width]``: gate and up random, down zero.

        ``scale [layers]`` is the root mean square of each layer's input: what gate and up give of it is about 1.
        """
        level = len(cluster) - 1
        rng = np.random.default_rng([seed, level + 1, self.shape.number(cluster)])
        block = torch.from_numpy(rng.standard_normal(self.shape.record_shape(level), np.float32))
        block /= scale[:, None, None, None] * self.shape.width**0.5
        block[:, 2] = 0
        return block

    @torch.no_grad()
    def input_scale(self, sequences: Sequence[PackedSequence]) -> Tensor:
        """Return the root mean square of what each layer's block is given, ``[layers]``, over some sequences."""
        nodes = {}
        for node in self.program.module.graph.nodes:
            spec = op_spec(node.target) if node.op == "call_function" else None
            if spec is not None and spec.name == "bank_ffn":
                nodes[str(arguments(node)["block"].target)] = arguments(node)["x"].name
        teacher = Teacher(self.program, [[nodes[f"bank_{layer}"]] for layer in self.shape.layers])
        squares = torch.zeros(len(self.shape.layers), dtype=torch.float64)
        values = 0

        def add(index: int, found: dict[str, Tensor]) -> None:
            (x,) = found.values()
            squares[index] += x.double().square().sum()

        for sequence in sequences[:MEASURED]:
            teacher.run(*_batch(sequence), add)
            values += len(sequence.tokens) * self.shape.width
        return (squares / values).sqrt().clamp_min(1e-6).float()

    def loss(self, sequence: PackedSequence, block: Tensor | None) -> Tensor:
        """Return the summed cross-entropy of a sequence's next tokens with a block, None for none."""
        tokens, positions = (ids.to(self.device) for ids in _batch(sequence))
        if block is None:
            fetched = self.program.nothing_fetched(1, self.device)
        else:
            by_name = {f"bank_{layer}": block[i][None] for i, layer in enumerate(self.shape.layers)}
            fetched = tuple(by_name[spec.name] for spec in self.program.fetched)
        module = self.module or self.program.module
        logits = module(tokens, positions, *fetched, *self.program.new_state(1, self.device))[0]
        follows = positions[0, 1:] > 0
        return functional.cross_entropy(logits[0, :-1][follows].float(), tokens[0, 1:][follows], reduction="sum")


def with_bank(program: Program, shape: BankShape) -> Program:
    """Give a raised program an input for the blocks of each of the bank's layers, and freeze it.

    Raises ``MemcError`` E310 when it has other layers.
    """
    load_kernels()
    make = load_plugin("memc.passes", "memory_bank")
    pass_: Pass = make(ranks=":".join(map(str, shape.ranks)), layers=f"[{','.join(map(str, shape.layers))}]")
    plan = pass_.plan(program, get_target("cpu"))
    if sorted(site.layer for site in plan.sites) != list(shape.layers):
        reason = next((f": {rejection.reason}" for rejection in plan.rejections), "")
        raise MemcError("E310", f"model has not the layers of the bank{reason}", program.model.source)
    rewritten, _ = pass_.apply(program, plan)
    rewritten.module.requires_grad_(False)
    return rewritten


def next_tokens(sequence: PackedSequence) -> int:
    """Return how many tokens of a sequence follow another of their passage."""
    return int((sequence.positions > 0).sum())


def _batch(sequence: PackedSequence) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(sequence.tokens)[None], torch.from_numpy(sequence.positions)[None]
