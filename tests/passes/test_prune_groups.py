"""Groups and branches of every family: pruned forward equals masked forward."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Interpreter, Node

from memc.blocks import AttentionBlock, Block, FeedForwardBlock
from memc.infer import infer
from memc.passes.prune.groups import Branch, Group, Groups, Kind
from memc.passes.prune.rewrite import Cut, Pruner
from memc.passes.prune.walk import BlockedError, Labels, Walk
from memc.plugins import load_kernels
from memc.program import Program
from memc.program_io import load_program, save_program
from memc.raising import raise_program
from memc.raising.feed_forward import linear_input
from memc.verify import require_well_formed
from tests.core.test_families import every
from tests.families import FAMILIES, VOCAB, inputs_of, raw_program
from tests.passes.tiny_program import SLOPES, tiny

load_kernels()

BLOCKED: dict[str, dict[str, str]] = {
    "olmo2": {"kv_groups": "norm", "query_heads": "norm", "key_channels": "norm"},
    "falcon": {"query_heads": "mixed", "key_channels": "conflict"},
    "t5": {"kv_groups": "shared"},
    "mixtral": {"ffn_channels": "moe"},
    "qwen3_moe": {"ffn_channels": "moe", "key_channels": "norm"},
    **{name: {"key_channels": "norm"} for name in ("qwen3", "gemma3_text", "cohere")},
    **{name: {"key_channels": "conflict"} for name in ("bloom", "torch_encoder", "torch_mha")},
}
"""What no family but these refuses, of a first block of its kind."""


@cache
def groups_of(name: str) -> Groups:
    return Groups(raise_program(raw_program(name)[0]).program)


def kinds(block: Block) -> list[Kind]:
    if isinstance(block, FeedForwardBlock):
        return ["ffn_channels"]
    heads: list[Kind] = ["kv_groups", "query_heads"] if block.num_heads > block.num_kv_heads else ["kv_groups"]
    return [*heads, "key_channels"]


def all_groups(name: str) -> list[Group]:
    groups, found = groups_of(name), list[Group]()
    for block in groups.blocks:
        for kind in kinds(block):
            if kind not in BLOCKED.get(name, {}):
                found.append(groups.of(block, kind))
    return found


class Masked(Interpreter):
    """Runs a program with some channels of some linear ops' inputs at zero, and some values in part or in all."""

    def __init__(self, program: Program, entries: dict[Node, Tensor], factors: dict[Node, Tensor]) -> None:
        super().__init__(program.module)
        self.entries, self.factors = entries, factors

    def run_node(self, n: Node) -> Any:
        if n in self.entries:
            assert isinstance(n.target, torch._ops.OpOverload)
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            at = n.args.index(linear_input(n))
            masked = args[at] * self.entries[n]
            return n.target(*(masked if i == at else arg for i, arg in enumerate(args)), **kwargs)
        value = super().run_node(n)
        return value * self.factors[n] if n in self.factors else value


def known(program: Program, batch: int, length: int) -> tuple[Tensor, ...]:
    """Make inputs whose tokens the program knows."""
    tokens, *rest = inputs_of(program, batch, length)
    return (tokens % (program.model.vocab_size or VOCAB) if not tokens.is_floating_point() else tokens, *rest)


def masked(program: Program, cuts: list[Cut], branches: list[Branch], batch: int, length: int) -> Tensor:
    entries: dict[Node, Tensor] = {}
    factors = {branch.addend: torch.zeros(()) for branch in branches}
    for cut in cuts:
        entries[cut.group.exit] = entries.get(cut.group.exit, 1.0) * cut.columns.float()
        if cut.group.kind == "key_channels":
            assert isinstance(cut.group.block, AttentionBlock)
            kept = ~torch.isin(cut.group.keys, torch.tensor(cut.removed))
            factors |= {cut.group.block.query: kept.float(), cut.group.block.key: kept.float()}
    inputs = known(program, batch, length)
    with torch.no_grad():
        run = Masked(program, entries, factors)
        return run.run(*inputs, *program.new_state(batch))[0]  # type: ignore[no-any-return]


def forward(program: Program, batch: int, length: int) -> Tensor:
    with torch.no_grad():
        return program(*known(program, batch, length), *program.new_state(batch))[0]


def some(group: Group, generator: torch.Generator) -> tuple[int, ...]:
    """Draw units to remove: some, never all; of query heads as many from each key-value head."""
    if group.kind == "query_heads":
        assert isinstance(group.block, AttentionBlock)
        size = group.block.num_heads // group.block.num_kv_heads
        return tuple(start + int(torch.randint(size, (), generator=generator)) for start in range(0, group.units, size))
    count = int(torch.randint(1, group.units, (), generator=generator))
    return tuple(sorted(torch.randperm(group.units, generator=generator)[:count].tolist()))


@pytest.mark.parametrize("name", every(FAMILIES))
def test_pruned_equals_masked(name: str) -> None:
    program, groups = groups_of(name).program, all_groups(name)

    def check(cuts: list[Cut], batch: int, length: int) -> Program:
        pruned = Pruner(program).run(cuts)
        expected = masked(program, cuts, [], batch, length)
        torch.testing.assert_close(forward(pruned, batch, length), expected, atol=1e-5, rtol=0)
        return pruned

    @settings(max_examples=4, deadline=None)
    @given(group=st.sampled_from(groups), seed=st.integers(0, 1000), batch=st.integers(1, 3), length=st.integers(1, 9))
    def check_one(group: Group, seed: int, batch: int, length: int) -> None:
        cut = Cut(group, some(group, torch.Generator().manual_seed(seed)))
        pruned = check([cut], batch, length)
        removed = int(group.cost[list(cut.removed)].sum())
        assert pruned.parameter_count == program.parameter_count - removed

    check_one()
    generator = torch.Generator().manual_seed(0)
    together = [Cut(group, some(group, generator)) for group in groups if group.kind != "query_heads"]
    require_well_formed(check(together, 2, 7))


@pytest.mark.parametrize("name", every(FAMILIES))
def test_a_removed_branch_adds_nothing(name: str) -> None:
    groups = groups_of(name)
    program = groups.program
    blocks = [block for block in groups.blocks if block.kind != "moe"]
    attention = [block for block in blocks if isinstance(block, AttentionBlock)]
    feed_forward = [block for block in blocks if not isinstance(block, AttentionBlock)]
    for chosen in [blocks[:1], blocks[1:2], attention, feed_forward, blocks]:
        branches = [groups.branch(block) for block in chosen]
        pruned = Pruner(program).run([], branches)
        gone = sum(isinstance(block, AttentionBlock) for block in chosen)
        assert len(pruned.states) == len(program.states) - (3 * gone if program.states else 0)
        expected = masked(program, [], branches, 2, 7)
        torch.testing.assert_close(forward(pruned, 2, 7), expected, atol=1e-5, rtol=0)
    require_well_formed(pruned)


@pytest.mark.parametrize("name", every(FAMILIES))
def test_blocks_that_cannot_be_cut_say_why(name: str) -> None:
    groups = groups_of(name)
    for kind, code in BLOCKED.get(name, {}).items():
        block = next(block for block in groups.blocks if kind in ("ffn_channels", *kinds(block)) and _fits(block, kind))
        with pytest.raises(BlockedError) as caught:
            groups.of(block, kind)  # type: ignore[arg-type]
        assert caught.value.code == code


def _fits(block: Block, kind: str) -> bool:
    return isinstance(block, FeedForwardBlock) == (kind == "ffn_channels")


def first(program: Program, kind: str) -> tuple[Groups, Block]:
    groups = Groups(program)
    return groups, next(block for block in groups.blocks if block.kind == kind)


@pytest.mark.parametrize("choices", [{"slopes": SLOPES}, {"sink_logits": (0.5, -1.0, 2.0, 0.0), "softcap": 2.0}])
def test_slopes_and_sink_logits_go_with_their_heads(choices: dict[str, Any]) -> None:
    program = tiny(layers=1, **choices)
    groups, block = first(program, "attention")
    group = groups.of(block, "kv_groups")
    assert group.parameters.keys() & {"slopes", "sink_logits"}
    cut = Cut(group, (0,))
    pruned = Pruner(program).run([cut])
    torch.testing.assert_close(forward(pruned, 2, 7), masked(program, [cut], [], 2, 7), atol=1e-5, rtol=0)


def test_a_buffer_that_two_layers_read_is_not_cut() -> None:
    groups, block = first(tiny(slopes=SLOPES), "attention")
    with pytest.raises(BlockedError) as caught:
        groups.of(block, "kv_groups")
    assert caught.value.code == "shared"


def test_a_pruned_head_has_no_state() -> None:
    program = tiny()
    groups, block = first(program, "attention")
    pruned = Pruner(program).run([Cut(groups.of(block, "kv_groups"), (1,))])
    assert [spec.shape[1] for spec in pruned.states] == [1, 1, "S", 2, 2, "S"]
    assert pruned.state_bytes(10) < program.state_bytes(10)
    assert [spec.shape[1] for spec in program.states] == [2, 2, "S", 2, 2, "S"], "the program given stays as it was"


def test_provenance_says_what_was_kept(tmp_path: Path) -> None:
    program = tiny()
    groups, block = first(program, "feed_forward")
    pruned = Pruner(program).run([Cut(groups.of(block, "ffn_channels"), (0, 5, 6, 27))])
    source = pruned.provenance["model.layers.0.mlp.down.weight"]
    assert source.kept == ((1, ((1, 5), (7, 27))),) and source.transform == "prune" and not source.invertible
    assert source.source == "model.layers.0.mlp.down.weight"
    assert pruned.provenance["model.layers.1.mlp.down.weight"] == program.provenance["model.layers.1.mlp.down.weight"]
    save_program(pruned, tmp_path)
    assert load_program(tmp_path).provenance == pruned.provenance


def test_the_oracle_can_fail() -> None:
    program = tiny()
    groups, block = first(program, "feed_forward")
    group = groups.of(block, "ffn_channels")
    pruned = Pruner(program).run([Cut(group, (3, 4))])
    wrong = masked(program, [Cut(group, (3, 5))], [], 2, 7)
    assert (forward(pruned, 2, 7) - wrong).abs().max() > 1e-3


def insert_after(program: Program, name: str, target: Any, *args: Any) -> Program:
    """Put an op behind a node, for all that read it."""
    changed = program.copy()
    node = next(node for node in changed.module.graph.nodes if node.name == name)
    with changed.module.graph.inserting_after(node):
        made = changed.module.graph.call_function(target, (node, *args))
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    infer(changed)
    changed.module.recompile()
    return changed


def test_an_unknown_op_blocks_its_group() -> None:
    program = tiny()
    groups, block = first(program, "feed_forward")
    assert isinstance(block, FeedForwardBlock) and block.up is not None
    walked = groups.of(block, "ffn_channels")
    mixing = insert_after(program, block.up.name, torch.ops.aten.cumsum.default, -1)
    entry = next(n for n in mixing.module.graph.nodes if n.name == linear_input(walked.exit).name)
    walk = Walk(mixing.module, None, Groups(mixing)._readers)
    with pytest.raises(BlockedError) as caught:
        walk.run({entry: Labels(2, torch.arange(28))})
    assert caught.value.code == "unknown_op" and "cumsum" in caught.value.reason


def test_a_weight_that_two_blocks_share_is_not_cut() -> None:
    program = tiny().copy()
    graph = program.module.graph
    nodes = {str(node.target): node for node in graph.find_nodes(op="get_attr")}
    nodes["model.layers.1.mlp.down.weight"].replace_all_uses_with(nodes["model.layers.0.mlp.down.weight"])
    groups, block = first(program, "feed_forward")
    with pytest.raises(BlockedError) as caught:
        groups.of(block, "ffn_channels")
    assert caught.value.code == "shared"


def test_tied_names_stay_tied() -> None:
    program = tiny().copy()
    names = [f"model.layers.0.mlp.{name}" for name in ("up", "gate")]
    up, gate = (program.module.get_submodule(name) for name in names)
    gate.register_parameter("weight", up.get_parameter("weight"))
    groups, block = first(program, "feed_forward")
    cut = Cut(groups.of(block, "ffn_channels"), (2,))
    pruned = Pruner(program).run([cut])
    first_weight, second_weight = (pruned.module.get_parameter(f"{name}.weight") for name in names)
    assert first_weight is second_weight and first_weight.shape[0] == 27
    assert pruned.parameter_count == program.parameter_count - cut.parameters
    torch.testing.assert_close(forward(pruned, 2, 7), masked(program, [cut], [], 2, 7), atol=1e-5, rtol=0)
