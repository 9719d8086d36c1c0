"""What memc knows of the machine that it runs on."""

from __future__ import annotations

from pathlib import Path

import pytest

from memc import machine

FILES = {
    "memory.max": "max\n",
    "user/memory.max": "5000\n",
    "user/one/memory.max": "7000\n",
    "memory/memory.limit_in_bytes": "9223372036854771712\n",
    "memory/box/memory.limit_in_bytes": "4000\n",
    "cpu/box/memory.limit_in_bytes": "1\n",
}


@pytest.fixture
def mounted(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("groups", "limits"),
    [
        ("0::/user/one\n", [7000, 5000]),
        ("0::/\n", []),
        ("0::/gone/elsewhere\n", []),
        ("4:memory:/box\n3:cpu:/box\n0::/\n", [4000, 9223372036854771712]),
        ("4:cpu,memory:/box\n0::/user\n", [4000, 9223372036854771712, 5000]),
    ],
)
def test_limits_of_control_groups_and_of_those_around_them(mounted: Path, groups: str, limits: list[int]) -> None:
    (mounted / "groups").write_text(groups)
    assert machine._limits(mounted / "groups", mounted) == limits


def test_the_least_limit_counts(mounted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total = machine.memory_bytes()
    assert total is not None and total > 1 << 28 and machine._limits(mounted / "none", mounted) == []
    monkeypatch.setattr(machine, "_limits", lambda *_: [1 << 60, 5000])
    assert machine.memory_bytes() == 5000
