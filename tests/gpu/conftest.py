"""Tests that need a GPU say so where there is none."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="torch sees no GPU on this machine")
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(skip)
