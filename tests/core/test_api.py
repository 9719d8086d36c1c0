"""The names of the package are the functions that the README shows, and say what is wrong with what they are given."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import memc
from memc import api
from memc.conversion.request import Request
from memc.errors import MemcError


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


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Have a list of what is asked of conversions, in place of conversions."""
    requests: list[Request] = []
    monkeypatch.setattr(api, "convert_model", lambda request, progress: requests.append(request))
    return requests


def test_one_text_needs_no_list(asked: list[Request]) -> None:
    memc.convert("model", "out", passes="window:window=8", data="x.txt")
    memc.convert("model", Path("out"), passes=["window:window=8"], data=[Path("x.txt")], recipe=Path("dense"))
    for request in asked:
        assert request.recipe.specs() == ["window:window=8"] and request.recipe.data == ["x.txt"]
        assert request.out == Path("out")
    memc.convert("model", "out", contexts=512)
    assert asked[-1].contexts == (512,)


@pytest.mark.parametrize(
    "options",
    [
        {"out": None},
        {"out": 3},
        {"passes": 3},
        {"passes": ["window", 3]},
        {"data": 3},
        {"data": [None]},
        {"recipe": 3},
        {"target": None},
        {"backend": 3},
        {"threads": 0},
        {"threads": "2"},
        {"threads": 10**14},
        {"tune": -1},
        {"contexts": "512"},
        {"contexts": [0]},
        {"contexts": [10**20]},
    ],
)
def test_an_argument_of_another_kind_is_refused_by_name(options: dict[str, Any], asked: list[Request]) -> None:
    with pytest.raises(MemcError) as caught:
        memc.convert(**{"model": "model", "out": "out", **options})
    assert caught.value.code == "E200" and caught.value.next and next(iter(options)) in caught.value.message
    assert not asked


@pytest.mark.parametrize("options", [{"seed": -1}, {"seed": 2**63}, {"tokens": 10**20}, {"context": 10**20}])
def test_a_number_that_a_recipe_may_not_hold_is_refused_by_name(options: dict[str, int], asked: list[Request]) -> None:
    with pytest.raises(MemcError) as caught:
        memc.convert("model", "out", **options)  # type: ignore[arg-type]
    assert caught.value.code == "E201" and next(iter(options)) in caught.value.message and not asked


@pytest.mark.parametrize("model", [None, 3])
def test_what_names_no_model_is_refused(model: Any) -> None:
    for call in (memc.inspect, lambda model: memc.analyse(model, "bigram"), lambda model: memc.convert(model, "out")):
        with pytest.raises(MemcError, match=f"E200 model is {model}"):
            call(model)
    with pytest.raises(MemcError, match="E200 method is None"):
        memc.analyse("model", None)  # type: ignore[arg-type]
