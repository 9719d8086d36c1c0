"""Recipes: what to do to a model, as data that can be kept, sent and run again."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from memc.arguments import LARGEST, LARGEST_SEED
from memc.errors import MemcError
from memc.plugins import did_you_mean

if TYPE_CHECKING:
    from memc.pipeline import Pass

Weights = Literal["fp32", "fp16", "bf16", "int8", "int4"]
WEIGHTS: tuple[Weights, ...] = ("fp32", "fp16", "bf16", "int8", "int4")

Metric = Literal[
    "perplexity_ratio",
    "perplexity_ratio_to_window",
    "kl_mean",
    "kl_ratio_to_window",
    "decode_time_ratio",
    "prompt_time_ratio",
]

Onto = Literal["result", "original"]
Shard = Literal["auto", "always", "never"]

Whole = Annotated[int, Field(le=LARGEST)]

Location = tuple[str | int, ...]
MAX_BYTES = 1 << 16


class Train(BaseModel):
    """The ``train`` section: how what the passes add is trained, and what they take away recovered.

    The defaults are what was measured to work on a model of 135M parameters. Learning rates are peaks. ``sampled`` is
    the share of the sequences that are sampled from the original itself, which keep it from forgetting what the data
    do not have.
    """

    model_config = ConfigDict(extra="forbid")

    length: Whole = Field(default=512, ge=8, description="tokens of a training sequence")
    batch: Whole = Field(default=1, ge=1, description="sequences of a step")
    transfer: float = Field(default=0.7, ge=0, le=1, description="share of the tokens for block-wise transfer, if any")
    rate: float = Field(default=1e-2, gt=0, description="learning rate of new parameters in transfer")
    adapters: Whole = Field(default=8, ge=0, description="rank of the adapters; 0 trains every parameter in recovery")
    adapter_rate: float = Field(default=5e-4, gt=0, description="learning rate of adapters, or of every parameter")
    onto: Onto = Field(default="result", description="what adapters change: `result`, or the `original` (LoRAM)")
    memory_rate: float = Field(default=1e-3, gt=0, description="learning rate of new parameters in recovery")
    accumulate: Whole = Field(default=2, ge=1, description="batches of a recovery step")
    text: float = Field(default=0.0, ge=0, description="weight of cross-entropy on the text beside the KL")
    sampled: float = Field(default=0.25, ge=0, lt=1, description="share of sequences sampled from the original")
    guard: float = Field(default=0.05, gt=0, le=0.5, description="share of the data that is held out")
    shard: Shard = Field(
        default="auto",
        description="whether processes share parameters out: `auto` where they do not fit a device, `always`, `never`",
    )


class Verify(BaseModel):
    """The ``verify`` section: ``budgets`` maps a metric to the most it may be, over what the passes declare.

    Metrics: ``perplexity_ratio``, ``perplexity_ratio_to_window``, ``kl_mean`` (nats per token), ``kl_ratio_to_window``,
    and where a pass is there to be faster ``decode_time_ratio`` and ``prompt_time_ratio`` (to the original).
    """

    model_config = ConfigDict(extra="forbid")

    budgets: dict[Metric, float] = Field(default_factory=dict)


PassEntry = str | Annotated[dict[str, dict[str, Any] | None], Field(min_length=1, max_length=1)]


class Recipe(BaseModel):
    """One recipe. A pass is its spec string, or its name with a mapping of options.

    Unknown keys are refused. ``data`` train what the passes add, recover what they take away, and verify the result;
    ``tokens`` says how many are trained on, 0 for none, and then all of ``data`` is there to verify. ``context`` is in
    tokens. ``fit`` are limits in place of passes, which are chosen to keep them.
    """

    model_config = ConfigDict(extra="forbid")

    recipe: Literal[1]
    summary: str = ""
    passes: list[PassEntry] = Field(default_factory=list)
    fit: str | None = None
    train: Train | None = None
    data: list[str] = Field(default_factory=list)
    tokens: Whole | None = Field(default=None, ge=0)
    weights: Weights | None = None
    context: Whole | None = Field(default=None, ge=1)
    verify: Verify = Field(default_factory=Verify)
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)

    _where: str = PrivateAttr(default="")
    _lines: dict[Location, int] = PrivateAttr(default_factory=dict)

    def specs(self) -> list[str]:
        """Return the spec string of every pass, in order."""
        return [entry if isinstance(entry, str) else _spec(*next(iter(entry.items()))) for entry in self.passes]

    def build(self) -> list[Pass]:
        """Make the passes.

        Raises ``MemcError`` E202 for an unknown pass and E203 for a bad option, with the recipe's line.
        """
        from memc.pipeline import parse_spec

        made = []
        for index, spec in enumerate(self.specs()):
            try:
                made.append(parse_spec(spec))
            except MemcError as error:
                line = self._lines.get(("passes", index))
                place = ", ".join(part for part in (f"{self._where}:{line}" if line else "", error.where) if part)
                raise MemcError(error.code, error.message, place, error.next) from error
        return made

    def resolved(
        self,
        *,
        passes: Sequence[str] = (),
        data: Sequence[str] = (),
        tokens: int | None = None,
        weights: str | None = None,
        context: int | None = None,
        seed: int | None = None,
        fit: str | None = None,
    ) -> Recipe:
        """Return the recipe with what the command line adds: passes at the end, the rest in place of its own.

        Raises ``MemcError`` E201 for a value that a recipe may not hold.
        """
        given = {
            "data": list(data) or None,
            "tokens": tokens,
            "weights": weights,
            "context": context,
            "seed": seed,
            "fit": fit,
        }
        values = self.model_dump() | {key: value for key, value in given.items() if value is not None}
        values["passes"] = [*self.passes, *passes]
        result = _validate(values, "command line", {})
        result._where, result._lines = self._where, self._lines
        return result

    def to_yaml(self) -> str:
        """Render the recipe: two that say the same give the same text, and reading it gives the recipe back."""
        values = self.model_dump(exclude_none=True, exclude_defaults=True)
        text: str = yaml.safe_dump({"recipe": self.recipe, **values}, sort_keys=False, width=100)
        return text


def parse_recipe(text: str, where: str = "recipe") -> Recipe:
    """Read a recipe from YAML text; ``where`` names it in errors.

    Raises ``MemcError`` E201 with line and suggestion for anything that is not a recipe.
    """
    try:
        for event in yaml.parse(text):
            if isinstance(event, yaml.AliasEvent):
                raise MemcError("E201", "a recipe has no aliases", _place(where, event.start_mark), "write it out")
        node = yaml.compose(text, yaml.SafeLoader)
        lines = dict(_lines(node, (), where)) if node else {}
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        place = _place(where, getattr(error, "problem_mark", None))
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise MemcError("E201", f"recipe is not valid YAML: {problem}", place) from error
    if not isinstance(values, Mapping):
        raise MemcError("E201", "a recipe is a mapping of keys", f"{where}:1", "start it with: recipe: 1")
    recipe = _validate(values, where, lines)
    recipe._where, recipe._lines = where, lines
    return recipe


def load_recipe(name: str) -> Recipe:
    """Read a recipe by the name of a known one, or from a file.

    What looks like a file (has a separator or ends in .yaml or .yml) is one. Raises ``MemcError`` E202 for an unknown
    name or missing file, E201 for a recipe that is not right.
    """
    is_file = os.sep in name or name.endswith((".yaml", ".yml"))
    path = Path(name) if is_file else recipe_paths().get(name)
    if path is None:
        hint = did_you_mean(name, recipe_paths())
        raise MemcError("E202", f"unknown recipe {name!r}", next=f"{hint} (memc recipes lists them)")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise MemcError("E201", "recipe is larger than 64 KiB", str(path))
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MemcError("E202", "recipe file not found", str(path), "memc recipes lists the named ones") from None
    except (OSError, UnicodeDecodeError) as error:
        raise MemcError("E201", f"recipe cannot be read: {error}", str(path)) from error
    return parse_recipe(text, str(path) if is_file else name)


def recipe_paths() -> dict[str, Path]:
    """Return the file of every named recipe: the built-in ones, then those in the user's folder, which win."""
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    folders = (Path(str(files("memc"))) / "recipes", config / "memc" / "recipes")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def _place(where: str, mark: Any) -> str:
    return f"{where}:{mark.line + 1}" if mark else where


def _spec(name: str, options: Mapping[str, Any] | None) -> str:
    parts = [f"{key}={_value(value)}" for key, value in (options or {}).items()]
    return name + (":" + ",".join(parts) if parts else "")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(_value(item) for item in value) + "]"
    return "none" if value is None else str(value)


def _lines(node: yaml.Node, path: Location, where: str) -> Iterator[tuple[Location, int]]:
    """Yield the line of every key and item; refuse keys that appear twice, which YAML would let pass."""
    yield path, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                raise MemcError("E201", f"key {name!r} appears twice", f"{where}:{line}", "remove one")
            seen.add(name)
            yield from _lines(value, (*path, name), where)
            yield (*path, name), line
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _lines(item, (*path, index), where)


def _validate(values: Mapping[str, Any], where: str, lines: Mapping[Location, int]) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise _refusal(error.errors(), where, lines) from error


def _refusal(errors: Sequence[Any], where: str, lines: Mapping[Location, int]) -> MemcError:
    """Turn pydantic's findings into the one line that matters most: an unknown key before a wrong value."""
    first = min(errors, key=lambda e: (e["type"] != "extra_forbidden", e["type"] != "missing"))
    path = tuple(first["loc"])
    while path and path not in lines:
        path = path[:-1]
    place = f"{where}:{lines[path]}" if path in lines else where
    name = ".".join(str(part) for part in path) or str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"][:-1])
        key = str(first["loc"][-1])
        return MemcError("E201", f"unknown key {key!r}", place, did_you_mean(key, known))
    if first["type"] == "missing":
        return MemcError("E201", f"key {str(first['loc'][-1])!r} is missing", place, "add the line: recipe: 1")
    if path[:1] == ("passes",):
        hint = "write NAME:option=value or {NAME: {option: value}}"
        return MemcError("E201", "a pass is a spec or one name with its options", place, hint)
    hint = f"it is now {first['input']!r}"
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        hint = did_you_mean(first["input"], re.findall(r"'([^']+)'", first["ctx"]["expected"]))
    return MemcError("E201", f"key {name!r}: {first['msg'].lower()}", place, hint)


def _known_keys(path: Sequence[str | int]) -> list[str]:
    sections: dict[str, type[BaseModel]] = {"train": Train, "verify": Verify}
    model = sections.get(str(path[0]), Recipe) if path else Recipe
    return list(model.model_fields)
