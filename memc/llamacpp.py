"""A GGUF file in llama.cpp, through its Python binding, as something to time artifacts against.

The binding is ``llama-cpp-python``, which nothing else of memc needs: of its documented interface this uses ``Llama``
with ``eval``, ``reset``, ``save_state``, ``tokenize``, ``n_ctx`` and ``n_vocab``.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from memc.errors import MemcError

PREFIX = "llama.cpp:"
"""What a file is written after that llama.cpp is to run."""


class LlamaCpp:
    """One file in llama.cpp on the CPU, one sequence at a time; see :class:`memc.bench.Timed`."""

    def __init__(self, path: str | Path, tokens: int, threads: int | None = None) -> None:
        """Load a file with room for ``tokens``; ``threads`` None leaves their number to llama.cpp.

        Raises ``MemcError``: E301 where there is no such file, E302 where llama.cpp cannot read it, E602 without the
        binding.
        """
        binding = require_binding()
        if not Path(path).is_file():
            raise MemcError("E301", "file not found", str(path))
        options: dict[str, Any] = {"n_ctx": tokens, "n_gpu_layers": 0, "verbose": False}
        if threads is not None:
            options |= {"n_threads": threads, "n_threads_batch": threads}
        try:
            self._model = binding.Llama(model_path=str(path), **options)
        except (ValueError, RuntimeError, OSError) as error:
            raise MemcError("E302", f"llama.cpp cannot read the file: {error}", str(path)) from error
        self.source = f"{PREFIX}{path} (llama-cpp-python {getattr(binding, '__version__', '?')})"

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary."""
        return int(self._model.n_vocab())

    @property
    def capacity(self) -> int:
        """Most tokens of a sequence."""
        return int(self._model.n_ctx())

    def bytes_at(self, tokens: int) -> int:
        """Nothing more: the cells of all that fits were made when the file was loaded."""
        return 0

    def start(self, tokens: Sequence[int], room: int) -> None:
        """Run a prompt from nothing; the room was settled when the file was loaded."""
        self._model.reset()
        self._model.eval(tokens)

    def step(self, token: int) -> None:
        """Run one token after those before."""
        self._model.eval([token])

    @property
    def state_bytes(self) -> int:
        """Bytes of the state of the sequence as llama.cpp saves it: the cells in use."""
        return int(self._model.save_state().llama_state_size)

    def cut(self, text: str) -> list[int]:
        """Return the tokens of a text, with nothing before it."""
        return list(self._model.tokenize(text.encode(), add_bos=False))


def require_binding() -> ModuleType:
    """Import the binding; raises ``MemcError`` E602 where it is not installed, with what installs it."""
    try:
        return importlib.import_module("llama_cpp")
    except ModuleNotFoundError as error:
        if error.name != "llama_cpp":
            raise
        raise MemcError("E602", "llama-cpp-python is not installed", next="pip install llama-cpp-python") from None
