"""Fit a checkpoint to a Hugging Face model: renamed modules, stacked experts, base-model prefixes, tied names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memc.errors import MemcError
from memc.frontend.graph import first_names
from memc.program import named_tensors
from memc.weights import Recipe, RenamedWeights, Weights, check_kind, check_names


def fit(checkpoint: Weights, module: nn.Module) -> Weights:
    """Present a checkpoint under the model's names, each tensor under its first one.

    Names are converted as transformers itself does for the model; a converted tensor's shape is found on meta.

    Raises ``MemcError`` E303 for tensors that are missing, unknown to the model, of another shape, or of integers where
    the model has none.
    """
    first = first_names(module)
    persistent = set(module.state_dict(keep_vars=True))
    shapes = {name: tuple(value.shape) for name, value in named_tensors(module)}
    found = RenamedWeights(checkpoint, _recipes(checkpoint, module, shapes))
    available = set(found.names())
    canonical: dict[str, Recipe] = {}
    for name, primary in first.items():
        if name in persistent and name in available:
            canonical.setdefault(primary, found.recipes[name])
    required = {first[name] for name in persistent}
    check_names(found, shapes, sorted(required - set(canonical)))
    fitted = RenamedWeights(checkpoint, canonical)
    for name, value in named_tensors(module):
        if name in canonical:
            check_kind(fitted, name, value)
    return fitted


def _recipes(checkpoint: Weights, module: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, Recipe]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(module)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    ignored = [re.compile(p) for p in getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()]
    sources: dict[str, dict[str | None, list[str]]] = {}
    for name in sorted(checkpoint.names(), key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, module.base_model_prefix, shapes)
        if target not in shapes and name in shapes:
            target, pattern = name, None
        if target not in shapes and any(p.search(target) for p in ignored):
            continue
        sources.setdefault(target, {}).setdefault(pattern, []).append(name)
    recipes: dict[str, Recipe] = {}
    for target, groups in sources.items():
        pattern = next(iter(groups))
        if pattern is None:
            recipes[target] = Recipe((groups[None][-1],))
        else:
            build = _Convert(by_pattern[pattern], groups, module.config, target)
            recipes[target] = _converted(build, checkpoint)
    return recipes


class _Convert:
    """Run the operations of one of transformers' converters on the tensors of one target."""

    def __init__(self, converter: Any, groups: dict[str | None, list[str]], config: Any, target: str) -> None:
        self.converter, self.groups, self.config, self.target = converter, groups, config, target
        self.sources = tuple(name for names in groups.values() for name in names)

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the converted tensor; ``tensors`` are those of ``sources``."""
        rest = iter(tensors)
        current: dict[str, Any] = {str(p): [next(rest) for _ in names] for p, names in self.groups.items()}
        for operation in self.converter.operations:
            current = operation.convert(
                current,
                source_patterns=self.converter.source_patterns,
                target_patterns=self.converter.target_patterns,
                full_layer_name=self.target,
                model=None,
                config=self.config,
                missing_keys=None,
            )
        (value,) = current.values()
        result: Tensor = value[0] if isinstance(value, list) else value
        return result.contiguous()


def _converted(build: _Convert, checkpoint: Weights) -> Recipe:
    examples = [torch.empty(checkpoint.shape(name), dtype=torch.float32, device="meta") for name in build.sources]
    try:
        shape = tuple(build(examples).shape)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = f"{build.target!r} cannot be made of {build.sources[0]!r} and its like: {error}"
        raise MemcError(
            "E303", reason, checkpoint.source, "the checkpoint's layout and config.json disagree"
        ) from error
    return Recipe(build.sources, "stack", shape, build)
