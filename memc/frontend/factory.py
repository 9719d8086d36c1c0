"""A model that the user's own Python makes: ``python:package.module:factory``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memc.errors import MemcError
from memc.frontend.huggingface import model_info, trace_model
from memc.frontend.module import capture, module_digest
from memc.frontend.source import Captured
from memc.frontend.trace import capture_failure

PREFIX = "python:"


def capture_factory(text: str) -> Captured:
    """Capture what ``factory()`` returns: a module on tokens, or ``(module, example_inputs)``.

    The module is looked for in the working directory too. Its own parameters become the program's.

    Raises ``MemcError`` E301 when there is no such function and E305 when it fails or returns something else.
    """
    made = _call(_find(text), text)
    module, examples = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module):
        hint = "return an nn.Module or (nn.Module, example_inputs)"
        raise MemcError("E305", f"factory returned {type(module).__name__}", text, hint)
    module.eval()
    if examples is None and hasattr(module, "config") and hasattr(module, "main_input_name"):
        config: Any = module.config
        return Captured(trace_model(module, model_info(config, text, module_digest(module))), None, config.to_dict())
    if examples is None:
        examples = torch.arange(14).remainder(2).view(2, 7)
    inputs = (examples,) if isinstance(examples, Tensor) else tuple(examples)
    return Captured(capture(module, inputs, name=text), None, {})


def _find(text: str) -> Callable[[], Any]:
    name, _, attribute = text.removeprefix(PREFIX).partition(":")
    form = "write python:package.module:factory"
    if not name or not attribute:
        raise MemcError("E301", "a Python model is named python:package.module:factory", text, form)
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        where = "the working directory or the environment"
        raise MemcError("E301", f"no module {error.name!r} in {where}", text, form) from error
    except Exception as error:
        raise capture_failure(error, text, "make the factory work on its own first") from error
    finally:
        sys.path.remove(here)
    found = getattr(module, attribute, None)
    if not callable(found):
        raise MemcError("E301", f"module {name!r} has no function {attribute!r}", text, form)
    factory: Callable[[], Any] = found
    return factory


def _call(factory: Callable[[], Any], text: str) -> Any:
    try:
        return factory()
    except Exception as error:
        raise capture_failure(error, text, "make the factory work on its own first") from error
