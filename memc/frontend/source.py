"""What capture returns, and where a traced node came from in the user's own code."""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from memc.errors import MemcError
from memc.program import Program
from memc.weights import Weights

# Files that travel with a model into the artifact.
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
    "LICENSE*",
    "README.md",
)
PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.h5", "*.msgpack")
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in [^\n]*\n?(?P<text>[^\n]*)')


@dataclass(frozen=True)
class Captured:
    """A model as it was found: the raw program, its weights, and its files.

    ``weights`` is None when they were not asked for, or when the program already holds them (a module of the user).
    ``config`` is the source's own configuration as JSON values. ``tokenizer_files`` are what generation needs beside
    the graph, the licence and the model card: paths that exist.
    """

    program: Program
    weights: Weights | None
    config: dict[str, Any]
    tokenizer_files: list[Path] = field(default_factory=list)


def side_files(folder: Path) -> list[Path]:
    """Return the files of a model folder that go with its artifact, in the order of ``SIDE_FILES``."""
    return [path for pattern in SIDE_FILES for path in sorted(folder.glob(pattern)) if path.is_file()]


def refuse_pickled(names: Iterable[str], where: str) -> None:
    """Raise ``MemcError`` E304 where the files of a model, by name, hold pickled checkpoints and no safetensors."""
    found = sorted(names)
    pickled = [name for name in found if any(fnmatch(name, pattern) for pattern in PICKLED)]
    if pickled and not any(name.endswith(".safetensors") for name in found):
        hint = "where you trust it, load it with from_pretrained and write safetensors with save_pretrained"
        raise MemcError("E304", f"checkpoint {pickled[0]} is pickled, which can run code", where, hint)


def user_line(stack_trace: str) -> tuple[str, str]:
    """Return ``file.py:line`` and the text of the last frame that is not a library's, both empty if there is none."""
    frames = [(m["file"], m["line"], m["text"].strip()) for m in _FRAME.finditer(stack_trace)]
    for file, line, text in reversed(frames):
        if not is_library(file):
            return f"{Path(file).name}:{line}", text
    return "", ""


def failing_line(error: BaseException) -> str:
    """Return ``path/file.py:line: text`` of the innermost frame of the user's model that an exception went through."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not is_library(frame.filename):
            return f"{frame.filename}:{frame.lineno}: {frame.line or ''}".rstrip(": ")
    found, text = user_line(str(error))
    return f"{found}: {text}" if found else ""


@cache
def is_library(file: str) -> bool:
    """Tell whether a source file is machinery rather than a model: torch, Python, or transformers but its models."""
    if file.startswith("<"):
        return True
    path = Path(file)
    if any(path.is_relative_to(folder) for folder in _machinery()):
        return not path.is_relative_to(_package("transformers") / "models")
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return not installed and path.is_relative_to(sysconfig.get_paths()["stdlib"])


@cache
def _machinery() -> tuple[Path, ...]:
    return (Path(__file__).parent, *(_package(name) for name in ("torch", "transformers", "accelerate")))


@cache
def _package(name: str) -> Path:
    spec = find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else Path(name)
