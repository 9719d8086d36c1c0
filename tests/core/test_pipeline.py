"""Passes run in order, are checked on their results, and a killed run goes on to the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memc.conversion.pipeline import Pipeline, plan_all, window_baseline
from memc.errors import MemcError
from memc.plugins import load_kernels
from memc.program_io import load_program
from memc.relation import Bounded
from memc.report.files import PassReportFile
from memc.verify import sample_text
from tests.core.tiny import tiny_program
from tests.core.toy import TARGET, Toy

load_kernels()
TEXT = sample_text(tiny_program(), 0, sequences=2, length=20)


def pipeline(*passes: Toy, folder: Path | None = None, budgets: dict[str, float] | None = None) -> Pipeline:
    return Pipeline(passes, TARGET, TEXT, 1e-6, budgets or {}, folder)


def test_passes_run_in_order_and_report(tmp_path: Path) -> None:
    first, second = Toy(op="scale", by=2.0, relation="kl", budget=9.0), Toy(op="shift", by=1e-4, relation="close")
    program = tiny_program()
    result, runs = pipeline(first, second, folder=tmp_path).run(program)
    expected = program.run(TEXT.tokens) * 2.0 + 1e-4
    assert torch.allclose(result.run(TEXT.tokens), expected)
    assert [run.report.spec for run in runs] == [first.spec, second.spec] and not any(run.resumed for run in runs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report", "stage-03"]
    report = PassReportFile.model_validate_json((tmp_path / "report" / "03-toy.json").read_text())
    assert report == runs[1].report
    (relation,) = report.relations
    assert relation.passed and relation.value == pytest.approx(1e-4, rel=0.05) and relation.noise_floor == 1e-6


def test_no_passes_change_nothing() -> None:
    program = tiny_program()
    assert pipeline().run(program) == (program, [])


def test_a_pass_that_matches_nothing_is_refused_with_reasons(tmp_path: Path) -> None:
    with pytest.raises(MemcError, match=r"E307.*2 x toy: not to my taste"):
        pipeline(Toy(op="nothing"), folder=tmp_path).run(tiny_program())
    with pytest.raises(MemcError, match="E307"):
        plan_all([Toy(), Toy(op="nothing")], tiny_program(), TARGET)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Toy(op="shift", by=1e-3, relation="exact"), r"E401.*Exact does not hold.*0\.001.*noise floor"),
        (Toy(op="shift", by=1e-2, relation="close"), r"E401.*Close does not hold"),
        (Toy(op="scale", by=-1.0, relation="ratio", budget=1.01), r"E401.*perplexity_ratio"),
        (Toy(op="nan", relation="close"), r"E403.*not finite"),
        (Toy(op="shape"), r"E401.*not well formed.*after toy:op=shape"),
    ],
)
def test_a_result_that_breaks_its_promise_is_refused(tmp_path: Path, bad: Toy, message: str) -> None:
    with pytest.raises(MemcError, match=message):
        pipeline(Toy(), bad, folder=tmp_path).run(tiny_program())
    # What was verified before stays, so that a changed run can go on.
    assert [path.name for path in tmp_path.glob("stage-*")] == ["stage-02"]


def test_a_failed_check_is_reported(tmp_path: Path) -> None:
    with pytest.raises(MemcError, match="E401"):
        pipeline(Toy(op="shift", by=1e-3), folder=tmp_path).run(tiny_program())
    (relation,) = json.loads((tmp_path / "report" / "02-toy.json").read_text())["relations"]
    assert relation["passed"] is False and relation["value"] > 0


def test_a_recipe_s_budget_replaces_a_pass_s_own() -> None:
    bad = Toy(op="scale", by=-1.0, relation="kl", budget=1e-9)
    with pytest.raises(MemcError, match="E401"):
        pipeline(bad).run(tiny_program())
    _, (run,) = pipeline(bad, budgets={"kl_mean": 99.0}).run(tiny_program())
    assert run.report.relations[0].budget == 99.0


def test_the_baseline_takes_the_layers_and_options_of_the_pass() -> None:
    from memc.pipeline import parse_spec

    program = tiny_program()
    for spec, layers, softmax in (
        ("window:window=5,sinks=1,keep=[1]", [0], 1),
        ("linearize:window=5,sinks=1", [0, 1], 0),
        ("linearize:window=5,sinks=1,keep=heads:[0.0,0.1,1.0]", [1], 2),  # layer 0, and a head of layer 1
    ):
        pass_ = parse_spec(spec)
        plan = pass_.plan(program, TARGET)
        assert [site.layer for site in plan.sites] == layers
        graph = window_baseline(pass_, plan, program, TARGET).module.graph
        nodes = graph.find_nodes(op="call_function", target=torch.ops.memc.window_memory.default)
        assert [(node.kwargs["window"], node.kwargs["sinks"]) for node in nodes] == [(5, 1)] * len(layers)
        kept = graph.find_nodes(op="call_function", target=torch.ops.memc.attention.default)
        assert len(kept) == softmax


def test_a_real_pass_runs_and_keeps_its_promises(tmp_path: Path) -> None:
    from memc.pipeline import parse_spec

    passes = [parse_spec("window:window=6,sinks=2,keep=none")]
    result, (run,) = Pipeline(passes, TARGET, TEXT, folder=tmp_path).run(tiny_program())
    assert all(spec.grows is None for spec in result.states)
    metrics = {facts.relation: facts.passed for facts in run.report.relations}
    assert metrics == {"close": True, "bounded": True}
    assert Bounded("perplexity_ratio", None) in passes[0].plan(tiny_program(), TARGET).relations


SCRIPT = """
import sys
from pathlib import Path
from tests.core.test_pipeline import killable
killable(Path(sys.argv[1]), sys.argv[2])
"""


def killable(folder: Path, trigger: str) -> None:
    """Run three passes of which the second is killed while ``trigger`` exists."""
    torch.set_num_threads(1)
    passes = (
        Toy(op="shift", by=1e-4, relation="close"),
        Toy(op="scale", by=1.5, relation="kl", budget=9.0, kill=trigger),
        Toy(op="shift", by=2e-4, relation="close"),
    )
    _, runs = pipeline(*passes, folder=folder).run(tiny_program())
    print([run.resumed for run in runs])


def run_killable(folder: Path, trigger: Path) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", SCRIPT, str(folder), str(trigger)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
    )


def test_a_killed_run_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    trigger = tmp_path / "kill"
    trigger.touch()
    killed = run_killable(tmp_path / "a", trigger)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in (tmp_path / "a").glob("stage-*")] == ["stage-02"]
    trigger.unlink()
    resumed = run_killable(tmp_path / "a", trigger)
    assert resumed.stdout.strip() == "[True, False, False]", resumed.stderr
    killable(tmp_path / "b", str(trigger))
    names = sorted(path.name for path in (tmp_path / "b" / "stage-04").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "a" / "stage-04").iterdir())
    for name in names:
        assert (tmp_path / "a" / "stage-04" / name).read_bytes() == (tmp_path / "b" / "stage-04" / name).read_bytes()


def test_a_stage_that_was_being_written_does_not_count(tmp_path: Path) -> None:
    first, second = Toy(op="shift", by=1e-4, relation="close"), Toy()
    pipeline(first, folder=tmp_path).run(tiny_program())
    (tmp_path / "stage-03.writing").mkdir()
    result, runs = pipeline(first, second, folder=tmp_path).run(tiny_program())
    assert [run.resumed for run in runs] == [True, False]
    assert torch.equal(load_program(tmp_path / "stage-03").run(TEXT.tokens), result.run(TEXT.tokens))
