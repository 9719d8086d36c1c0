"""Head roles: a planted induction head ranks first, even attention has none, scores are those of plain softmax."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from memc.analysis import heads
from memc.analysis.heads import ABOVE_CHANCE, HeadRoles, chance, earlier_mass, head_roles, repeated_tokens
from memc.infer import infer
from memc.program import InputSpec, ModelInfo, OutputSpec, Program, StateSpec
from tests.passes.tiny_program import tiny

aten = torch.ops.aten
VOCAB = 32


def planted(role: str = "induction") -> Program:
    """Make a decoder whose layer 1 has one head that looks up by construction: head 3, of key-value head 1.

    Tokens are unit vectors e. Layer 0 has a window of two and equal scores, so that twice its output less e is the
    previous token's vector, at the first token its own. In layer 1 the keys of key-value head 1 are those vectors (or,
    for an echo, the tokens' own) and head 3 asks for the token itself; every other query is 0. Its projections all read
    both vectors.
    """
    root, g = torch.nn.Module(), Graph()
    states = [
        spec
        for layer, groups in enumerate((1, 2))
        for spec in (
            StateSpec(f"layer{layer}_key", torch.float32, ("B", groups, "S", VOCAB), grows=2),
            StateSpec(f"layer{layer}_value", torch.float32, ("B", groups, "S", VOCAB), grows=2),
            StateSpec(f"layer{layer}_positions", torch.int64, ("B", "S"), init=-1, grows=1),
        )
    ]
    tokens, positions = g.placeholder("tokens"), g.placeholder("positions")
    held = [g.placeholder(spec.name) for spec in states]

    def weight(name: str, value: Tensor) -> Node:
        root.register_parameter(name, torch.nn.Parameter(value))
        return g.get_attr(name)

    def attend(layer: int, hidden: Node, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Node:
        projected = []
        for name, rows in (("q", query), ("k", key), ("v", value)):
            x = g.call_function(aten.linear.default, (hidden, weight(f"{name}{layer}", rows)))
            x = g.call_function(aten.unflatten.int, (x, 2, [-1, VOCAB]))
            projected.append(g.call_function(aten.transpose.int, (x, 1, 2)))
        mine = held[3 * layer : 3 * layer + 3]
        result = g.call_function(torch.ops.memc.attention.default, (*projected, positions, *mine), options)
        result.meta["memc"] = {"path": f"layers.{layer}.attention", "source": ""}
        out, *new = (g.call_function(operator.getitem, (result, index)) for index in range(4))
        after.extend(new)
        return out

    after: list[Node] = []
    one, none = torch.eye(VOCAB), torch.zeros(VOCAB, VOCAB)
    embedded = g.call_function(aten.embedding.default, (weight("embedding", one.clone()), tokens))
    mean = attend(0, embedded, none, none, one.clone(), scale=1.0, window=2)
    mean = g.call_function(aten.select.int, (mean, 1, 0))
    previous = g.call_function(aten.sub.Tensor, (g.call_function(aten.mul.Tensor, (mean, 2.0)), embedded))
    both = g.call_function(aten.cat.default, ([embedded, previous], -1))
    wide, own, before = torch.cat([none, none], 1), torch.cat([one, none], 1), torch.cat([none, one], 1)
    query = torch.cat([wide, wide, wide, 30 * own])
    key = torch.cat([wide, before if role == "induction" else own])
    out = attend(1, both, query, key, torch.cat([own, own]), scale=1.0)
    out = g.call_function(aten.transpose.int, (out, 1, 2))
    out = g.call_function(aten.flatten.using_ints, (out, 2))
    logits = g.call_function(aten.linear.default, (out, weight("head", torch.cat([one] * 4, 1))))
    g.output((logits, *after))
    program = Program(
        module=GraphModule(root, g),
        inputs=(
            InputSpec("tokens", "tokens", torch.int64, ("B", "T")),
            InputSpec("positions", "positions", torch.int64, ("B", "T")),
        ),
        outputs=(OutputSpec("logits", torch.float32, ("B", "T", VOCAB)),),
        states=tuple(states),
        model=ModelInfo("planted", "0" * 64, "planted", VOCAB),
        raised=True,
    )
    infer(program)
    return program


def test_a_planted_induction_head_ranks_first() -> None:
    roles = head_roles(planted())
    first, second = roles.layers
    assert (first.layer, second.layer, second.groups) == (0, 1, 2)
    # All of it, but half at the first token's second occurrence, which is like the first's key too.
    assert second.induction[3] == pytest.approx(1 - 1 / 64, abs=1e-3)
    assert second.echo[3] == pytest.approx(1 / 64, abs=1e-3)
    assert max(*second.induction[:3], *second.echo[:3]) < 2 * roles.chance
    assert max(first.induction + first.echo) == 0.0  # its window ends before the earlier copy
    assert roles.best(0.34, [(0, first.path), (1, second.path)]) == [(1, 1)]
    assert roles.best(0.99, [(0, first.path), (1, second.path)]) == [(1, 1)]
    assert roles.best(0.99, [(0, first.path)]) == []


def test_a_planted_echo_head_is_told_from_induction() -> None:
    roles = head_roles(planted("echo")).layers[1]
    # The token itself is as good a match as its earlier occurrence.
    assert roles.echo[3] == pytest.approx(0.5, abs=0.01) and roles.induction[3] < 0.01
    assert roles.of_groups[1] > 0.5 > 2 * roles.of_groups[0]


def test_even_attention_has_no_retrieval_head() -> None:
    program = tiny(seed=1)
    with torch.no_grad():
        for name, parameter in program.module.named_parameters():
            if name.endswith("q.weight"):
                parameter.zero_()
    roles = head_roles(program)
    for layer in roles.layers:
        assert layer.of_groups == pytest.approx([roles.chance] * 2, rel=1e-4)
    assert roles.best(0.99, [(layer.layer, layer.path) for layer in roles.layers]) == []


def test_the_tokens_of_a_copy_differ_and_come_again() -> None:
    tokens, length = repeated_tokens(40, None)
    assert length == 40 and tokens.shape == (heads.SEQUENCES, 80)
    assert torch.equal(tokens[:, :40], tokens[:, 40:]) and all(len(set(row.tolist())) == 40 for row in tokens)
    assert repeated_tokens(50_000, None)[1] == heads.LENGTH
    assert repeated_tokens(50_000, 100)[1] == 50
    assert not torch.equal(tokens[0], tokens[1]) and torch.equal(tokens, repeated_tokens(40, None)[0])


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "window": {"window": 13},
    "chunk": {"chunk": 12},
    "prefix": {"prefix": 5},
    "sinks": {"sink_logits": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "alibi": {"slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])},
}


@pytest.mark.parametrize("rows", [1, 3, 10_000], ids="{} scores".format)
@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_softmax_over_what_is_read(case: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    length, batch, count = 10, 2, 20
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(batch, 4, count, 7, generator=generator)
    key = torch.randn(batch, 2, count, 7, generator=generator)
    defaults = {"scale": 0.7, "softcap": 0.0, "window": 0, "chunk": 0, "prefix": 0, "slopes": None, "sink_logits": None}
    a = {**defaults, "query": query, "key": key, **CASES[case]}
    monkeypatch.setattr(heads, "BLOCK_SCORES", rows * batch * 4 * count)
    found = earlier_mass(a, length)
    expected = torch.zeros(2, 4, dtype=torch.float64)
    for row in range(batch):
        for head in range(4):
            for t in range(length, count):
                terms = {j: _score(a, row, head, t, j).exp() for j in range(count) if _reads(a, t, j)}
                total = sum(terms.values()) + (a["sink_logits"][head].exp() if a["sink_logits"] is not None else 0)
                for role, j in enumerate((t - length + 1, t - length)):
                    expected[role, head] += float(terms.get(j, 0) / total) / (batch * (count - length))
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)


def _score(a: dict[str, Any], row: int, head: int, t: int, j: int) -> Tensor:
    score: Tensor = a["scale"] * (a["query"][row, head, t].double() @ a["key"][row, head // 2, j].double())
    if a["softcap"]:
        score = a["softcap"] * torch.tanh(score / a["softcap"])
    return score + (a["slopes"][head] * (j - t) if a["slopes"] is not None else 0)


def _reads(a: dict[str, Any], t: int, j: int) -> bool:
    near = j <= t and (not a["window"] or t - j < a["window"])
    near = near and (not a["chunk"] or t // a["chunk"] == j // a["chunk"])
    return near or (t < a["prefix"] and j < a["prefix"])


def test_the_share_is_of_the_key_value_heads_in_question() -> None:
    layers = tuple(
        heads.LayerRoles(layer, f"layers.{layer}", 2, tuple(scores), (0.0,) * 4)
        for layer, scores in enumerate([[0.9, 0.1, 0.2, 0.3], [0.1, 0.8, 0.5, 0.1], [0.1, 0.1, 0.1, 0.7]])
    )
    roles = HeadRoles(layers, chance=0.01)
    everything = [(layer.layer, layer.path) for layer in layers]
    assert roles.best(0.5, everything) == [(0, 0), (1, 0), (2, 1)]
    assert roles.best(0.5, everything[:2]) == [(0, 0), (1, 0)]
    assert roles.best(0.1, everything) == [(0, 0)]
    assert HeadRoles(layers, chance=0.6 / ABOVE_CHANCE).best(0.9, everything) == [(0, 0), (1, 0), (2, 1)]


def test_chance_is_what_even_attention_gives() -> None:
    assert chance(3) == pytest.approx((2 / 4 + 2 / 5 + 2 / 6) / 3)
