"""memc: a compiler for pretrained transformers.

A model goes in, chosen attention and feed-forward blocks become memory-augmented forms, and an artifact lowered
for one hardware target comes out with a report of what changed, what it cost and how far the outputs moved.

The names below are imported on first use, so that ``import memc`` alone loads neither torch nor onnxruntime.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "capture": "memc.frontend",
    "analyse": "memc.api",
    "inspect": "memc.api",
    "convert": "memc.api",
    "load": "memc.runtime",
    "Program": "memc.program",
    "Session": "memc.runtime",
    "MemcError": "memc.errors",
}

__all__ = ["MemcError", "Program", "Session", "__version__", "analyse", "capture", "convert", "inspect", "load"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'memc' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
