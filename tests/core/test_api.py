"""The names of the package are the functions that the README shows, whatever has been imported before."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import import_module

import memc


def test_public_names_are_what_they_say() -> None:
    for module in ("memc.api", "memc.conversion", "memc.frontend"):
        import_module(module)
    for name in ("analyse", "capture", "convert", "inspect", "load"):
        assert inspect.isfunction(getattr(memc, name)), name
    for name in ("Program", "Session", "MemcError"):
        assert inspect.isclass(getattr(memc, name)), name


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, memc; assert not {'torch', 'numpy', 'onnxruntime', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
