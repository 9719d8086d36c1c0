"""How linearized layers learn: far attention against an oracle, losses, and first values in closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from memc.passes.linearize import initial
from memc.passes.linearize.layers import LayerConfig
from memc.passes.linearize.objective import SharedObjective, bernoulli_kl
from memc.program import Program, get_tensor
from memc.train.blocks import cut_out
from memc.train.transfer import Transfer
from tests.passes.tiny_program import SLOPES, tiny
from tests.train.tiny_training import SINKS, TEACHERS, linearized, packed, values_of

HEADS, GROUPS, LENGTH = 4, 2, 24


def objective_of(
    *,
    reach: int = 0,
    softcap: float = 0.0,
    sinks: int = 2,
    sink_logits: bool = False,
    slopes: tuple[float, ...] = (),
) -> SharedObjective:
    config = LayerConfig("softmax", "token", "gated", 0.7, softcap, 4, sinks)
    reads = ("query", "key", "positions", *(["sink_logits"] if sink_logits else []))
    return SharedObjective(0, "", {}, "target", reads, (), 4, config, "hidden", reach, slopes)


def random_values(positions: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, size: int) -> Tensor:
        return torch.randn(len(positions), heads, positions.shape[1], size, generator=generator)

    return {
        "query": draw(HEADS, 6),
        "key": draw(GROUPS, 6),
        "positions": positions,
        "sink_logits": torch.tensor(SINKS),
        "target": draw(HEADS, 5),
    }


def naive_far(values: dict[str, Tensor], objective: SharedObjective, rows: Tensor) -> Tensor:
    """Far attention one query and one key at a time, in float64."""
    positions, config = values["positions"].tolist(), objective.config
    found = torch.zeros(len(positions), HEADS, len(rows), LENGTH, dtype=torch.float64)
    for b, at in enumerate(positions):
        for h in range(HEADS):
            for r, t in enumerate(rows.tolist()):
                weights: dict[int, float] = {}
                start = max((i for i in range(t + 1) if at[i] == 0), default=0)
                for s in range(start, t + 1):
                    gap = at[t] - at[s]
                    if at[t] < 0 or at[s] < 0 or (objective.reach and gap >= objective.reach):
                        continue
                    query, key = values["query"][b, h, t].double(), values["key"][b, h // 2, s].double()
                    score = config.scale * float(query @ key)
                    score = config.softcap * math.tanh(score / config.softcap) if config.softcap else score
                    weights[s] = math.exp(score - (objective.slopes[h] * gap if objective.slopes else 0.0))
                total = sum(weights.values())
                total += math.exp(SINKS[h]) if len(objective.reads) > 3 else 0.0
                for s, weight in weights.items():
                    if at[t] - at[s] >= config.window and at[s] >= config.sinks:
                        found[b, h, r, s] = weight / total
    return found


@pytest.mark.parametrize(
    "choice",
    [{}, {"reach": 9}, {"softcap": 1.5}, {"sinks": 0}, {"sink_logits": True, "reach": 9}, {"slopes": SLOPES}],
    ids=str,
)
def test_far_attention_is_that_of_the_rows_one_by_one(choice: dict[str, Any]) -> None:
    positions = packed(3, seed=0)[1]
    positions[2, :3], positions[2, 3:] = -1, torch.arange(LENGTH - 3)
    values, objective = random_values(positions), objective_of(**choice)
    rows = torch.tensor([0, 3, 4, 7, 13, 14, 22, 23])
    expected = naive_far(values, objective, rows)
    found = objective.far_attention(values, rows)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(objective.far_share(values, rows).double(), expected.sum(-1), atol=1e-6, rtol=0)
    assert float(expected.sum(-1).max()) > 0.2


def test_what_is_due_counts_the_queries_that_have_far_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memc.passes.linearize.objective.ROWS", 5)
    positions = packed(3, seed=0)[1]
    positions[2, :3], positions[2, 3:] = -1, torch.arange(LENGTH - 3)
    values, objective = random_values(positions), objective_of(reach=9)
    expected = naive_far(values, objective, torch.arange(LENGTH))
    share, far = objective.due(values)
    torch.testing.assert_close(share.double(), expected.sum(-1), atol=1e-6, rtol=0)
    assert torch.equal(far, (expected > 0).any(-1)[:, 0]) and torch.equal(far, positions >= 4 + 2)


def perfect(values: dict[str, Tensor], objective: SharedObjective) -> list[Tensor]:
    """Return results of a student that equals the teacher."""
    share = objective.far_share(values, torch.arange(LENGTH)).unsqueeze(-1)
    return [values["target"], share, values["target"], values["target"]]


def losses(objective: SharedObjective, results: list[Tensor], values: dict[str, Tensor], done: float = 0.0) -> Any:
    made = objective.losses(results, values, done, torch.Generator().manual_seed(3))
    return {name: float(value) for name, value in made.items()}


def test_losses_are_zero_where_the_student_is_the_teacher_and_see_each_part() -> None:
    values, objective = random_values(packed(2, seed=0)[1]), objective_of()
    right = perfect(values, objective)
    assert all(abs(value) < 1e-5 for value in losses(objective, right, values).values())
    for place, name in enumerate(["output", "mass", "window_dropout"]):
        wrong = [*right]
        wrong[place] = right[place] * 0.5
        found = losses(objective, wrong, values)
        assert found[name] > 1e-2 and all(abs(value) < 1e-5 for other, value in found.items() if other != name)
    assert losses(objective, [*right[:2], right[2] * 0.5, right[3]], values, done=1.0)["window_dropout"] == 0
    assert losses(objective, [right[0] * 0.5, *right[1:]], values)["output"] == pytest.approx(0.25)


def test_the_divergence_of_shares_has_a_gradient_where_all_or_nothing_is_far() -> None:
    given = torch.tensor([0.0, 1.0, 0.25, 0.5, 0.0, 1.0])
    found = torch.tensor([0.5, 0.25, 0.25, 0.0, 0.0, 1.0], requires_grad=True)
    kl = bernoulli_kl(given, found)
    kl.sum().backward()
    assert found.grad is not None and bool(found.grad.isfinite().all())
    near = found.detach().double().clamp(1e-6, 1 - 1e-6)
    exact = torch.distributions.kl_divergence(*(torch.distributions.Bernoulli(p) for p in (given.double(), near)))
    torch.testing.assert_close(kl.detach().double(), exact, rtol=1e-5, atol=2e-6)


def test_the_first_tokens_that_are_exact_do_not_count() -> None:
    values, objective = random_values(packed(2, seed=0)[1]), objective_of()
    right = perfect(values, objective)
    right[0] = right[0].clone()
    right[0][:, :, :4] += 100.0
    assert losses(objective, right, values)["output"] == 0.0
    short = {name: value[..., :4, :] if value.ndim == 4 else value for name, value in values.items()}
    assert losses(objective, [value[..., :4, :] for value in right], short) == {"output": 0.0}


def test_nothing_is_random_but_from_the_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memc.passes.linearize.objective.ROWS", 5)
    values, objective = random_values(packed(2, seed=0)[1]), objective_of()
    results = [value * 0.9 for value in perfect(values, objective)]
    state = torch.get_rng_state()
    first = losses(objective, results, values)
    torch.manual_seed(99)
    assert losses(objective, results, values) == first
    torch.set_rng_state(state)
    other = objective.losses(results, values, 0.0, torch.Generator().manual_seed(4))
    assert float(other["mass"]) != first["mass"] and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("teacher", TEACHERS[:3], ids=str)
@pytest.mark.parametrize("gate", ["token", "channel", "none"])
def test_first_values_give_the_memory_the_teachers_share(teacher: dict[str, Any], gate: str) -> None:
    before = tiny(**teacher)
    after, report = linearized(before, gate=gate)
    made = Transfer(before, after, report.objectives)
    tokens, positions = packed(8, seed=7, length=40)
    untrained = made.errors(*packed(4, seed=8, length=40))
    made.initialise(tokens, positions)
    errors = made.errors(*packed(4, seed=8, length=40))
    assert all(errors[layer] < untrained[layer] for layer in errors)
    values = values_of(before, tokens, positions)
    for objective in report.objectives:
        assert isinstance(objective, SharedObjective)
        wanted = objective.far_share(values, torch.arange(4, 40))
        shares = [share_of(before, after, objective, values)]
        with torch.no_grad():
            get_tensor(after.module, objective.parameters["mass_bias"]).add_(2.0)
        shares.append(share_of(before, after, objective, values))
        odds = [(wanted * (share.logit(1e-6) - wanted.logit(1e-6))).sum() / wanted.sum() for share in shares]
        off = [float((share - wanted).mean((0, 2)).abs().max()) for share in shares]
        assert abs(odds[0]) < 0.02 and off[0] < 0.12
        assert abs(odds[1]) > 1.5 and off[1] > 0.12


def share_of(before: Program, after: Program, objective: SharedObjective, values: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return cut_out(before, after, objective)(values)[1][:, :, 4:, 0]


def exponential(half_life: float) -> tuple[Tensor, Tensor]:
    """Attention ``[1,2,R,T]`` that falls with distance, only beyond a window of 8, and the distances ``[1,R,T]``."""
    at = torch.arange(64)
    distance = (torch.arange(16, 64, 3)[:, None] - at[None, :]).float()
    attention = torch.exp2(-distance / half_life) * (distance >= 8)
    return (0.4 * attention / attention.sum(-1, keepdim=True)).expand(1, 2, -1, -1), distance.unsqueeze(0)


@pytest.mark.parametrize("half_life", [80.0, 300.0])
def test_the_gate_recovers_an_exponential_profile(half_life: float) -> None:
    bias = torch.zeros(1, 5)
    initial.set_half_life(*exponential(half_life), bias)
    found = math.log(0.5) / torch.sigmoid(bias.double()).log()
    torch.testing.assert_close(found, torch.full_like(found, half_life), rtol=0.02, atol=0)


@pytest.mark.parametrize("half_life", [1e9, -50.0], ids=["flat", "rising"])
def test_the_gate_forgets_nothing_where_attention_does_not_fall(half_life: float) -> None:
    bias = torch.zeros(2)
    initial.set_half_life(*exponential(half_life), bias)
    found = math.log(0.5) / torch.sigmoid(bias.double()).log()
    torch.testing.assert_close(found, torch.full_like(found, initial.LONGEST), rtol=0.02, atol=0)


def test_kmeans_finds_planted_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    points = centres.repeat_interleave(50, 0) + 0.1 * torch.randn(150, 2, generator=generator)
    found = initial.kmeans(points, 8, generator)
    nearest = torch.cdist(centres, found).min(1).values
    assert nearest.max() < 0.2
    assert torch.cdist(found, centres).min(1).values.max() < 0.5


def test_first_values_depend_on_nothing_but_the_layer() -> None:
    before = tiny()
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        after, report = linearized(before)
        Transfer(before, after, report.objectives).initialise(*packed(4, seed=7))
        made.append(
            torch.cat([get_tensor(after.module, n).flatten() for n in report.objectives[1].parameters.values()])
        )
    assert torch.equal(*made)
