"""``sparsify:method=em``: events of the whole model, which all of its layers take, in calls of any length up to one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from memc.cost import predict
from memc.dialect import OPS, arguments
from memc.errors import MemcError
from memc.passes.sparsify import Sparsify
from memc.passes.sparsify.events import HISTORY
from memc.program import Program
from memc.program_io import load_program, save_program
from memc.relation import Bounded, Close
from memc.verify import split_invariance, well_formed
from memc.verify.execute import cut, logits, longest_call, run_nodes
from tests.kernels.events_oracle import numbered
from tests.passes.tiny_program import TARGET, run_pieces, tiny, tokens_of

SMALL: dict[str, Any] = {"method": "em", "budget": 12, "page": 3, "sinks": 1, "window": 2, "dense_below": 0}
SMALL |= {"longest": 4, "calls": 6}


def rewrite(program: Program, **options: Any) -> Program:
    sparsify = Sparsify(**{**SMALL, **options})
    return sparsify.apply(program, sparsify.plan(program, TARGET))[0]


def ends(length: int, each: int) -> list[int]:
    return list(range(each, length, each))


def test_what_follows_from_the_method() -> None:
    sparsify = Sparsify(method="em")
    assert (sparsify.page_size, sparsify.exact_to, sparsify.spec) == (64, 1024, "sparsify:method=em")
    plan = sparsify.plan(tiny(), TARGET)
    assert plan.relations == (Close(1e-4, tokens=1024), Bounded("perplexity_ratio", None))
    result, report = sparsify.apply(tiny(), plan)
    assert not report.untrained and report.new_parameters == 0
    assert longest_call(result) == 256 and cut(result, 600) == [256, 256, 88] and cut(tiny(), 600) == [600]
    # Logits, surprises, and 65 keys of 2 heads of 10, in float32.
    assert report.details["1"]["event_bytes"] == 4 * (37 + HISTORY + 65 * 20)


@pytest.mark.parametrize("options", [{}, {"dense_below": 17}])
def test_short_prompts_give_the_original_logits(options: dict[str, Any]) -> None:
    program, exact = tiny(), max(12, options.get("dense_below", 0))
    tokens = tokens_of(2, exact + 4)
    away = (rewrite(program, **options).run(tokens) - program.run(tokens)).abs().amax((0, 2))
    assert away[:exact].max() < 1e-5 < 1e-3 < away[exact:].max()


@pytest.mark.parametrize("options", [{}, {"refine": "conductance"}, {"retrieve": "heads:[0.1]"}])
def test_calls_of_up_to_the_longest_are_alike_and_longer_ones_are_not(options: dict[str, Any]) -> None:
    result, tokens = rewrite(tiny(), **options), tokens_of(2, 40)
    assert well_formed(result) == []
    check = split_invariance(result, tokens)
    assert check.passed and check.budget == 1e-4
    positions = torch.arange(40).expand_as(tokens)
    once = run_pieces(result, tokens, positions, ends(40, 1))
    torch.testing.assert_close(torch.cat([*logits(result, tokens)], 1), once, atol=2e-5, rtol=0)
    torch.testing.assert_close(
        run_pieces(result, tokens, positions, [5, 9, 15, 21, 22, 28, 34]), once, atol=2e-5, rtol=0
    )
    assert (run_pieces(result, tokens, positions, [20]) - once).abs().max() > 1e-3


def test_a_check_sees_choices_that_depend_on_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A delay that is one short of what makes calls alike: the newest numbers are not there in a long call."""
    result = rewrite(tiny(), calls=2)
    monkeypatch.setattr("memc.verify.execute.longest_call", lambda program: 6)
    assert not split_invariance(result, tokens_of(2, 40)).passed


@pytest.mark.parametrize(("refine", "gamma"), [("modularity", 1.0), ("none", 0.3)])
def test_all_layers_read_the_numbers_that_the_logits_and_the_last_keys_before_rotation_give(
    refine: str, gamma: float
) -> None:
    result, tokens = rewrite(tiny(), refine=refine, gamma=gamma), tokens_of(2, 6)
    (found,) = result.module.graph.find_nodes(op="call_function", target=OPS["events"].overload)
    layers = result.module.graph.find_nodes(op="call_function", target=OPS["sparse_attention"].overload)
    given, last = arguments(found), arguments(layers[-1])
    assert (
        given["key"] is arguments(last["key"])["x"] and given["logits"] is result.module.graph.output_node().args[0][0]
    )
    assert len(layers) == 2 and all(arguments(node)["events"] is given["past_events"] for node in layers)
    seen: dict[Node, Any] = {}
    state = result.new_state(2)
    with torch.no_grad():
        positions = torch.arange(6).expand_as(tokens)
        after = run_nodes(result, (tokens, positions, *state), visit=lambda node, value: seen.update({node: value}))
    names = [spec.name for spec in result.states]
    numbers: Tensor = after[1 + names.index("event_numbers")]
    rule = {"gamma": gamma, "longest": 4, "refine": refine, "history": HISTORY}
    for row in range(2):
        key, ids = seen[given["key"]][row].double(), tokens[row].tolist()
        assert numbers[row].tolist() == numbered(after[0][row].double(), ids, key, **rule)[1]


def test_a_new_sequence_forgets_the_events_of_the_old_one() -> None:
    result = rewrite(tiny())
    first, second = tokens_of(1, 25, 1), tokens_of(1, 30, 2)
    positions = torch.cat([torch.arange(25), torch.arange(30)])[None]
    both = run_pieces(result, torch.cat([first, second], 1), positions, ends(55, 6))
    alone = run_pieces(result, second, torch.arange(30)[None], ends(30, 5))
    torch.testing.assert_close(both[:, 25:], alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize("other", [{"gamma": 0.2}, {"contiguity": 0.0}, {"longest": 2}])
def test_every_option_is_another_function(other: dict[str, Any]) -> None:
    tokens = tokens_of(2, 60)
    one, another = (torch.cat([*logits(rewrite(tiny(), **x), tokens)], 1) for x in ({}, other))
    assert (one - another).abs().max() > 1e-3


def test_states_survive_the_disk_and_are_told_of(tmp_path: Path) -> None:
    program, tokens = tiny(), tokens_of(2, 40)
    result = rewrite(program)
    lowbit = rewrite(program, method="lowbit", rerank=1, longest=64, calls=256)
    assert [spec.name for spec in result.states[-5:]] == [
        *("event_numbers", "event_positions", "event_logits", "event_surprises", "event_keys")
    ]
    assert result.state_bytes(30) == lowbit.state_bytes(30) + 30 * 16 + 4 * (37 + HISTORY + 5 * 20)
    bytes_read = [predict(p, TARGET, (4096,)).bytes_read_per_token[4096] for p in (lowbit, result)]
    assert bytes_read[1] == pytest.approx(bytes_read[0] + 4 * (37 + HISTORY + 5 * 20))
    save_program(result, tmp_path)
    loaded = load_program(tmp_path)
    assert loaded.states == result.states and longest_call(loaded) == 6
    assert torch.equal(loaded.run(tokens), result.run(tokens))


def test_heads_that_all_stream_take_no_events() -> None:
    result = rewrite(tiny(), retrieve="heads:[]")
    assert not result.module.graph.find_nodes(op="call_function", target=OPS["events"].overload)
    assert not [spec for spec in result.states if spec.name.startswith("event")]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rerank": 2}, "read whole.*leave 'rerank' out"),
        ({"refresh": 2}, "each chooses for itself"),
        ({"mass": 0.5}, "nothing of the share"),
        ({"bits": 4}, "bits go with method=bounds"),
        ({"method": "lowbit", "calls": 256}, "only em has events, which longest is of.*leave out longest"),
        ({"method": "bounds", "longest": 64, "refine": "none"}, "refine, calls is of"),
        ({"method": "hcam", "longest": 64, "calls": 256, "contiguity": 0.0, "gamma": 2.0}, "gamma, contiguity"),
        ({"refine": "cosine"}, "one of modularity, conductance, none"),
        ({"contiguity": 1.0}, "between 0 and 0.9"),
        ({"longest": 1}, "at least 2"),
        ({"gamma": -1.0}, "at least 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(MemcError, match=f"E203.*{reason}"):
        Sparsify(**{**SMALL, **options})
