"""Programs that are cut at their layers do what they did."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from memc.errors import MemcError
from memc.train.sharding import Sharded
from tests.core.test_families import raised
from tests.passes.tiny_program import tiny
from tests.train.tiny_training import slopes

HERE = torch.device("cpu")


@pytest.fixture
def alone_in_a_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("family", ["gemma2", "gpt2", "phi"])
def test_a_family_that_is_cut_is_the_same_to_the_bit(family: str, alone_in_a_group: None) -> None:
    """Tied heads, learned positions, parallel blocks and biases: the same logits and gradients, layers of their own."""
    program = raised(family)[0].program
    learns = dict(program.module.named_parameters())
    tokens = torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(6).expand_as(tokens)
    cut = Sharded(None, program, learns, None, HERE, 1)
    assert torch.equal(cut(tokens, positions)[0], program.run(tokens))
    found = slopes(cut.trained, lambda: cut(tokens, positions)[0])
    for name, slope in slopes(learns, lambda: program.run(tokens)).items():
        assert torch.equal(found[name], slope), name
    of_layers = [value.nbytes for name, value in cut.module.named_parameters() if "stages." in name]
    assert sum(of_layers) > 0.7 * sum(value.nbytes for value in learns.values())


def test_what_cannot_be_cut_is_refused() -> None:
    program = tiny(layers=1)
    for node in program.module.graph.nodes:
        node.meta = {key: value for key, value in node.meta.items() if key not in ("nn_module_stack", "memc")}
    with pytest.raises(MemcError, match=r"E203 cannot be shared out among processes: the program has no layers.*never"):
        Sharded(None, program, [], None, HERE, 1)
