"""Targets: the hardware an artifact is made for, as data."""

from __future__ import annotations

import json
import os
import tomllib
from functools import cache
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memc.errors import MemcError
from memc.partial import write_whole
from memc.plugins import did_you_mean


class Target(BaseModel):
    """One hardware model. Rates are peaks of the whole device; what is not known is None."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str
    kind: str = Field(pattern="^(cpu|gpu|source)$")
    backend: str
    instruction_set: str
    memory_bytes: int | None = None
    memory_bandwidth: float | None = Field(default=None, description="bytes per second")
    state_bandwidth: float | None = Field(
        default=None, description="bytes of state per second that attention gets through, where less than of memory"
    )
    cache_bytes: int | None = None
    disk_bandwidth: float | None = Field(default=None, description="bytes per second")
    flops: dict[str, float] = Field(default_factory=dict, description="peak operations per second by weight type")
    prompt_flops: dict[str, float] = Field(
        default_factory=dict, description="the same of many tokens at once, where it is more than of a single one"
    )
    prompt_ops: dict[str, float] = Field(
        default_factory=dict, description="the same of dialect ops that get through less of it than products, by name"
    )
    launch_overhead: float = Field(default=0.0, description="seconds per kernel")


def user_folder() -> Path:
    """Return the folder of the user's own targets."""
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return config / "memc" / "targets"


def _folders() -> list[Path]:
    return [Path(str(files("memc"))) / "targets", user_folder()]


@cache
def targets() -> dict[str, Target]:
    """Return every target by name: the built-in ones, then the user's, which win.

    Raises ``MemcError`` E201 for a target file that does not parse.
    """
    found: dict[str, Target] = {}
    for folder in _folders():
        for path in sorted(folder.glob("*.toml")):
            try:
                target = Target.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
            except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValidationError) as error:
                reason = str(error).splitlines()[0]
                raise MemcError("E201", f"target file does not parse: {reason}", where=str(path)) from error
            found[target.name] = target
    return found


def get_target(name: str) -> Target:
    """Return the target called ``name``; raises ``MemcError`` E202 with a suggestion otherwise."""
    if name not in targets():
        raise MemcError("E202", f"unknown target {name!r}", next=did_you_mean(name, targets()))
    return targets()[name]


def write_target(target: Target, path: Path) -> None:
    """Write a target as a file that is read as one. Raises ``MemcError`` E502 where that cannot be."""
    values = target.model_dump(exclude_none=True)
    tables = {name: values.pop(name) for name in ("flops", "prompt_flops", "prompt_ops")}
    # A text of JSON is one of TOML, and so is a number.
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    for name, rates in tables.items():
        lines += ["", f"[{name}]", *(f"{weights} = {json.dumps(rate)}" for weights, rate in rates.items())]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, "\n".join(lines) + "\n")
    except OSError as error:
        raise MemcError("E502", f"the target cannot be written: {error.strerror}", str(path), "give -o FILE") from error
    targets.cache_clear()
