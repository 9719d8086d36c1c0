"""Processes that hold shares of the parameters train what one does that has all of them."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from memc.infer import infer
from memc.progress import Silent
from memc.tensor_file import read_tensors, write_tensors
from memc.train import loop
from memc.train.adapters import add_adapters, attention_projections
from memc.train.guard import Guard
from memc.train.loop import Checkpoints, Schedule
from memc.train.parallel import ALONE, Processes, joined
from memc.train.recovery import Recovery, own_parameters, recover
from memc.train.sharding import Sharded
from tests.passes.tiny_program import tiny
from tests.train.processes import free_port, start
from tests.train.test_trainer import few_tokens, train
from tests.train.tiny_training import batches, linearized, packed, slopes, tensors_of

GUARD = Guard.of(*packed(3, 8))
STEPS = 4
HERE = torch.device("cpu")
CASES = ("adapters", "rounded", "everything", "narrow")
LOSSES = "losses"
SCRIPT = (
    "import sys; from pathlib import Path; from tests.train.test_sharding import process; process(Path(sys.argv[1]))"
)

Tensors = dict[str, Tensor]
Run = tuple[Path, dict[str, Tensors]]


def recovery_of(case: str, shares_on: torch.device | None = None, processes: Processes = ALONE) -> Recovery:
    """Make a recovery of adapters, with products in bfloat16 or not, or of every parameter, in float32 or bfloat16."""
    before = tiny(layers=1 if case == "narrow" else 2)
    if case == "narrow":
        own_parameters(before, [name for name, _ in before.module.named_parameters()], copied=True)
        for value in before.module.parameters():
            value.data = value.data.bfloat16()
        infer(before)
    after, report = linearized(before, keep="none")
    new = [name for objective in report.objectives for name in objective.parameters.values()]
    if case in ("adapters", "rounded"):
        after, adapters = add_adapters(after, attention_projections(before), 4, 2.0, 0)
        others = [name for adapter in adapters for name in (adapter.down, adapter.up)]
    else:
        others = [name for name, _ in after.module.named_parameters() if name not in new]
    rates = dict.fromkeys(others, 5e-4) | dict.fromkeys(new, 1e-3)
    own_parameters(after, rates, copied=shares_on is None)
    products = torch.bfloat16 if case == "rounded" else None
    return Recovery(before, after, rates, 2, 0.0, products, processes, shares_on=shares_on)


def trained(recovery: Recovery, folder: Path | None = None, stop: Callable[[int], None] | None = None) -> Tensors:
    """Train and return what is learned and the losses; ``stop`` is asked before every step, and may end it."""

    def given(step: int) -> tuple[Tensor, Tensor]:
        if stop is not None:
            stop(step // recovery.accumulate)
        return batches(step)

    checkpoints = Checkpoints(folder, {}, writes=recovery.processes.leads)
    result = recover(recovery, given, GUARD, Schedule(STEPS), checkpoints, Silent())
    learned = tensors_of(recovery.after)
    return {name: learned[name] for name in recovery.rates} | {LOSSES: torch.tensor(result.curve.losses["kl"])}


def quick(patched: pytest.MonkeyPatch) -> None:
    """Keep a checkpoint of every step, and compute first values from few tokens."""
    patched.setattr(loop, "SAVE_SECONDS", -1.0)
    few_tokens(patched)


def interrupt(step: int) -> None:
    if step == 2:
        raise KeyboardInterrupt


def kill(step: int) -> None:
    if step == 2:
        signal.raise_signal(signal.SIGKILL)


def converted(processes: Processes = ALONE) -> Tensors:
    """Return what the training of a pass comes to, with all its stages and every parameter learning in the last."""
    return tensors_of(train(tiny(layers=2), "none", processes=processes, adapters=0, shard="always").program)


def process(folder: Path) -> None:
    """Be one of two processes that hold shares, and note what comes of it; the second one is killed at last."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patched, joined() as processes:
        quick(patched)

        def note(name: str, tensors: Tensors) -> None:
            write_tensors(folder / f"{name}-{processes.rank}.safetensors", tensors)

        for case in CASES:
            note(case, trained(recovery_of(case, HERE, processes)))
        note("converted", converted(processes))
        note("resumed", trained(recovery_of("everything", HERE, processes), folder / "begun"))
        note("half lost", trained(recovery_of("everything", HERE, replace(processes, rank=0))))
        recovery = recovery_of("everything", HERE, processes)
        programs = Sharded(recovery.before, recovery.after, recovery.rates, None, HERE, processes.count)
        held = dict(programs.module.named_parameters())
        note("held", {name: value.to_local() for name, value in held.items() if isinstance(value, DTensor)})
        programs(*packed(1, 3))
        gathered = [name for name, value in programs.module.named_parameters() if not isinstance(value, DTensor)]
        alone = Sharded(None, recovery.after, recovery.rates, None, HERE, processes.count)
        note("logits", {"alone": alone(*packed(1, 3))[0].detach()})
        note("slopes", slopes(alone.trained, lambda: alone(*processes.share(*batches(0)))[0]))
        for module in alone.module.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
        note("slopes added up", slopes(alone.trained, lambda: alone(*processes.share(*batches(0)))[0]))
        (folder / f"names-{processes.rank}.json").write_text(json.dumps([list(held), gathered]))
        trained(recovery_of("everything", HERE, processes), folder / "killed", kill if processes.rank else None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Run two processes, once for all checks, and alone what they do; yields their folder and that."""
    folder = tmp_path_factory.mktemp("shares")
    with pytest.MonkeyPatch.context() as patched:
        quick(patched)
        with pytest.raises(KeyboardInterrupt):
            trained(recovery_of("everything"), folder / "begun", interrupt)
        port = free_port()
        two = [start(SCRIPT, port, rank, folder) for rank in range(2)]
        alone = {case: trained(recovery_of(case)) for case in CASES} | {"converted": converted()}
        try:
            said = [each.communicate(timeout=300)[1] for each in two]
        finally:
            for each in two:
                each.kill()
        assert two[1].returncode == -signal.SIGKILL, said[1]
        assert two[0].returncode == 1 and "E503 another process of the training is gone" in said[0], said[0]
        yield folder, alone


def noted(folder: Path, name: str) -> list[Tensors]:
    return [read_tensors(folder / f"{name}-{rank}.safetensors") for rank in range(2)]


def same(found: Tensors, wanted: Tensors) -> None:
    """Require the tolerances that processes are held to which have all parameters.

    Weights in bfloat16 that learn are left out, and losses after the first: rounding a weight one way or the other is
    as much as a step.
    """
    assert found.keys() == wanted.keys()
    exact = all(value.dtype == torch.float32 for value in wanted.values())
    for name, value in wanted.items():
        if name == LOSSES:
            count = len(value) if exact else 1
            torch.testing.assert_close(found[name][:count], value[:count], rtol=1e-3, atol=0, msg=name)
        elif value.dtype == torch.float32:
            torch.testing.assert_close(found[name], value, rtol=0, atol=2e-6, msg=name)


@pytest.mark.parametrize("case", [*CASES, "converted"])
def test_shares_are_trained_to_what_one_process_comes_to(run: Run, case: str) -> None:
    folder, alone = run
    for found in noted(folder, case):
        same(found, alone[case])


def test_what_one_process_began_two_end(run: Run) -> None:
    folder, alone = run
    for found in noted(folder, "resumed"):
        same(found, alone["everything"])


def test_what_two_processes_began_one_ends(run: Run) -> None:
    folder, alone = run
    assert [path.name for path in (folder / "killed").glob("step-*")] == ["step-00000002"]
    same(trained(recovery_of("everything"), folder / "killed"), alone["everything"])


def test_the_comparison_sees_that_half_of_a_batch_is_lost(run: Run) -> None:
    folder, alone = run
    with pytest.raises(AssertionError):
        same(noted(folder, "half lost")[0], alone["everything"])


def test_each_process_holds_half_and_gathers_a_layer_at_a_time(run: Run) -> None:
    folder, _ = run
    recovery = recovery_of("everything")
    programs = recovery.before, recovery.after
    total = sum({id(v): v.nbytes for each in programs for v in each.module.parameters()}.values())
    halves = []
    for rank, held in enumerate(noted(folder, "held")):
        names, gathered = json.loads((folder / f"names-{rank}.json").read_text())
        assert held.keys() == set(names)
        # A layer's parameters are shares again once it has run; those that are no layer's own wait for the backward.
        assert gathered and not any("stages." in name for name in gathered)
        halves.append(sum(value.nbytes for value in held.values()))
    assert sum(halves) == total and max(halves) < 0.51 * total


def test_a_program_that_imitates_nothing_runs_alone(run: Run) -> None:
    folder, _ = run
    for found in noted(folder, "logits"):
        same(found, {"alone": recovery_of("everything").after.run(*packed(1, 3)).detach()})


def test_gradients_are_averaged_and_the_comparison_sees_a_sum(run: Run) -> None:
    folder, _ = run
    program = recovery_of("everything").after
    wanted = slopes(dict(program.module.named_parameters()), lambda: program.run(*batches(0)))
    for found in noted(folder, "slopes"):
        same(found, wanted)
    with pytest.raises(AssertionError):
        same(noted(folder, "slopes added up")[0], wanted)
