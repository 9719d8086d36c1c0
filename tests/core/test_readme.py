"""The README says what is: its commands parse, its tables agree with the program, its Python runs."""

from __future__ import annotations

import json
import re
import shlex
from importlib.resources import files
from pathlib import Path

import click
import pytest

from memc.cli.app import COMMANDS
from memc.cli.app import memc as group
from memc.cli.convert import command as convert
from memc.conversion.training import TOKENS
from memc.errors import Exit
from memc.recipe import Train

README = (Path(__file__).parents[2] / "README.md").read_text()


def between(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README, re.DOTALL)
    assert found, name
    return found.group(1)


def coverage_table() -> str:
    rows = json.loads((files("memc") / "coverage.json").read_text())
    lines = ["| family | captured | attention raised | FFN raised | logits equal |", "|---|---|---|---|---|"]
    for family, row in rows.items():
        marks = ["yes" if row[key] else "no" for key in ("captured", "attention", "ffn", "logits")]
        lines.append(f"| {family} | {' | '.join(marks)} |" + (f" {row['note']}" if row["note"] else ""))
    return "\n".join(lines) + "\n"


def test_the_coverage_table_is_the_published_one() -> None:
    assert between("coverage") == coverage_table()


def train_table() -> str:
    lines = ["| key | default | what it is |", "|---|---|---|"]
    for key, field in Train.model_fields.items():
        default = field.default if isinstance(field.default, str) else f"{field.default:g}"
        lines.append(f"| `{key}` | {default} | {field.description} |")
    return "\n".join(lines) + "\n"


def test_the_table_of_training_is_the_recipe_s() -> None:
    assert between("train") == train_table()


def test_the_tokens_that_are_trained_on_by_default_are_said() -> None:
    assert f"{TOKENS:,} tokens" in README
    (option,) = [each for each in convert.params if each.name == "tokens"]
    assert isinstance(option, click.Option) and option.help is not None
    assert f"[default: {TOKENS}," in option.help


def commands() -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ memc ")]


@pytest.mark.parametrize("line", commands())
def test_every_command_shown_parses(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    command = group.get_command(click.Context(group), name)
    assert command is not None, name
    command.make_context(name, arguments, resilient_parsing=False)


def test_every_command_is_in_the_table() -> None:
    for name in COMMANDS:
        assert f"memc {name}" in README, name


def test_every_exit_code_is_in_the_table() -> None:
    for code in Exit:
        assert re.search(rf"^\| {code.value} \|", README, re.MULTILINE), code


def test_the_python_shown_uses_names_that_exist() -> None:
    import memc
    from memc.bank import Bank
    from memc.runtime import Session

    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    compile(code, "README.md", "exec")
    assert all(hasattr(memc, name) for name in re.findall(r"\bmemc\.(\w+)\(", code))
    assert all(hasattr(Session, name) for name in re.findall(r"\bsession\.(\w+)\(", code))
    assert all(hasattr(Bank, name) for name in re.findall(r"\bbank\.(\w+)\(", code))


if __name__ == "__main__":
    # Write the tables anew: python -m tests.core.test_readme
    updated = README
    for marker, made in (("coverage", coverage_table()), ("train", train_table())):
        updated = updated.replace(f"<!-- {marker} -->\n{between(marker)}", f"<!-- {marker} -->\n{made}")
    (Path(__file__).parents[2] / "README.md").write_text(updated)
