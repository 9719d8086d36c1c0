"""Recipes: reading, refusing, resolving."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memc.errors import MemcError
from memc.recipe import MAX_BYTES, load_recipe, parse_recipe, recipe_paths

FULL = """\
recipe: 1
summary: everything
passes:
  - window:window=64
  - linearize: {window: 32, keep: [0, 3], update: gated_delta}
data: [a.txt]
tokens: 100
weights: int8
context: 4096
verify:
  budgets: {perplexity_ratio: 1.2}
seed: 7
"""


def test_every_key_is_read() -> None:
    recipe = parse_recipe(FULL)
    assert recipe.specs() == ["window:window=64", "linearize:window=32,keep=[0,3],update=gated_delta"]
    assert (recipe.weights, recipe.context, recipe.tokens, recipe.seed) == ("int8", 4096, 100, 7)
    assert recipe.verify.budgets == {"perplexity_ratio": 1.2}


def test_text_round_trips() -> None:
    text = parse_recipe(FULL).to_yaml()
    assert parse_recipe(text).to_yaml() == text


@given(st.integers(1, 10**6), st.integers(0, 2**31), st.sampled_from(["fp32", "int4"]), st.integers(1, 4096))
def test_resolved_recipes_round_trip(context: int, seed: int, weights: str, window: int) -> None:
    recipe = parse_recipe(FULL).resolved(
        passes=[f"window:window={window}"], context=context, seed=seed, weights=weights
    )
    again = parse_recipe(recipe.to_yaml())
    assert again.specs()[-1] == f"window:window={window}"
    assert again.to_yaml() == recipe.to_yaml()


@pytest.mark.parametrize("name", ["long-context", "streaming", "dense", "prune-then-remember"])
def test_built_in_recipes_build(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.summary
    assert len(recipe.build()) == len(recipe.passes)


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("recipe: 1\npases: []\n", "f:2", "did you mean 'passes'?"),
        ("recipe: 1\nverify:\n  budgts: {}\n", "f:3", "did you mean 'budgets'?"),
        ("recipe: 1\nverify:\n  budgets: {perplexity: 1}\n", "f:3", "did you mean 'perplexity_ratio"),
        ("recipe: 1\ntrain: {steps: 3}\n", "f:2", "unknown key 'steps'"),
        ("recipe: 2\n", "f:1", "input should be 1"),
        ("passes: []\n", "f:1", "recipe: 1"),
        ("recipe: 1\ncontext: -3\n", "f:2", "greater than or equal to 1"),
        ("recipe: 1\nweights: int5\n", "f:2", "did you mean 'int"),
        ("recipe: 1\nseed: 1\nseed: 2\n", "f:3", "twice"),
        ("recipe: 1\npasses:\n - a\n - {a: {}, b: {}}\n", "f:4", "one name with its options"),
        ("recipe: 1\npasses: [3]\n", "f:2", "a pass is"),
        ("recipe: 1\npasses: &x [*x]\n", "f:2", "aliases"),
        ("[1", "f:1", "not valid YAML"),
        ("", "f:1", "mapping"),
        ("- 1\n", "f:1", "mapping"),
        ("[" * 600 + "]" * 600, "f", "not valid YAML"),
        ("a: !!python/object:os.system {}\n", "f:1", "not valid YAML"),
    ],
)
def test_what_is_wrong_is_refused_with_its_line(text: str, place: str, said: str) -> None:
    with pytest.raises(MemcError) as caught:
        parse_recipe(text, "f")
    assert caught.value.code == "E201"
    assert caught.value.where == place
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "code", "said"),
    [
        ("windw", "E202", "did you mean 'window'?"),
        ("window: {windw: 3}", "E203", "did you mean 'window'?"),
        ("window: {window: many}", "E203", "takes int"),
        ("window: {window: 0}", "E203", "at least 1"),
    ],
)
def test_pass_errors_name_the_line(entry: str, code: str, said: str) -> None:
    with pytest.raises(MemcError) as caught:
        parse_recipe(f"recipe: 1\npasses:\n  - window\n  - {entry}\n", "mine.yaml").build()
    assert caught.value.code == code
    assert caught.value.where.startswith("mine.yaml:4")
    assert said in str(caught.value)


def test_unknown_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(MemcError, match="did you mean 'streaming'"):
        load_recipe("streming")
    with pytest.raises(MemcError, match="E202 recipe file not found"):
        load_recipe(str(tmp_path / "x.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MemcError, match="E201 recipe cannot be read"):
        load_recipe(str(tmp_path / "binary.yaml"))
    (tmp_path / "large.yaml").write_bytes(b" " * (MAX_BYTES + 1))
    with pytest.raises(MemcError, match="larger than"):
        load_recipe(str(tmp_path / "large.yaml"))


def test_users_recipes_win(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "memc" / "recipes"
    folder.mkdir(parents=True)
    (folder / "streaming.yaml").write_text("recipe: 1\nsummary: mine\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert recipe_paths()["streaming"].parent == folder
    assert load_recipe("streaming").summary == "mine"


def test_values_of_the_command_line_are_checked() -> None:
    with pytest.raises(MemcError, match="E201 key 'weights'"):
        load_recipe("dense").resolved(weights="int5")
