"""Blocks that few families have: projections in steps, and norms between what is computed and its last projection."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from memc.blocks import AttentionBlock, FeedForwardBlock
from memc.frontend import huggingface
from memc.frontend.huggingface import model_info, trace_model
from memc.passes.linearize import Linearize
from memc.passes.memory_bank import MemoryBank
from memc.passes.prune import Prune
from memc.passes.sparsify import Sparsify
from memc.passes.window import Window
from memc.pipeline import Pass
from memc.program import Program
from memc.raising import Raised, raise_program
from memc.verify import split_invariance, well_formed
from tests.families import FFN, GROUPED, HEADS, HIDDEN, inputs_of, randomize
from tests.passes.tiny_program import TARGET

CONFIGS: dict[str, Any] = {
    "diffllama": lambda: tf.DiffLlamaConfig(**{**GROUPED, "num_attention_heads": 8, "num_key_value_heads": 4}),
    "bitnet": lambda: tf.BitNetConfig(**GROUPED),
    "deepseek_v3": lambda: tf.DeepseekV3Config(
        **{**GROUPED, "num_key_value_heads": HEADS},
        first_k_dense_replace=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        kv_lora_rank=16,
        q_lora_rank=24,
        qk_rope_head_dim=6,
        qk_nope_head_dim=10,
        v_head_dim=14,
        moe_intermediate_size=40,
    ),
}


@cache
def raised(name: str) -> tuple[Raised, Any]:
    module = huggingface.build(CONFIGS[name](), name, dtype=torch.float32)
    randomize(module)
    return raise_program(trace_model(module.eval(), model_info(module.config, name, ""))), module


def blocks_of(name: str, kind: type) -> list[Any]:
    return [block for block in raised(name)[0].blocks if isinstance(block, kind)]


def rewritten(name: str, pass_: Any) -> Program:
    program = raised(name)[0].program
    result: Program = pass_.apply(program, pass_.plan(program, TARGET))[0]
    assert well_formed(result) == []
    return result


def tokens_of(program: Program, length: int) -> Tensor:
    return inputs_of(program, 2, length)[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_original(name: str) -> None:
    result, module = raised(name)
    assert result.program.raised and not result.near_misses
    tokens = tokens_of(result.program, 11)
    with torch.no_grad():
        torch.testing.assert_close(result.program.run(tokens), module(tokens).logits, rtol=0, atol=1e-5)


def test_a_norm_before_the_last_projection_hides_neither_network_nor_projection() -> None:
    for block in blocks_of("bitnet", FeedForwardBlock):
        assert (block.kind, block.activation, block.width, block.hidden) == ("feed_forward", "relu2", HIDDEN, FFN)
        assert block.gate is not None and block.gate is not block.up
    assert len(blocks_of("bitnet", FeedForwardBlock)) == 2
    assert all("output" in block.projections for block in blocks_of("bitnet", AttentionBlock))


def test_channels_and_heads_under_such_a_norm_stay_and_whole_blocks_go() -> None:
    program = raised("bitnet")[0].program
    for unit in ("ffn", "heads"):
        plan = Prune(unit=unit, amount=0.3, round=8, protect="none", protect_heads="none").plan(program, TARGET)
        assert not plan.sites and {each.code for each in plan.rejections} == {"norm"}
    for unit in ("ffn_blocks", "attention_blocks"):
        less = rewritten("bitnet", Prune(unit=unit, amount=0.2, protect="none", protect_heads="none"))
        assert less.parameter_count < program.parameter_count


def test_a_memory_stands_beside_a_network_with_a_norm_of_its_own() -> None:
    program = raised("bitnet")[0].program
    result, tokens = rewritten("bitnet", MemoryBank(ranks="4")), tokens_of(program, 9)
    assert torch.equal(result.run(tokens), program.run(tokens)) and split_invariance(result, tokens).passed


def test_what_is_projected_in_steps_has_an_input() -> None:
    for block in blocks_of("deepseek_v3", AttentionBlock):
        assert block.hidden is not None and int(block.hidden.meta["val"].shape[-1]) == HIDDEN
        assert block.hidden.target == torch.ops.memc.norm.default
        assert f"layers.{block.layer}" in str(block.hidden.meta["memc"]["path"])
        assert (block.head_dim, block.value_dim) == (16, 14)


@pytest.mark.parametrize("options", [{}, {"gate": "channel"}, {"update": "gated_delta"}], ids=str)
def test_latent_attention_becomes_linear_and_short_prompts_stay(options: dict[str, Any]) -> None:
    program = raised("deepseek_v3")[0].program
    result = rewritten("deepseek_v3", Linearize(window=6, sinks=1, feature_size=8, **options))
    assert not any(spec.grows for spec in result.states)
    for length in (1, 6):
        tokens = tokens_of(program, length)
        torch.testing.assert_close(result.run(tokens), program.run(tokens), rtol=0, atol=1e-5)
    with torch.no_grad():
        for name, value in result.module.named_parameters():
            if name.endswith("mass_bias"):
                value.fill_(1.0)
    assert split_invariance(result, tokens_of(program, 9)).passed


def test_experts_that_are_chosen_by_groups_are_one_mixture() -> None:
    found = [(block.layer, block.kind, block.path) for block in blocks_of("deepseek_v3", FeedForwardBlock)]
    mixed, shared = "model.layers.1.mlp", "model.layers.1.mlp.shared_experts"
    assert found == [
        (0, "feed_forward", "model.layers.0.mlp"),
        (1, "feed_forward", shared),
        (1, "moe", mixed),
    ]


@pytest.mark.parametrize(
    "pass_",
    [Window(window=6), Linearize(window=6, feature_size=8), Sparsify(budget=16, page=2, window=4, dense_below=6)],
)
def test_two_attentions_that_are_a_difference_are_both_rewritten(pass_: Pass) -> None:
    program = raised("diffllama")[0].program
    plan = pass_.plan(program, TARGET)
    assert [site.layer for site in plan.sites] == [0, 0, 1, 1] and not plan.rejections
    assert list(pass_.apply(program, plan)[1].details) == ["0", "0 (2)", "1", "1 (2)"]
    result = rewritten("diffllama", pass_)
    assert not result.module.graph.find_nodes(op="call_function", target=torch.ops.memc.attention.default)
    tokens = tokens_of(program, 6)
    torch.testing.assert_close(result.run(tokens), program.run(tokens), rtol=0, atol=1e-5)
    assert split_invariance(result, tokens_of(program, 20)).passed


def test_a_part_that_is_rotated_by_itself_is_refused_where_rotation_has_to_go() -> None:
    plan = Linearize(form="lizard", window=6).plan(raised("deepseek_v3")[0].program, TARGET)
    assert not plan.sites and {each.code for each in plan.rejections} == {"rotary"}
    assert "form=shared" in plan.rejections[0].reason
    by_distance = Sparsify(budget=64, page=4, window=4, retrieve="decay:50%")
    plan = by_distance.plan(raised("deepseek_v3")[0].program, TARGET)
    assert not plan.sites and {each.code for each in plan.rejections} == {"rotary"}
    assert replace(by_distance, retrieve="heads:50%").plan(raised("deepseek_v3")[0].program, TARGET).sites
