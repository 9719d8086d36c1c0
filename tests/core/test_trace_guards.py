"""What memc reads from the guards that an export complains about."""

import pytest

from memc.frontend.trace import _is_fact, _tighter_bounds

T = "L['args'][0].size()[1]"
B = "L['args'][0].size()[0]"


def message(guard: str) -> str:
    return f"  - Not all values of T = {T} in the specified range satisfy the generated guard {guard}."


@pytest.mark.parametrize("guard", [f"min(10*{T}, 20*{T}) == (10*{T})", f"{T} >= 1", f"{T}*2 % 2 == 0"])
def test_guard_that_holds_for_every_size_is_no_bound(guard: str) -> None:
    assert _is_fact(guard)
    assert _tighter_bounds(message(guard), {"T": None, "B": None}) is None


@pytest.mark.parametrize(
    "guard",
    [
        f"{T} <= 20",
        f"{T} <= 5000000",
        f"{T} != 300",
        f"3*{T} != 1200",
        f"min(10*{T}, 200) == (10*{T})",
        f"{B} == {T}",  # one name for two sizes would make it true
        f"{T} == {T.replace('[0]', '[2]', 1)}",
        "__import__('os').getpid() > 0",
        f"[{T}] != []",
    ],
)
def test_guard_that_some_size_breaks_or_that_is_no_arithmetic_is_no_fact(guard: str) -> None:
    assert not _is_fact(guard)


def test_bound_is_read_beside_a_fact() -> None:
    both = message(f"min(10*{T}, 20*{T}) == (10*{T})") + "\n" + message(f"{T} <= 20")
    assert _tighter_bounds(both, {"T": None}) == ({"T": 20}, 20)
