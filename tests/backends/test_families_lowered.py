"""Every captured family runs in every backend as it runs in the IR, unrewritten and after each pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memc import load
from memc.api import convert
from memc.blocks import AttentionBlock
from memc.pipeline import parse_spec
from memc.plugins import load_plugin, registered
from memc.program import Program
from memc.raising import find_blocks
from memc.recipe import Recipe
from memc.target import get_target
from tests.backends.onnx_support import SCENARIOS, build, compare
from tests.core.test_families import DECODERS, QUICK, every, raised
from tests.families import FAMILIES, inputs_of, raw_program
from tests.passes.test_prune_groups import BLOCKED

TOLERANCE = 1e-4
KEYS = "prune:unit=key_channels,amount=0.5,round=2,protect=none,protect_heads=none"
SPARSE = "sparsify:budget=6,page=2,sinks=1,window=2,dense_below=3"
PASSES = (
    "window:window=4,sinks=2",
    "linearize:window=4,sinks=2,feature_size=12",
    SPARSE,
    KEYS,
)


def rewrite(name: str, spec: str) -> Program | None:
    """Return the family's program after a pass, with the memory switched on; None when the pass rejects every layer."""
    program = raised(name)[0].program
    rewriting = parse_spec(spec)
    plan = rewriting.plan(program, get_target("cpu"))
    skipped = {rejection.layer for rejection in plan.rejections if rejection.kind == "attention"}
    assert {site.layer for site in plan.sites} | skipped == {b.layer for b in find_blocks(program)}
    if not plan.sites:
        return None
    result, _ = rewriting.apply(program, plan)
    with torch.no_grad():
        for parameter, value in result.module.named_parameters():
            if parameter.endswith("mass_bias"):
                value.fill_(0.5)
    return result


@pytest.mark.conformance
@pytest.mark.parametrize("name", DECODERS)
def test_a_family_runs_in_onnx_as_in_the_program(name: str, tmp_path: Path) -> None:
    program = raised(name)[0].program
    runner = build(program, tmp_path, context=24)
    for scenario in ("prompt", "pieces", "padding"):
        assert compare(program, runner, SCENARIOS[scenario]) < TOLERANCE, scenario


@pytest.mark.parametrize("backend", ["onnx", "eager", "tvm"])
@pytest.mark.parametrize("name", every([name for name in FAMILIES if name not in DECODERS]))
def test_an_encoder_runs_in_every_backend_as_the_original(name: str, backend: str, tmp_path: Path) -> None:
    program, reference = raw_program(name)
    assert convert(program, tmp_path / "out", recipe=Recipe(recipe=1), backend=backend).verified
    session = load(tmp_path / "out")
    for batch, length in ((1, 1), (3, 11), (2, 17)):
        inputs = inputs_of(program, batch, length)
        named = {spec.name: value.numpy() for spec, value in zip(program.inputs, inputs, strict=True)}
        found = torch.from_numpy(session.logits(**named))
        torch.testing.assert_close(found, reference(*inputs), rtol=0, atol=TOLERANCE)


@pytest.mark.conformance
@pytest.mark.parametrize("spec", PASSES)
@pytest.mark.parametrize("name", DECODERS)
def test_a_rewritten_family_runs_in_pieces_as_at_once(name: str, spec: str) -> None:
    program = rewrite(name, spec)
    if program is None:
        if spec == KEYS:
            assert "key_channels" in BLOCKED[name], "rejected without a reason"
            return
        blocks = [b for b in find_blocks(raised(name)[0].program) if isinstance(b, AttentionBlock)]
        assert all(b.bias is not None or getattr(b.mask, "size", 99) <= 5 for b in blocks), "rejected without a reason"
        return
    tokens = torch.randint(3, 90, (2, 15), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(15).expand(2, 15).contiguous()
    with torch.no_grad():
        whole = program(tokens, positions, *program.new_state(2))[0]
        state, pieces = program.new_state(2), []
        for start, stop in ((0, 1), (1, 8), (8, 9), (9, 15)):
            piece, *state = program(tokens[:, start:stop], positions[:, start:stop], *state)
            pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=5e-5)


@pytest.mark.parametrize("spec", PASSES)
@pytest.mark.parametrize(
    "name", [n if n in ("llama", "gemma2") else pytest.param(n, marks=pytest.mark.conformance) for n in QUICK[:-1]]
)
def test_a_rewritten_family_runs_in_onnx(name: str, spec: str, tmp_path: Path) -> None:
    program = rewrite(name, spec)
    if program is None:
        return
    runner = build(program, tmp_path, context=24)
    for scenario in ("prompt", "pieces", "padding"):
        assert compare(program, runner, SCENARIOS[scenario]) < TOLERANCE, scenario


@pytest.mark.conformance
@pytest.mark.parametrize("name", DECODERS)
def test_a_family_with_a_bank_runs_in_onnx(name: str, tmp_path: Path) -> None:
    program, rewriting = raised(name)[0].program, parse_spec("memory_bank:ranks=4:2")
    plan = rewriting.plan(program, get_target("cpu"))
    if not plan.sites:
        assert {rejection.code for rejection in plan.rejections} == {"moe"}
        return
    banked, _ = rewriting.apply(program, plan)
    runner = build(banked, tmp_path, context=24)
    for scenario in ("prompt", "pieces", "padding"):
        assert compare(banked, runner, SCENARIOS[scenario]) < TOLERANCE, scenario


@pytest.mark.parametrize("backend", sorted(registered("memc.backends")))
def test_every_backend_says_of_every_op_whether_it_lowers_it(backend: str) -> None:
    program = raised("llama")[0].program
    made = load_plugin("memc.backends", backend)()
    answers = [made.supports(n, get_target("cpu")) for n in program.module.graph.nodes if "memc." in str(n.target)]
    assert answers
    assert all(getattr(answer, "how", "") or getattr(answer, "reason", "") for answer in answers)
