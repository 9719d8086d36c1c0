"""Products in bfloat16 of what learns: near the function in float32, gradients too, and nothing else rounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from memc.program import Program, Provenance, get_tensor
from memc.raising.feed_forward import LINEAR
from memc.train.adapters import ROOT as ADAPTERS
from memc.train.adapters import add_adapters, block_projections
from memc.train.products import Rounded, narrowed
from tests.passes.tiny_program import tiny
from tests.train.tiny_training import packed

TOKENS, POSITIONS = packed(2, seed=5)


def adapted(trained: bool) -> tuple[Program, list[str]]:
    """Return a program with adapters that do something, and what learns of it: the adapters, or every parameter."""
    program, adapters = add_adapters(tiny(), block_projections(tiny()), 3, 2.0, 0)
    generator = torch.Generator().manual_seed(1)
    for adapter in adapters:
        up = get_tensor(program.module, adapter.up)
        up.data = torch.randn(up.shape, generator=generator) * 0.05
    names = [name for name, _ in program.module.named_parameters()]
    return program, names if trained else [name for name in names if name.startswith(ADAPTERS)]


def run(program: Program, module: nn.Module) -> Tensor:
    found: Tensor = module(TOKENS, POSITIONS, *program.new_state(len(TOKENS), TOKENS.device))[0]
    return found


class Oracle(Interpreter):
    """Rounds the factors of products with the weights that the model came with."""

    def run_node(self, n: Node) -> Any:
        if n.target not in LINEAR or any(str(s.target).startswith(ADAPTERS) for s in n.all_input_nodes):
            return super().run_node(n)
        factors = [self.env[arg].bfloat16() if isinstance(arg, Node) else arg for arg in n.args]
        return n.target(*factors).float()  # type: ignore[operator]


@pytest.mark.parametrize("trained", [False, True])
def test_products_are_narrow_and_nothing_else_is(trained: bool) -> None:
    program, names = adapted(trained)
    module = narrowed(program, Rounded(torch.bfloat16), names)
    found, exact = run(program, module), run(program, program.module)
    expected = Oracle(program.module).run(
        TOKENS, POSITIONS, *program.new_state(len(TOKENS), TOKENS.device), enable_io_processing=False
    )[0]
    assert torch.equal(found, expected)
    assert 1e-4 < (found - exact).norm() / exact.norm() < 3e-2


@pytest.mark.parametrize("trained", [False, True])
def test_gradients_reach_what_learns_and_are_near(trained: bool) -> None:
    program, names = adapted(trained)
    grads = []
    for module in (program.module, narrowed(program, Rounded(torch.bfloat16), names)):
        parameters = [get_tensor(program.module, name) for name in names]
        assert {id(p) for p in parameters} <= {id(p) for p in module.parameters()}, "those of the program"
        run(program, module).square().mean().backward()
        grads.append([parameter.grad.clone() for parameter in parameters if parameter.grad is not None])
        program.module.zero_grad(set_to_none=True)
    assert len(grads[0]) == len(grads[1]) and (trained or len(grads[0]) == len(names))
    for expected, found in zip(*grads, strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 5e-2 * expected.norm() + 1e-6


def test_weights_that_nothing_reads_any_more_do_no_harm() -> None:
    program, names = adapted(False)
    program.provenance["model.layers.9.mlp.up.weight"] = Provenance("model.layers.9.mlp.up.weight")
    run(program, narrowed(program, Rounded(torch.bfloat16), [*names, "gone"]))


def test_programs_that_share_a_weight_share_it_rounded() -> None:
    program, names = adapted(False)
    rounded = Rounded(torch.bfloat16)
    first, second = (dict(narrowed(each, rounded, names).named_buffers()) for each in (program, program.copy()))
    assert {id(value) for value in first.values()} == {id(value) for value in second.values()}
    assert sum(value.dtype == torch.bfloat16 for value in first.values()) > 10


def test_without_a_type_nothing_is_done() -> None:
    program, names = adapted(False)
    assert narrowed(program, None, names) is program.module


def test_a_model_that_is_narrow_already_is_left_alone() -> None:
    program = tiny()
    for node in program.module.graph.nodes:
        if node.target in LINEAR:
            node.meta["val"] = node.meta["val"].bfloat16()
    module = narrowed(program, Rounded(torch.bfloat16), ())
    assert [node.target for node in module.graph.nodes] == [node.target for node in program.module.graph.nodes]
