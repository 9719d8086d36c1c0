"""Costs against counting by hand on a tiny decoder."""

from __future__ import annotations

import pytest
import torch

from memc.cost import WEIGHT_BYTES, op_flops, predict
from memc.dialect.base import FETCHED
from memc.pipeline import parse_spec
from memc.program import Program
from memc.runtime.session import CHUNK
from memc.target import get_target
from tests.core.tiny import TinyConfig, tiny_program

CONTEXTS = (64, 4096)
CONFIG = TinyConfig()


@pytest.fixture(scope="module")
def program() -> Program:
    return tiny_program(CONFIG)


def products(config: TinyConfig) -> int:
    """Weights that every token is multiplied with."""
    attention = config.width * config.head_dim * (2 * config.heads + 2 * config.kv_heads)
    return config.layers * (attention + 3 * config.width * config.hidden) + config.vocab * config.width


def test_work_of_products_and_attention_is_counted(program: Program) -> None:
    cost = predict(program, get_target("cpu"), CONTEXTS)
    attention = {c: config_attention(c) for c in CONTEXTS}
    for context in CONTEXTS:
        counted = 2 * products(CONFIG) + attention[context]
        # Rotary and norms are small and counted too.
        assert counted <= cost.flops_by_context[context] <= counted * 1.2
    assert cost.flops_per_token == cost.flops_by_context[64]
    slope = (cost.flops_by_context[4096] - cost.flops_by_context[64]) / (4096 - 64)
    assert slope == pytest.approx((attention[4096] - attention[64]) / (4096 - 64))


def config_attention(context: int) -> float:
    return CONFIG.layers * 4.0 * CONFIG.heads * CONFIG.head_dim * context


def test_parameters_state_and_bytes(program: Program) -> None:
    cost = predict(program, get_target("cpu"), CONTEXTS)
    assert cost.parameters == program.parameter_count
    assert cost.weight_bytes == 4 * program.parameter_count
    assert cost.state_bytes == {c: program.state_bytes(c) for c in CONTEXTS}
    held = CONFIG.layers * 2 * CONFIG.kv_heads * CONFIG.head_dim * 4
    for context in CONTEXTS:
        assert cost.bytes_read_per_token[context] == pytest.approx(4 * program.parameter_count + held * context)


def test_an_untied_embedding_is_read_one_row_at_a_time() -> None:
    untied = tiny_program(TinyConfig(tied=False))
    cost = predict(untied, get_target("cpu"), (1,))
    unread = 4 * CONFIG.width * (CONFIG.vocab - 1)
    state = CONFIG.layers * 2 * CONFIG.kv_heads * CONFIG.head_dim * 4
    assert cost.bytes_read_per_token[1] == pytest.approx(4 * untied.parameter_count - unread + state)


def test_quantised_weights_are_smaller(program: Program) -> None:
    sizes = [
        predict(program, get_target("cpu"), CONTEXTS, weights=kind).weight_bytes for kind in ("fp32", "int8", "int4")
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] < sizes[0] / 4
    assert WEIGHT_BYTES["int4"] < 0.7


def test_roofline_moves_with_the_machine(program: Program) -> None:
    slow, fast = (predict(program, get_target(name), CONTEXTS) for name in ("riscv64", "nvidia-sm90"))
    assert slow.decode_ms[4096] > slow.decode_ms[64]
    assert slow.decode_ms[4096] > fast.decode_ms[4096] / 10
    one, two = (predict(program, get_target("cpu"), CONTEXTS, threads=n) for n in (1, 2))
    assert one.decode_ms[4096] >= two.decode_ms[4096]
    assert predict(program, get_target("c"), CONTEXTS).decode_ms == {}


def test_a_prompt_is_computed_in_pieces_and_its_last_logits_alone(program: Program) -> None:
    rates = {"memory_bandwidth": 1e30, "launch_overhead": 0.0, "flops": {"fp32": 1e9}}
    target = get_target("cpu").model_copy(update=rates)
    cost = predict(program, target, (1, CHUNK, CHUNK + 1, 2 * CHUNK, 1000), threads=1)
    at = predict(program, target, (1, 256, 257, 512, 768, 1000), threads=1).flops_by_context
    logits = 2 * CONFIG.vocab * CONFIG.width
    assert CHUNK == 256
    expected = {
        1: at[1],
        256: 256 * (at[256] - logits) + logits,
        257: 256 * (at[256] - logits) + at[257] + logits,
        512: 256 * (at[256] + at[512] - 2 * logits) + 2 * logits,
    }
    expected[1000] = expected[512] + 256 * (at[768] - logits) + 232 * (at[1000] - logits) + 2 * logits
    for length, flops in expected.items():
        assert cost.prefill_ms[length] == pytest.approx(1e3 * flops / 1e9, rel=1e-6), length


def test_a_prompt_reads_the_weights_once_a_piece_at_the_rate_of_prompts(program: Program) -> None:
    rates = {"memory_bandwidth": 1e6, "state_bandwidth": None, "launch_overhead": 1e-3, "flops": {"fp32": 1e30}}
    target = get_target("cpu").model_copy(update=rates)
    cost = predict(program, target, (1, 200, 300), threads=1)
    assert cost.prefill_ms[1] == pytest.approx(cost.decode_ms[1])
    assert cost.prefill_ms[200] == pytest.approx(cost.decode_ms[200])
    twice = predict(program, target, (256,), threads=1).decode_ms[256] + cost.decode_ms[300]
    assert cost.prefill_ms[300] == pytest.approx(twice)
    quick = target.model_copy(update={"memory_bandwidth": 1e30, "launch_overhead": 0.0, "flops": {"int8": 1e9}})
    slow, fast = (
        predict(program, quick.model_copy(update={"prompt_flops": found}), (200,), weights="int8", threads=1)
        for found in ({}, {"int8": 2e9})
    )
    assert fast.prefill_ms[200] == pytest.approx(slow.prefill_ms[200] / 2)
    assert fast.decode_ms == slow.decode_ms


def test_an_op_of_a_rate_of_its_own_takes_what_it_takes_besides(program: Program) -> None:
    rates = {"memory_bandwidth": 1e30, "launch_overhead": 0.0, "flops": {"fp32": 1e9}}
    target = get_target("cpu").model_copy(update=rates)
    apart = target.model_copy(update={"prompt_ops": {"attention": 1e8, "bank_ffn": 1.0}})
    lengths = (200, 256)
    all_alike, slow = (predict(program, one, lengths, threads=1) for one in (target, apart))
    for length in lengths:
        done = length * op_flops(program, "attention", length)
        assert done > 0
        assert slow.prefill_ms[length] - all_alike.prefill_ms[length] == pytest.approx(1e3 * done * (1 / 1e8 - 1 / 1e9))
    assert slow.decode_ms == all_alike.decode_ms
    halved = predict(program, apart, lengths, threads=2)
    assert halved.prefill_ms[200] == pytest.approx(slow.prefill_ms[200] / 2)


def test_a_prompt_that_chooses_reads_everything_to_choose_from(program: Program) -> None:
    rewrite = parse_spec("sparsify:method=bounds,page=4,budget=16,sinks=1,window=4,rerank=1,dense_below=256")
    sparse, _ = rewrite.apply(program, rewrite.plan(program, get_target("cpu")))
    name, heads = "sparse_attention", CONFIG.layers * CONFIG.heads
    dense = [4 * heads * CONFIG.head_dim * context for context in (256, 512, FETCHED, 4 * FETCHED)]
    found = [op_flops(sparse, name, context, prompt=True) for context in (256, 512, FETCHED, 4 * FETCHED)]
    assert found[:3] == pytest.approx(dense[:3]) and found[3] == found[2], "past that each fetches its own"
    assert op_flops(sparse, name, 512) < found[1] / 3, "a single token reads what it has chosen"
    rates = {"memory_bandwidth": 1e30, "launch_overhead": 0.0, "flops": {"fp32": 1e9}, "prompt_ops": {name: 1e8}}
    target = get_target("cpu").model_copy(update=rates)
    mine, original = (predict(one, target, (256, 512), threads=1).prefill_ms for one in (sparse, program))
    assert mine[256] == pytest.approx(original[256]), "below that it is attention like any other"
    less = op_flops(program, "attention", 512) / 1e9
    assert mine[512] - original[512] == pytest.approx(1e3 * 256 * (found[1] / 1e8 - less))


def test_a_prompt_whose_tokens_share_choices_reads_what_any_of_them_may(program: Program) -> None:
    rewrite = parse_spec("sparsify:method=bounds,page=4,budget=16,sinks=1,window=4,rerank=2,refresh=4,dense_below=64")
    sparse, _ = rewrite.apply(program, rewrite.plan(program, get_target("cpu")))
    name, values = "refreshed_attention", 2 * CONFIG.layers * CONFIG.heads * CONFIG.head_dim
    prompt, single = ([op_flops(sparse, name, n, prompt=p) for n in (64, 512, 4096)] for p in (True, False))
    assert prompt[0] == single[0] == 2 * values * 64, "below that it is attention like any other"
    assert prompt[1] - single[1] == prompt[2] - single[2] == values * (2 * 16 - 16), "half of the values weigh nothing"
    assert prompt[2] < op_flops(program, "attention", 4096) / 8


def test_without_rates_no_prompt_is_predicted(program: Program) -> None:
    assert predict(program, get_target("c"), CONTEXTS).prefill_ms == {}


def test_windows_make_cost_constant(program: Program) -> None:
    target = get_target("cpu")
    rewrite = parse_spec("window:window=16,sinks=2")
    windowed, _ = rewrite.apply(program, rewrite.plan(program, target))
    cost = predict(windowed, target, CONTEXTS)
    assert cost.state_bytes[64] == cost.state_bytes[4096]
    assert cost.flops_by_context[64] == cost.flops_by_context[4096]
    assert cost.bytes_read_per_token[64] == cost.bytes_read_per_token[4096]


def test_prediction_needs_no_weights(program: Program) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    bare = program.copy()
    fake = FakeTensorMode()
    expected = predict(program, get_target("cpu"), CONTEXTS)
    module = torch.fx.GraphModule(bare.module, bare.module.graph)
    with fake:
        made: dict[int, torch.nn.Parameter] = {}
        for owner in module.modules():
            for name, value in list(owner._parameters.items()):
                if value is not None:
                    made.setdefault(id(value), torch.nn.Parameter(torch.empty(value.shape)))
                    owner._parameters[name] = made[id(value)]
    bare.module = module
    assert predict(bare, get_target("cpu"), CONTEXTS) == expected
