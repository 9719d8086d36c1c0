"""The linearize pass: identity, both forms against their equations, state law, gradients, export, planted faults."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.export import Dim, export
from torch.fx import Node

from memc.dialect import OPS, arguments
from memc.infer import infer
from memc.passes.linearize import Linearize
from memc.passes.window import Window
from memc.pipeline import PassReport
from memc.program import Program, retie
from memc.relation import Bounded, Close
from memc.rewrite import result_of
from memc.verify import split_invariance
from tests.core.tiny import TinyConfig, tiny_program
from tests.passes.oracle import layer_parameters, lizard_attention, shared_attention
from tests.passes.tiny_program import SLOPES, TARGET, naive_run, run_pieces, tiny, tokens_of

SMALL: dict[str, Any] = {"window": 5, "sinks": 2, "feature_size": 12}
MEMORY = torch.ops.memc.linear_memory.default


def rewrite(program: Program, options: Linearize) -> tuple[Program, PassReport]:
    return options.apply(program, options.plan(program, TARGET))


def shake(program: Program, mass: float = 1.0, seed: int = 0) -> Program:
    """Give every new parameter values as training might: the memory on, everything data-dependent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in program.module.named_parameters():
            if name.startswith("memc."):
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
                if name.endswith(("mass_bias", "gate_bias")):
                    p.copy_((mass if "mass" in name else 1.0) + 0.5 * torch.randn(p.shape, generator=generator))
    return program


@settings(max_examples=4, deadline=None)
@given(
    window=st.integers(1, 9),
    sinks=st.integers(0, 4),
    gate=st.sampled_from(["none", "head", "token", "channel"]),
    update=st.sampled_from(["gated", "gated_delta"]),
    batch=st.integers(1, 3),
)
def test_short_prompts_give_the_original_logits_trained_or_not(
    window: int, sinks: int, gate: str, update: str, batch: int
) -> None:
    program = tiny(layers=1)
    options = Linearize(window=window, sinks=sinks, gate=gate, update=update, feature_size=8)
    result = shake(rewrite(program, options)[0], mass=10.0)
    tokens = tokens_of(batch, window, seed=window)
    torch.testing.assert_close(result.run(tokens), program.run(tokens), atol=1e-5, rtol=0)


def test_untrained_memory_is_all_but_off() -> None:
    program = tiny()
    tokens = tokens_of(2, 40)
    window = Window(window=5, sinks=2)
    reference = window.apply(program, window.plan(program, TARGET))[0].run(tokens)
    for update in ("gated", "gated_delta"):
        result = rewrite(program, Linearize(**SMALL, update=update))[0].run(tokens)
        torch.testing.assert_close(result, reference, atol=1e-5, rtol=0)
        assert (result - program.run(tokens)).abs().max() > 1e-2


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"gate": "none"},
        {"gate": "head"},
        {"gate": "channel"},
        {"feature": "hedgehog"},
        {"feature": "elu"},
        {"feature": "relu"},
        {"update": "gated_delta"},
        {"update": "gated_delta", "gate": "channel"},
        {"sinks": 0},
        {"feature_size": 20},
    ],
    ids=str,
)
def test_shared_form_equals_the_shared_denominator(choice: dict[str, Any]) -> None:
    program = tiny()
    options = Linearize(**{**SMALL, **choice})
    result = shake(rewrite(program, options)[0])
    tokens = tokens_of(2, 17)
    expected = naive_run(program, shared_attention(result, options), tokens)
    torch.testing.assert_close(result.run(tokens), expected, atol=5e-5, rtol=0)


def test_shared_form_keeps_softcap_and_the_models_own_sinks() -> None:
    program = tiny(softcap=2.0, sink_logits=(0.5, -1.0, 2.0, 0.0))
    options = Linearize(**SMALL)
    result = shake(rewrite(program, options)[0])
    tokens = tokens_of(2, 17)
    expected = naive_run(program, shared_attention(result, options), tokens)
    torch.testing.assert_close(result.run(tokens), expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("gate", ["none", "head", "token", "channel"])
def test_shared_form_keeps_alibi_and_starts_to_forget_as_it_does(gate: str) -> None:
    program = tiny(slopes=SLOPES)
    options = Linearize(**SMALL, gate=gate)
    result, report = rewrite(program, options)
    assert report.relations[0] == Close(1e-4, tokens=5) and [site.layer for site in report.sites] == [0, 1]
    if gate != "none":
        bias = layer_parameters(result, 0)["gate_bias"]
        rates = torch.tensor(SLOPES).double().unflatten(0, (2, 2)).mean(1)
        torch.testing.assert_close(-torch.sigmoid(bias).log(), rates.reshape(2, *[1] * (bias.ndim - 1)).expand_as(bias))
    short, tokens = tokens_of(2, 5), tokens_of(2, 17)
    torch.testing.assert_close(result.run(short), program.run(short), atol=1e-5, rtol=0)
    expected = naive_run(program, shared_attention(shake(result), options), tokens)
    torch.testing.assert_close(result.run(tokens), expected, atol=5e-5, rtol=0)


def test_heads_that_stay_take_their_slopes_with_them() -> None:
    program = tiny(slopes=SLOPES)
    result, report = rewrite(program, Linearize(**SMALL, gate="head", keep="heads:[0.0]"))
    rate = sum(SLOPES[2:]) / 2
    assert -layer_parameters(result, 0)["gate_bias"].sigmoid().log() == pytest.approx(rate)
    (objective,) = (each for each in report.objectives if each.layer == 0)
    assert objective.heads == (2, 3)
    short = tokens_of(2, 5)
    torch.testing.assert_close(result.run(short), program.run(short), atol=1e-5, rtol=0)


@pytest.mark.parametrize("choice", [{}, {"gate": "channel"}, {"gate": "none", "meta": 0}, {"gate": "head"}], ids=str)
def test_lizard_form_equals_the_paper(choice: dict[str, Any]) -> None:
    program = tiny()
    options = Linearize(form="lizard", window=5, feature_size=12, **choice)
    result, report = rewrite(program, options)
    assert report.relations == (Bounded("perplexity_ratio", None),)
    shake(result)
    tokens = tokens_of(2, 14)
    expected = naive_run(program, lizard_attention(result, options), tokens)
    torch.testing.assert_close(result.run(tokens), expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("options", [Linearize(**SMALL), Linearize(form="lizard", window=5, feature_size=12)], ids=str)
@settings(max_examples=4, deadline=None)
@given(cuts=st.lists(st.integers(1, 19), max_size=4), seed=st.integers(0, 99))
def test_any_split_equals_one_run(options: Linearize, cuts: list[int], seed: int) -> None:
    result = shake(rewrite(tiny(layers=1), options)[0], seed=seed)
    tokens = tokens_of(2, 20, seed)
    positions = torch.arange(20).expand_as(tokens)
    torch.testing.assert_close(run_pieces(result, tokens, positions, cuts), result.run(tokens), atol=5e-5, rtol=0)


@pytest.mark.parametrize("update", ["gated", "gated_delta"])
def test_a_padded_batch_equals_one_sequence_at_a_time(update: str) -> None:
    result = shake(rewrite(tiny(), Linearize(**SMALL, update=update))[0])
    lengths, width = [3, 14, 20], 20
    tokens, positions = tokens_of(3, width), torch.full((3, width), -1)
    places = []
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(row)
        place = torch.randperm(width, generator=generator)[:length].sort().values
        positions[row, place] = torch.arange(length)
        places.append(place)
    together = run_pieces(result, tokens, positions, [4, 13])
    for row, place in enumerate(places):
        alone = result.run(tokens[row : row + 1, place])
        torch.testing.assert_close(together[row, place], alone[0], atol=5e-5, rtol=0)


def test_a_new_sequence_forgets_the_old_one() -> None:
    result = shake(rewrite(tiny(layers=1), Linearize(**SMALL))[0])
    first, second = tokens_of(1, 13, 1), tokens_of(1, 16, 2)
    positions = torch.cat([torch.arange(13), torch.arange(16)])[None]
    both = run_pieces(result, torch.cat([first, second], 1), positions, [12, 15])
    torch.testing.assert_close(both[:, 13:], result.run(second), atol=5e-5, rtol=0)


@pytest.mark.parametrize("form", ["shared", "lizard"])
@pytest.mark.parametrize("gate", ["head", "token", "channel"])
def test_gradients_reach_every_new_parameter(form: str, gate: str) -> None:
    sizes = {"window": 5, "feature_size": 12}
    result = rewrite(tiny(), Linearize(form=form, gate=gate, **sizes))[0]  # type: ignore[arg-type]
    for setting in ("untrained", "strong gates"):
        if setting == "strong gates":
            shake(result)
            with torch.no_grad():
                for name, p in result.module.named_parameters():
                    if name.endswith("gate_bias"):
                        p.fill_(-60.0)
        result.module.zero_grad()
        result.run(tokens_of(2, 20)).square().sum().backward()
        for name, p in result.module.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), name
            if setting == "untrained":
                assert p.grad.abs().max() > 0, name


def test_gated_delta_gradients_reach_every_new_parameter() -> None:
    result = shake(rewrite(tiny(), Linearize(**SMALL, update="gated_delta"))[0])
    result.module.zero_grad()
    result.run(tokens_of(2, 20)).square().sum().backward()
    for name, p in result.module.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


def example_inputs(program: Program, batch: int, length: int, held: int) -> tuple[Tensor, ...]:
    tokens = tokens_of(batch, length)
    states = [
        torch.full([{"B": batch, "S": held}.get(n, n) for n in spec.shape], spec.init, dtype=spec.dtype)  # type: ignore[arg-type]
        for spec in program.states
    ]
    return tokens, torch.arange(length).expand_as(tokens), *states


@pytest.mark.parametrize(
    "options",
    [
        Linearize(**SMALL, keep="[1]"),
        Linearize(form="lizard", window=5),
        Linearize(**SMALL, keep="heads:[0.1,1.0]"),
    ],
    ids=str,
)
def test_one_exported_graph_serves_every_size(options: Linearize) -> None:
    result = shake(rewrite(tiny(), options)[0])
    dims = {"B": Dim("B", min=1), "T": Dim("T", min=1), "S": Dim("S", min=0)}
    sizes = [spec.shape for spec in result.inputs] + [spec.shape for spec in result.states]
    shapes = tuple({axis: dims[n] for axis, n in enumerate(shape) if isinstance(n, str)} for shape in sizes)
    exported = export(result.module, example_inputs(result, 2, 7, 3), dynamic_shapes=shapes).module()
    for batch, length in ((1, 1), (3, 1), (1, 19), (4, 6)):
        inputs = example_inputs(result, batch, length, 0)
        for got, want in zip(exported(*inputs), result(*inputs), strict=True):
            torch.testing.assert_close(got, want)


def test_shapes_are_inferred_with_symbolic_batch_and_length() -> None:
    result = rewrite(tiny(), Linearize(**SMALL))[0]
    new = [n for n in result.module.graph.nodes if n.op == "call_function" and n.meta.get("memc", {}).get("path")]
    assert len(new) > 40
    for node in new:
        assert node.meta["memc"]["path"].startswith("model.layers.")
        value = node.meta["val"]
        if isinstance(value, Tensor) and value.dim() >= 3:
            assert isinstance(value.shape[0], torch.SymInt), node


def test_states_parameters_and_report() -> None:
    program = tiny()
    result, report = rewrite(program, Linearize(**SMALL, keep="first:1"))
    names = ["layer0_key", "layer0_value", "layer0_positions"]
    names += ["layer1_key", "layer1_value", "layer1_positions", "layer1_memory"]
    assert [spec.name for spec in result.states] == names
    assert result.states[-1].shape == ("B", 2, 12, 11)
    new = {n: p for n, p in result.module.named_parameters() if n.startswith("memc.linearize.layers.1.")}
    assert all(p.dtype == torch.float32 and p.requires_grad for p in new.values())
    assert {result.provenance[name].transform for name in new} == {"linearize"}
    assert report.untrained and report.new_parameters == sum(p.numel() for p in new.values())
    window, memory = 7 * (2 * 20 * 4 + 8), 2 * 12 * 11 * 4
    assert report.details["1"]["state_bytes"] == window + memory
    assert report.relations == (Close(1e-4, tokens=5), Bounded("perplexity_ratio_to_window", 1.001))
    assert not any("memc" in name for name, _ in program.module.named_parameters())
    assert dict(program.module.named_parameters())["model.embed.weight"] is result.module.get_parameter(
        "model.embed.weight"
    )


def test_applying_twice_gives_the_same_weights() -> None:
    program = tiny()
    a, b = (rewrite(program, Linearize(**SMALL))[0].module.state_dict() for _ in range(2))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "options",
    [
        Linearize(**SMALL),
        Window(window=5),
        Linearize(form="lizard"),
        Linearize(**SMALL, keep="heads:[0.1]"),
        Linearize(**SMALL, keep="heads:25%"),
    ],
    ids=str,
)
def test_rewrites_without_weights_as_with_them(options: Linearize | Window) -> None:
    real = tiny()
    fake = real.copy()
    mode = next(n.meta["val"].fake_mode for n in fake.module.graph.nodes if n.op == "placeholder")
    with mode:
        empty = {p: torch.empty(p.shape) for p in fake.module.parameters()}
    retie(fake.module, {name: empty[p] for name, p in fake.module.named_parameters(remove_duplicate=False)})
    plan = options.plan(fake, TARGET)
    assert plan == options.plan(real, TARGET) == options.plan(real, TARGET)
    planned, report = options.apply(fake, plan)
    done, same = options.apply(real, plan)
    assert planned.is_fake and planned.states == done.states and report == same
    assert [str(n) for n in planned.module.graph.nodes] == [str(n) for n in done.module.graph.nodes]
    assert {n: p.shape for n, p in planned.module.named_parameters()} == {
        n: p.shape for n, p in done.module.named_parameters()
    }


def test_a_bfloat16_model_keeps_its_type_and_its_identity() -> None:
    program = tiny_program(TinyConfig(layers=1))
    program.module.to(torch.bfloat16)
    specs = [
        type(s)(s.name, torch.bfloat16 if s.dtype == torch.float32 else s.dtype, s.shape, s.init, s.grows)
        for s in program.states
    ]
    program = program.with_states(specs)
    infer(program)
    result = shake(rewrite(program, Linearize(**SMALL))[0])
    kinds = {n: p.dtype for n, p in result.module.named_parameters()}
    assert all((dtype == torch.float32) == name.startswith("memc.") for name, dtype in kinds.items())
    tokens = tokens_of(2, 5)
    assert torch.equal(result.run(tokens), program.run(tokens))
    assert result.run(tokens_of(2, 20)).isfinite().all()


def fault_counts_the_window(program: Program, node: Node) -> None:
    """The memory gets the token that came instead of the one that left."""
    a = arguments(node)
    for index, name in ((2, "key"), (3, "value"), (4, "positions")):
        left = result_of(node, index)
        assert left is not None
        left.replace_all_uses_with(a[name])


def fault_misses_a_token(program: Program, node: Node) -> None:
    left = result_of(node, 4)
    assert left is not None
    (compare,) = left.users
    compare.args = (left, 1 + SMALL["sinks"])


def fault_denominator_without_scale(program: Program, node: Node) -> None:
    """N e^c / (e^lse + D): the scale c is on the numerator alone."""
    graph = program.module.graph
    lse = result_of(node, 1)
    assert lse is not None
    (difference,) = lse.users
    total = difference.args[0]
    assert isinstance(total, Node)
    scale, log = total.args
    difference.args = (log, lse)
    window = next(n for n in graph.nodes if n.target is torch.ops.aten.div.Tensor and list(graph.nodes).index(n) > 0)
    (gap,) = window.users
    with graph.inserting_before(gap):
        factor = graph.call_function(torch.ops.aten.exp.default, (scale,))
        factor = graph.call_function(torch.ops.aten.unsqueeze.default, (factor, -1))
        read = graph.call_function(torch.ops.aten.mul.Tensor, (window, factor))
    gap.replace_input_with(window, read)
    graph.lint()


@pytest.mark.parametrize(
    "fault",
    [None, fault_counts_the_window, fault_misses_a_token, fault_denominator_without_scale],
    ids=lambda fault: getattr(fault, "__name__", "none"),
)
def test_the_oracle_sees_planted_faults(fault: Any) -> None:
    program = tiny(layers=1)
    options = Linearize(**SMALL)
    result = shake(rewrite(program, options)[0])
    tokens = tokens_of(2, 17)
    expected = naive_run(program, shared_attention(result, options), tokens)
    if fault is not None:
        (node,) = result.module.graph.find_nodes(op="call_function", target=OPS["window_memory"].overload)
        fault(result, node)
        result.module.recompile()
    error = (result.run(tokens) - expected).abs().max()
    assert error < 5e-5 if fault is None else error > 1e-3


@pytest.mark.parametrize("options", [{"update": "gated"}, {"update": "gated_delta"}, {"gate": "channel", "sinks": 0}])
def test_a_split_is_checked_past_the_window_and_a_fault_in_the_memory_is_found(options: dict[str, Any]) -> None:
    """The tokens of the check fit into the window, where the memory holds nothing and any fault of it is silent."""
    result = shake(rewrite(tiny(), Linearize(**{**SMALL, "window": 20, **options}))[0], mass=5.0)
    tokens = tokens_of(3, 7)
    assert split_invariance(result, tokens).passed
    memory = next(iter(result.module.graph.find_nodes(op="call_function", target=MEMORY)))
    after = result_of(memory, 1)
    assert after is not None
    with result.module.graph.inserting_after(after):
        wrong = result.module.graph.call_function(torch.ops.aten.mul.Tensor, (after, 1.1))
    after.replace_all_uses_with(wrong, delete_user_cb=lambda user: user is not wrong)
    result.module.recompile()
    check = split_invariance(result, tokens)
    assert not check.passed and "behind" in check.detail
