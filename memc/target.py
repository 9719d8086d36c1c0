"""Targets: the hardware an artifact is made for, as data."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memc.errors import MemcError
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
    cache_bytes: int | None = None
    disk_bandwidth: float | None = Field(default=None, description="bytes per second")
    flops: dict[str, float] = Field(default_factory=dict, description="peak operations per second by weight type")
    launch_overhead: float = Field(default=0.0, description="seconds per kernel")


def _folders() -> list[Path]:
    import os

    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return [Path(str(files("memc"))) / "targets", config / "memc" / "targets"]


@cache
def targets() -> dict[str, Target]:
    """Return every target by name: the built-in ones, then the user's, which win.

    Raises ``MemcError`` E201 for a target file that does not parse.
    """
    found: dict[str, Target] = {}
    for folder in _folders():
        for path in sorted(folder.glob("*.toml")):
            try:
                target = Target.model_validate(tomllib.loads(path.read_text()))
            except (tomllib.TOMLDecodeError, ValidationError) as error:
                reason = str(error).splitlines()[0]
                raise MemcError("E201", f"target file does not parse: {reason}", where=str(path)) from error
            found[target.name] = target
    return found


def get_target(name: str) -> Target:
    """Return the target called ``name``; raises ``MemcError`` E202 with a suggestion otherwise."""
    if name not in targets():
        raise MemcError("E202", f"unknown target {name!r}", next=did_you_mean(name, targets()))
    return targets()[name]
