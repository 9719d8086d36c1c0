"""Find the transformers configuration that a set of tensors fits, by building models and comparing shapes."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memc.errors import MemcError
from memc.frontend.graph import first_names
from memc.frontend.huggingface import build_empty

Shape = tuple[int, ...]

HINT = "memc generate and memc.load(OUT) run it as it is"

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Fitted:
    """A configuration, its model, empty, and the fields in which it differs from the source's (old and new)."""

    config: Any
    module: nn.Module
    changed: dict[str, tuple[Any, Any]]


def renumbered(names: Sequence[str]) -> tuple[dict[str, str], list[int]]:
    """Number the layers that tensors are named for from 0 on, in order: their new names, and which layers there were.

    A layer's number is the first in a name.
    """
    numbers = sorted({int(found[0]) for name in names if (found := _NUMBER.search(name))})
    new = {str(number): str(index) for index, number in enumerate(numbers)}
    return {name: _NUMBER.sub(lambda m: new[m[0]], name, count=1) for name in names}, numbers


def fit_config(
    config: Any,
    shapes: Mapping[str, Shape],
    layers: Sequence[int],
    dtype: torch.dtype,
    differs: Callable[[nn.Module], str],
    hint: str = HINT,
) -> Fitted:
    """Change as few fields of a configuration as make its model one of tensors ``shapes``.

    What a field means is settled by building the model: a number goes where it takes away the most differences. A bias
    that the model has and ``shapes`` lack is taken to be zero. ``layers`` are those of the source that are left.
    ``differs`` says in what a model of the right tensors computes something else, empty for nothing: ten heads of four
    and four of ten have the same shapes. Raises ``MemcError`` E208 that names what has no place in a model found, with
    ``hint`` for what to do.
    """
    original = build_empty(config, "", dtype=dtype)
    nearest = list[tuple[int, str]]()

    def search(found: Any, module: nn.Module) -> tuple[Any, nn.Module] | None:
        wrong = misfits(module, shapes)
        reason, left = wrong[0] if wrong else differs(module), len(wrong)
        if not reason:
            return found, module
        nearest.append((left, reason))
        if not left:
            return None
        trials = [
            (after, index, *built)
            for index, built in enumerate(_built(found, _edits(found, module, shapes, layers), dtype))
            if (after := len(misfits(built[1], shapes))) < left
        ]
        # The best edit first; where it leads to nothing, the next.
        ends = (search(edited, built) for _, _, edited, built in sorted(trials, key=lambda trial: trial[:2]))
        return next((end for end in ends if end is not None), None)

    end = search(config, original)
    if end is None:
        reason = _uneven(shapes, original) or min(nearest)[1]
        raise MemcError("E208", f"transformers has no model like it: {reason}", next=hint)
    before, after = config.to_dict(), end[0].to_dict()
    changed = {name: (before.get(name), value) for name, value in after.items() if before.get(name) != value}
    return Fitted(*end, changed)


def _built(config: Any, edits: Iterable[Mapping[str, Any]], dtype: torch.dtype) -> Iterator[tuple[Any, nn.Module]]:
    """Yield each edited configuration that has a model, with it."""
    from huggingface_hub.errors import StrictDataclassError

    for fields in edits:
        edited = copy.deepcopy(config)
        try:
            for name, value in fields.items():
                setattr(edited, name, value)
            yield edited, build_empty(edited, "", dtype=dtype)
        except (MemcError, StrictDataclassError, ValueError, TypeError, AttributeError, RuntimeError):
            continue  # values that do not go together: another edit, or this one after another


def _shapes(module: nn.Module) -> dict[str, Shape]:
    return {name: tuple(value.shape) for name, value in module.state_dict(keep_vars=True).items()}


def misfits(module: nn.Module, shapes: Mapping[str, Shape]) -> list[str]:
    """Describe every tensor that a model and ``shapes`` do not agree on; tied ones count once."""
    first = first_names(module)
    own = {first[name]: shape for name, shape in _shapes(module).items()}
    given = {first.get(name, name): shape for name, shape in shapes.items()}
    wrong = [
        f"no {type(module).__name__} has {name} {list(shape)}"
        for name, shape in given.items()
        if own.get(name) != shape
    ]
    absent = [name for name in own if name not in given and not name.endswith(".bias")]
    return wrong + [f"{name} is not there" for name in absent]


def _uneven(shapes: Mapping[str, Shape], original: nn.Module) -> str:
    """Say in which layers tensors differ that were alike in the original, empty where there are none."""
    before = _shapes(original)
    alike: dict[str, tuple[str, Shape]] = {}
    for name, shape in shapes.items():
        other, found = alike.setdefault(_NUMBER.sub("*", name, count=1), (name, shape))
        if found != shape and before.get(name) == before.get(other):
            return f"{other} is {list(found)} and {name} {list(shape)}, a configuration has one size for all layers"
    return ""


def _edits(
    config: Any, module: nn.Module, shapes: Mapping[str, Shape], layers: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Yield the changes of a field, or of those that go together, that could take differences away."""
    own = _shapes(module)
    ratios = {
        (before, after)
        for name, shape in shapes.items()
        if len(own.get(name, ())) == len(shape)
        for before, after in zip(own[name], shape, strict=True)
        if before != after
    }
    fields = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    numbers = {name: value for name, value in fields.items() if type(value) is int and value > 0}
    depth = max(layers, default=-1) + 1
    for name, value in numbers.items():
        for before, after in sorted(ratios):
            if value * after % before == 0:
                yield {name: value * after // before}
        if value >= depth > 0 and len(layers) < value:
            lists = {n: v for n, v in fields.items() if isinstance(v, list) and len(v) == value}
            yield {name: len(layers), **{n: [v[i] for i in layers] for n, v in lists.items()}}
    if any(name.endswith(".bias") and name not in own for name in shapes):
        for name, flag in fields.items():
            if flag is False and "bias" in name:
                yield {name: True}
