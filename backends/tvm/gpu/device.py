"""The GPU of this machine, asked through its driver. Imports neither torch nor TVM."""

from __future__ import annotations

import ctypes
from functools import cache

DRIVER = "libcuda.so.1"
MAJOR, MINOR = 75, 76
"""Numbers of the attributes by which the driver tells a device's compute capability."""


@cache
def capability() -> tuple[int, int] | None:
    """Return the compute capability of the first GPU, None where there is no driver or no GPU."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return None
    device, found = ctypes.c_int(), [ctypes.c_int(), ctypes.c_int()]
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for attribute, value in zip((MAJOR, MINOR), found, strict=True):
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
    return found[0].value, found[1].value


def runs_on_gpu(arch: str) -> bool:
    """Tell whether the GPU of this machine runs binaries for ``arch``, as in ``sm_90``: one of its generation does."""
    found = capability()
    if found is None:
        return False
    major, minor = divmod(int(arch.removeprefix("sm_")), 10)
    return found[0] == major and found[1] >= minor
