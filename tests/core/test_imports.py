"""Every module can be the first that a process imports: no circle of imports that only some order hides."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import memc

PROBE = """
import importlib, sys
names = sys.argv[1:]
kept = ("memc.dialect", "memc.kernels", "memc.passes", "memc.backends")
failed = []
for name in names:
    for loaded in [one for one in sys.modules if one.startswith("memc.") and not one.startswith(kept)]:
        del sys.modules[loaded]
    try:
        importlib.import_module(name)
    except ImportError as error:
        if "circular" in str(error):
            failed.append(f"{name}: {error}")
print("\\n".join(failed))
"""

ROOMS = ("artifact", "bank", "cli", "conversion", "data", "evaluate", "fit", "report", "runtime", "serve")
"""Those whose modules define no ops: these are defined once in a process, so that what defines them stays."""


@pytest.mark.parametrize("room", ROOMS)
def test_no_module_needs_another_to_be_imported_before_it(room: str) -> None:
    found = __import__(f"memc.{room}", fromlist=["_"])
    names = [f"memc.{room}"]
    if hasattr(found, "__path__"):
        names += [one.name for one in pkgutil.walk_packages(found.__path__, f"memc.{room}.")]
    done = subprocess.run([sys.executable, "-c", PROBE, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stdout.strip(), done.stdout + done.stderr[-2000:]


def test_the_package_is_what_is_probed() -> None:
    assert {one.name for one in pkgutil.iter_modules(memc.__path__)} >= set(ROOMS)
