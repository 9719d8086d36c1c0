"""Several processes train what one does; one that is lost stops the others, and the next run goes on."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memc.conversion.training import require_shareable
from memc.errors import MemcError
from memc.program_io import load_program
from memc.recipe import Recipe, Train
from memc.train.parallel import ALONE, Processes
from memc.train.recovery import weights
from tests.core.converting import make_llama
from tests.train.processes import free_port, start
from tests.train.test_conversion import PRUNE, SPEC, killable, training_of, write_text
from tests.train.tiny_training import packed, tensors_of

SCRIPT = """
import sys
from pathlib import Path
from tests.train.test_conversion import killable
killable(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], batch=2, spec=sys.argv[4])
"""


@pytest.mark.parametrize("spec", [SPEC.replace("auto:50%", "none"), PRUNE], ids=["linearize", "prune"])
def test_two_processes_train_what_one_does_though_one_is_lost(tmp_path: Path, spec: str) -> None:
    llama, out = make_llama(tmp_path / "model", layers=1), tmp_path / "two"
    write_text(llama / "text.txt")
    for stage in ("recovery", ""):
        port = free_port()
        leader, other = (start(SCRIPT, port, rank, llama, out, stage if rank else "", spec) for rank in range(2))
        said = [process.communicate(timeout=300)[1] for process in (leader, other)]
        if stage:
            assert other.returncode == -signal.SIGKILL
            assert leader.returncode == 1 and "E503 another process of the training is gone" in said[0], said[0]
            assert list((tmp_path / "two.partial" / "train-02" / stage).glob("step-*")) and not out.exists()
    assert (leader.returncode, other.returncode) == (0, 0), said
    killable(llama, tmp_path / "one", "", batch=2, spec=spec)
    one, two = (tensors_of(load_program(tmp_path / name / "program")) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=2e-6, msg=name)
    first, second = (training_of(tmp_path / name, spec.partition(":")[0])[1] for name in ("one", "two"))
    for name, losses in first.transfer.curve.losses.items() if first.transfer else ():
        assert second.transfer.curve.losses[name] == pytest.approx(losses, rel=1e-4, abs=1e-6)  # type: ignore[union-attr]
    assert first.recovery is not None and second.recovery is not None
    assert second.recovery.curve.losses["kl"] == pytest.approx(first.recovery.curve.losses["kl"], rel=1e-3)
    for text, same in zip(first.recovery.guard_texts, second.recovery.guard_texts, strict=True):
        assert [kl for _, kl in same.kl] == pytest.approx([kl for _, kl in text.kl], rel=1e-3)


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 3))
def test_shares_are_the_batch(batch: int, count: int, seed: int) -> None:
    tokens, positions = packed(batch, seed)
    shares = [Processes(rank, count).share(tokens, positions) for rank in range(count)]
    assert torch.equal(torch.cat([share[0] for share in shares]), tokens)
    assert torch.equal(torch.cat([share[1] for share in shares]), positions)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_means_over_shares_are_weighed_to_that_of_the_batch(each: int, count: int, seed: int) -> None:
    """Documents and padding fall to the processes unevenly."""
    _, positions = packed(each * count, seed)
    values = torch.rand(positions.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    marks = [lambda p: p >= 0, lambda p: torch.cat([(p[:, :-1] >= 0) & (p[:, 1:] == p[:, :-1] + 1), p[:, :1] < -1], 1)]
    for index, mark in enumerate(marks):
        found = 0.0
        for rank in range(count):
            mine, own = Processes(rank, count).share(values, positions)
            if mark(own).any():
                found += float(mine[mark(own)].mean() * weights(positions, own)[index]) / count
        expected = float(values[mark(positions)].mean()) if mark(positions).any() else 0.0
        assert found == pytest.approx(expected, abs=1e-6)


def test_what_cannot_be_shared_is_refused_before_any_work() -> None:
    two, recipe = Processes(1, 2), Recipe(recipe=1, train=Train(batch=3))
    with pytest.raises(MemcError, match=r"E200 .*3 sequences cannot be shared by 2.*batch: 4"):
        require_shareable(recipe, True, two)
    with pytest.raises(MemcError, match="E200 2 processes share the training, and there is none"):
        require_shareable(Recipe(recipe=1), False, two)
    require_shareable(recipe, True, ALONE)
    require_shareable(recipe, False, ALONE)


def test_one_process_is_left_alone() -> None:
    module = torch.nn.Linear(2, 2)
    assert ALONE.leads and ALONE.wrap(module) is module and ALONE.mean([1.0, 2.0]) == [1.0, 2.0]
    assert ALONE.from_leader(lambda: "made") == "made"
