"""A third party adds a pass by an entry point of its own distribution, touching nothing of memc."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = '''
"""A pass that scales every attention's output by a number."""
from dataclasses import dataclass
from typing import ClassVar

import torch

from memc.pipeline import Pass, PassReport, Plan, Site, option
from memc.raising import find_blocks
from memc.relation import Close


@dataclass(frozen=True)
class Damp(Pass):
    """Multiply what attention returns by a factor.

    Does not handle:
        nothing: every block can be damped.
    """

    name: ClassVar[str] = "damp"
    factor: float = option(1.0, "what to multiply by", min=0.0)

    def plan(self, program, target):
        sites = tuple(Site(b.layer, b.path, b.kind) for b in find_blocks(program) if b.kind == "attention")
        return Plan(self.spec, sites, (), (Close(1e-4),))

    def apply(self, program, plan):
        program = program.copy()
        graph = program.module.graph
        for block in find_blocks(program):
            if block.kind == "attention":
                with graph.inserting_after(block.output):
                    node = graph.call_function(torch.ops.aten.mul.Tensor, (block.output, self.factor))
                    node.meta["val"] = block.output.meta["val"]
                block.output.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
        program.module.recompile()
        return program, PassReport(plan.spec, plan.sites, (), plan.relations)
'''

USE = """
import sys
import memc
from tests.families import raw_program

document = memc.convert(raw_program("llama")[0], sys.argv[1], backend="eager", passes=[sys.argv[2]])
print(document.passes[0].sites, document.verified)
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    site = tmp_path / "site"
    info = site / "memc_damp-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "memc_damp.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: memc-damp\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[memc.passes]\ndamp = memc_damp:Damp\n")
    root = Path(__file__).parents[2]
    return {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{root}", "XDG_CACHE_HOME": str(tmp_path / "cache")}


def run(environment: dict[str, str], *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], env=environment, capture_output=True, text=True, check=False)


def test_a_pass_of_a_third_party_is_listed(environment: dict[str, str]) -> None:
    result = run(environment, "-m", "memc", "passes", "--json")
    assert "damp" in {row["name"] for row in json.loads(result.stdout)["passes"]}


def test_a_pass_of_a_third_party_converts_and_is_checked(environment: dict[str, str], tmp_path: Path) -> None:
    result = run(environment, "-c", USE, str(tmp_path / "out"), "damp")
    assert result.stdout.split() == ["2", "True"], result.stderr
    result = run(environment, "-c", USE, str(tmp_path / "other"), "damp:factor=0.5")
    assert "E401" in result.stderr, "a pass that breaks its promise is caught whoever wrote it"
