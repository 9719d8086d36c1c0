"""What torch-pruning chooses of the feed-forward channels of a Llama, given gradients on the same calibration text.

Its dependency graph is traced on the model as transformers loads it, and its grouped first-order Taylor importance
(``tp.importance.GroupTaylorImportance``, with the gradients of all sequences summed) ranks the channels of each
network. As many of each go as in the other variants; the package itself takes them out, so that what is left can be
held against the same cuts made by memc.

torch-pruning is no dependency: ``pip install --no-deps --target FOLDER torch-pruning`` and PYTHONPATH will do.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Advance = Callable[[int], None]


def installed() -> bool:
    """Tell whether torch-pruning can be imported."""
    return importlib.util.find_spec("torch_pruning") is not None


def load(gguf: Path) -> torch.nn.Module:
    """Load a model from a GGUF file as transformers does, without a cache, which stands in the way of tracing."""
    from transformers import AutoModelForCausalLM

    module: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager"
    )
    module.config.use_cache = False
    return module.eval()


def prune_channels(
    module: torch.nn.Module, counts: Mapping[int, int], tokens: Tensor, advance: Advance
) -> dict[int, tuple[int, ...]]:
    """Remove so many channels from the networks of some layers, in place; returns which of each layer.

    Gradients are those of the cross-entropy of the next tokens of ``tokens [N,T]``, a sequence at a time.
    """
    import torch_pruning as tp

    for row in tokens:
        logits = module(input_ids=row[None]).logits[0, :-1]
        functional.cross_entropy(logits.float(), row[1:]).backward()
        advance(1)
    graph = tp.DependencyGraph().build_dependency(
        module, {"input_ids": tokens[:1, :8]}, output_transform=lambda output: output.logits
    )
    importance, removed = tp.importance.GroupTaylorImportance(), {}
    for layer, count in counts.items():
        network = _layers(module)[layer].mlp
        every = list(range(network.gate_proj.out_features))
        group = graph.get_pruning_group(network.gate_proj, tp.prune_linear_out_channels, idxs=every)
        gone = importance(group).argsort(stable=True)[:count].tolist()
        chosen = graph.get_pruning_group(network.gate_proj, tp.prune_linear_out_channels, idxs=gone)
        if not graph.check_pruning_group(chosen):
            raise RuntimeError(f"torch-pruning does not take {count} channels of layer {layer}")
        chosen.prune()
        removed[layer] = tuple(sorted(gone))
    return removed


@torch.no_grad()
def logits_of(module: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Return the logits ``[N,T,V]``."""
    logits: Tensor = module(input_ids=tokens).logits
    return logits


def _layers(module: Any) -> Any:
    return module.model.layers
