"""What rewriting one block alone loses: against whole runs, and no more often than has to be."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from memc.analysis.sensitivity import Distance, Yardstick, unchanged
from memc.fit import menu
from memc.fit.weights import quantised
from memc.program import get_tensor, set_tensor
from memc.quantise import quantise
from memc.verify.execute import whole
from tests.core.fitting import LENGTH, PRESENT, SETTINGS, TARGET, calibrate, on_offer
from tests.passes.tiny_program import tiny, tokens_of


@pytest.fixture(autouse=True)
def _offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memc.fit.menu.offered", lambda: SETTINGS)


def oracle(original: Any, result: Any, tokens: torch.Tensor, first: int) -> Distance:
    """Run both whole."""
    found = Distance()
    for row in tokens:
        before, after = (
            whole(side, row[None])[0, first:].double().log_softmax(-1).detach() for side in (original, result)
        )
        kl = float((before.exp() * (before - after)).sum())
        excess = float((before - after)[:-1].gather(1, row[first + 1 :, None]).sum())
        found += Distance(len(before), kl, len(before) - 1, excess)
    return found


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"window": 20}], ids=str)
@pytest.mark.parametrize("layer", [0, 1])
def test_distances_are_those_of_whole_runs(options: dict[str, Any], layer: int) -> None:
    original, tokens = tiny(**options), tokens_of(2, LENGTH, 3)
    results = [dict(one.alone(original, [0, 1], calibrate))[layer] for one in on_offer(original)]
    assert len(results) >= 4
    for found, result in zip(Yardstick(original, tokens, 20).distances(results), results, strict=True):
        expected = oracle(original, result, tokens, 20)
        assert found.tokens == expected.tokens == 2 * (LENGTH - 20) and found.segments == 2
        assert found.kl == pytest.approx(expected.kl, rel=1e-3, abs=1e-5)
        assert found.excess == pytest.approx(expected.excess, rel=1e-3, abs=1e-4)
        assert found.kl > 0


def test_the_original_runs_once_for_blocks_in_order_and_anew_for_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    original, tokens = tiny(), tokens_of(2, LENGTH, 3)
    setting = next(one for one in on_offer(original) if one.pass_.name == "window")
    programs = dict(setting.alone(original, [0, 1], calibrate))
    yard, made = Yardstick(original, tokens, 20), list[None]()
    fresh = Yardstick._fresh
    monkeypatch.setattr(Yardstick, "_fresh", lambda self: (made.append(None), fresh(self))[1])
    first, second = (yard.distances([programs[layer]]) for layer in (0, 1))
    assert not made
    assert yard.distances([programs[0]]) == first and len(made) == 1
    assert yard.distances([programs[1]]) == second and len(made) == 1


def test_what_is_known_well_enough_is_looked_at_no_further() -> None:
    original, tokens = tiny(), tokens_of(3, 200, 3)
    (program,) = (p for layer, p in on_offer(original)[2].alone(original, [1], calibrate))
    (whole,) = Yardstick(original, tokens, 8).distances([program])
    one, never = (Yardstick(original, tokens, 8).distances([program], precise=p)[0] for p in (10.0, 1e-9))
    assert (one.segments, never.segments) == (6, 18) and never == whole
    assert 0 < whole.error < one.error < math.inf
    parts = [Distance(1, kl, 0, 0.0, 1, kl * kl) for kl in (1.0, 2.0, 3.0, 6.0)]
    total = sum(parts, Distance())
    spread = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert total.error == pytest.approx(float(spread.std()) * 2 / 12)


def test_each_layer_alone_is_as_if_it_were_rewritten_alone() -> None:
    """One run of the text serves all layers: what comes of it is what the pass makes, told that one layer."""
    original = tiny()
    for setting in on_offer(original)[:3]:
        found = dict(setting.alone(original, [0, 1], calibrate))
        assert list(found) == [0, 1]
        for layer, program in found.items():
            expected = menu.rewritten(original, TARGET, [(setting, [layer])], PRESENT, calibrate)
            tokens = tokens_of(1, LENGTH, 1)
            assert torch.allclose(whole(program, tokens), whole(expected, tokens), atol=1e-4), setting.spec


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_products_take_what_the_codes_stand_for(kind: str) -> None:
    original, tokens = tiny(), tokens_of(1, LENGTH, 2)
    result = quantised(original, kind)
    assert quantised(original, "fp32") is original
    linears = [node for node in result.module.graph.nodes if node.target == torch.ops.aten.linear.default]
    for index, node in enumerate(linears):
        value = get_tensor(result.module, str(node.args[1].target)).detach()
        old = original.module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[index]
        bits = 8 if kind == "int8" or node is linears[-1] else 4
        codes = quantise(get_tensor(original.module, str(old.args[1].target)).detach().numpy(), bits)
        assert np.array_equal(value.numpy(), codes.values(value.shape[1]))
    (found,) = Yardstick(original, tokens, 10).distances([result])
    assert found.kl == pytest.approx(oracle(original, result, tokens, 10).kl, rel=1e-3, abs=1e-5)
    assert found.kl > 0


def test_only_what_follows_the_layer_counts_as_changed() -> None:
    original = tiny()
    window = next(one for one in on_offer(original) if one.pass_.name == "window")
    late = menu.rewritten(original, TARGET, [(window, [1])], PRESENT)
    same = unchanged(original, late)
    attentions = [node for node in late.module.graph.nodes if node.target is torch.ops.memc.attention.default]
    assert len(attentions) == 1 and attentions[0] in same
    assert late.module.graph.output_node() not in same


def test_a_node_whose_constant_or_parameter_changed_is_not_the_same() -> None:
    original = tiny()
    for change in ("parameter", "constant"):
        result = original.copy()
        attention = result.module.graph.find_nodes(op="call_function", target=torch.ops.memc.attention.default)[0]
        if change == "constant":
            attention.kwargs = {**attention.kwargs, "window": 5}
        else:
            product = result.module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[0]
            name = str(product.args[1].target)
            set_tensor(result.module, name, get_tensor(original.module, name) + 1, trainable=True)
        assert attention.name in {node.name for node in unchanged(original, original.copy())}
        assert attention.name not in {node.name for node in unchanged(original, result)}
