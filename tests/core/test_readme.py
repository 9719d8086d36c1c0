"""The README and the pages of the rooms say what is: commands parse, tables agree with the program, links lead on."""

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

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for room in ("passes", "backends", "kernels", "memc", "examples")
    for path in [ROOT / "README.md", *(ROOT / room).glob("README.md"), *sorted((ROOT / room).glob("*/README.md"))]
    if not path.parent.is_symlink()
}
README, TRAINING = PAGES["README.md"], PAGES["memc/train/README.md"]


def between(name: str, page: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", page, re.DOTALL)
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
    assert between("coverage", README) == coverage_table()


def train_table() -> str:
    lines = ["| key | default | what it is |", "|---|---|---|"]
    for key, field in Train.model_fields.items():
        default = field.default if isinstance(field.default, str) else f"{field.default:g}"
        lines.append(f"| `{key}` | {default} | {field.description} |")
    return "\n".join(lines) + "\n"


def test_the_table_of_training_is_the_recipe_s() -> None:
    assert between("train", TRAINING) == train_table()


def test_the_tokens_that_are_trained_on_by_default_are_said() -> None:
    assert f"{TOKENS:,} tokens" in README
    (option,) = [each for each in convert.params if each.name == "tokens"]
    assert isinstance(option, click.Option) and option.help is not None
    assert f"[default: {TOKENS}," in option.help


def commands() -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", "\n".join(PAGES.values()), re.DOTALL)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ memc ")]
    return list(dict.fromkeys(lines))


@pytest.mark.parametrize("line", commands())
def test_every_command_shown_parses(line: str) -> None:
    _, name, *arguments = shlex.split(line, comments=True)
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

    code = "\n".join(re.findall(r"```python\n(.*?)```", "\n".join(PAGES.values()), re.DOTALL))
    compile(code, "README.md", "exec")
    assert all(hasattr(memc, name) for name in re.findall(r"\bmemc\.(\w+)\(", code))
    assert all(hasattr(Session, name) for name in re.findall(r"\bsession\.(\w+)\(", code))
    assert all(hasattr(Bank, name) for name in re.findall(r"\bbank\.(\w+)\(", code))


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files_and_headings_that_are_there(name: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[name]):
        place, _, heading = link.partition("#")
        if "://" in place:
            continue
        path = (ROOT / name).parent / place if place else ROOT / name
        assert path.exists(), link
        headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in [re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings]


def test_every_room_s_page_is_reached_from_the_readme() -> None:
    reached, left = set[str](), ["README.md"]
    while left:
        name = left.pop()
        if name not in reached and name in PAGES:
            reached.add(name)
            links = re.findall(r"\]\(([^)#\s]+\.md)", PAGES[name])
            left += [((ROOT / name).parent / link).resolve().relative_to(ROOT).as_posix() for link in links]
    assert reached == PAGES.keys()


if __name__ == "__main__":
    # Write the tables anew: python -m tests.core.test_readme
    for page, marker, made in (
        ("README.md", "coverage", coverage_table()),
        ("memc/train/README.md", "train", train_table()),
    ):
        old = between(marker, PAGES[page])
        updated = PAGES[page].replace(f"<!-- {marker} -->\n{old}", f"<!-- {marker} -->\n{made}")
        (ROOT / page).write_text(updated)
