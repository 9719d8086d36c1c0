"""LoRAM: adapters of a pruned program in the shapes of the original, and the original with them merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memc import api
from memc.errors import MemcError
from memc.passes.prune import Prune
from memc.program import Program, get_tensor
from memc.program_io import load_program
from memc.recipe import Recipe, Train
from memc.report.files import PassReportFile
from memc.report.models import ConvertDocument
from memc.train.adapters import Adapter, add_adapters, block_projections, fold_adapters
from memc.train.merge import expand, kept_indices, merge_adapters
from tests.core.converting import make_llama
from tests.passes.tiny_program import TARGET
from tests.train.test_adapters import LAYOUTS, learn, program_of
from tests.train.test_conversion import PRUNE, SPEC, write_text
from tests.train.tiny_training import changed, tensors_of


def pruned(before: Program, unit: str, refit: bool = False) -> Program:
    pass_ = Prune(
        amount=0.3 if unit == "key_channels" else 0.2,
        unit=unit,
        round=4,
        protect="none",
        score="magnitude",
        refit=refit,
    )
    return pass_.apply(before, pass_.plan(before, TARGET))[0]


def learned(after: Program) -> tuple[Program, list[Adapter]]:
    adapted, adapters = add_adapters(after, block_projections(after), 3, 2.0, 0)
    learn(adapted, adapters)
    return adapted, adapters


def restricted(value: Tensor, kept: tuple[Tensor, Tensor]) -> Tensor:
    return value[kept[0]][:, kept[1]]


@pytest.mark.parametrize("unit", ["ffn", "heads", "key_channels"])
@pytest.mark.parametrize("family", LAYOUTS)
def test_what_is_expanded_and_restricted_is_what_it_was(family: str, unit: str) -> None:
    before = program_of(family)
    after = pruned(before, unit)
    adapted, adapters = learned(after)
    merged, folded = merge_adapters(before, after, adapted, adapters), fold_adapters(after, adapted, adapters)
    assert merged.parameter_count == before.parameter_count > after.parameter_count
    smaller = 0
    for adapter in adapters:
        kept = kept_indices(before, after, adapter.weight)
        old, now = (get_tensor(program.module, adapter.weight).detach() for program in (before, after))
        assert torch.equal(restricted(old, kept), now), "what is kept is what the smaller program has"
        down, up = expand(before, after, adapted, adapter)
        ins, outs = kept if adapter.transposed else kept[::-1]
        assert torch.equal(down[:, ins], get_tensor(adapted.module, adapter.down))
        assert torch.equal(up[outs], get_tensor(adapted.module, adapter.up))
        assert torch.count_nonzero(down) == torch.count_nonzero(down[:, ins])
        assert torch.count_nonzero(up) == torch.count_nonzero(up[outs])
        whole = get_tensor(merged.module, adapter.weight)
        assert torch.equal(restricted(whole, kept), get_tensor(folded.module, adapter.weight))
        untouched = torch.ones_like(old, dtype=torch.bool)
        untouched[kept[0][:, None], kept[1]] = False
        assert torch.equal(whole[untouched], old[untouched]), "what was removed is as it was"
        smaller += old.numel() > now.numel()
        assert merged.provenance[adapter.weight].transform == "adapted"
    assert smaller and changed(tensors_of(before), tensors_of(merged)) == {adapter.weight for adapter in adapters}


def test_indices_of_a_program_that_was_pruned_before() -> None:
    first = pruned(program_of("llama"), "ffn")
    second = pruned(first, "ffn")
    for _, (weight, _turned) in block_projections(second).items():
        old, now = (get_tensor(program.module, weight) for program in (first, second))
        assert torch.equal(restricted(old, kept_indices(first, second, weight)), now)
        oldest = get_tensor(program_of("llama").module, weight)
        assert torch.equal(restricted(oldest, kept_indices(program_of("llama"), second, weight)), now)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_llama(tmp_path_factory.mktemp("llama"))
    write_text(folder / "text.txt")
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def convert(llama: Path, out: Path, spec: str = PRUNE, **options: Any) -> ConvertDocument:
    settings = {
        "length": 32,
        "guard": 0.2,
        "adapters": 4,
        "adapter_rate": 2e-2,
        "accumulate": 1,
        "sampled": 0,
        "onto": "original",
    }
    settings |= options.pop("train", {})
    recipe = Recipe(recipe=1, train=Train.model_validate(settings))
    options = {"data": [str(llama / "text.txt")], "tokens": 2000, "threads": 1, "backend": "eager", **options}
    return api.convert(llama, out, passes=[spec], recipe=recipe, **options)


def test_adapters_of_the_pruned_model_make_the_original_better_on_the_text(llama: Path, tmp_path: Path) -> None:
    planned = convert(llama, tmp_path / "out", dry_run=True)
    assert [facts.trains for facts in planned.passes] == [["adapters for the original"]]
    document = convert(llama, tmp_path / "out")
    assert document.verified and document.measured is not None and document.original is not None
    assert document.measured.parameters == document.original.parameters == planned.predicted.parameters
    report = PassReportFile.model_validate_json((tmp_path / "out" / "report" / "02-prune.json").read_text())
    assert report.training is not None and report.training.recovery is not None
    recovery = report.training.recovery
    assert recovery.onto == "original" and recovery.best_step > 0
    assert set(recovery.curve.losses["kl"]) == {0.0}, "the original is not run"
    assert recovery.curve.losses["text"][-1] < recovery.curve.losses["text"][0]
    assert report.relations[0].value is not None and report.relations[0].value < 0.98
    transforms = {source.transform for source in load_program(tmp_path / "out" / "program").provenance.values()}
    assert transforms == {"identity", "adapted"}, "neither pruned nor refitted"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokens": 0}, r"nothing is trained .*train: onto.*--data"),
        ({"data": [], "tokens": None}, "nothing is trained"),
        ({"spec": PRUNE.replace("0.25", "0")}, "nothing is trained"),
        ({"train": {"adapters": 0}}, r"adapters are 0 .*rank of 1"),
        (
            {"spec": SPEC.replace("auto:50%", "none")},
            r"linearize:.* adds parameters, which the original has no place for",
        ),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_what_cannot_be_merged_is_refused(
    llama: Path, tmp_path: Path, options: dict[str, Any], said: str, dry: bool
) -> None:
    with pytest.raises(MemcError, match=f"E203.*{said}"):
        convert(llama, tmp_path / "out", dry_run=dry, **options)
    assert not list(tmp_path.glob("out*"))
