"""What mixes tokens beside attention is seen and named; what keeps them apart is raised."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from memc.frontend import capture
from memc.raising import raise_program
from tests.core.test_raising import VOCAB, Tiny, causal_softmax, raise_tiny


def test_tokens_mixed_outside_attention_are_rejected() -> None:
    result, _, _ = raise_tiny(causal_softmax, activation=lambda x: torch.relu(x).cumsum(dim=1))
    assert not result.program.raised
    assert any("cumsum" in miss.reason for miss in result.near_misses)


def test_the_greater_of_two_tensors_mixes_no_tokens() -> None:
    result, _, _ = raise_tiny(causal_softmax, activation=lambda x: torch.max(x, -0.1 * x))
    assert result.program.raised


def shifted(x: Tensor) -> Tensor:
    return nn.functional.pad(x, (0, 0, 1, -1))


def with_the_first(x: Tensor) -> Tensor:
    return x + x[:, :1]


def past_maximum(x: Tensor) -> Tensor:
    return x.cummax(1).values


def linear_attention(x: Tensor) -> Tensor:
    scores = torch.einsum("btc,bsc->bts", x, x)
    return torch.einsum("bts,bsc->btc", scores.tril(), x)


def convolved(x: Tensor) -> Tensor:
    padded = nn.functional.pad(x, (0, 0, 2, 0))
    return padded.unfold(1, 3, 1).sum(-1)


def looked_up_before(x: Tensor) -> Tensor:
    before = torch.arange(x.shape[1]).sub(1).clamp_min(0)
    return x.index_select(1, before)


def gathered_before(x: Tensor) -> Tensor:
    before = torch.arange(x.shape[1]).sub(1).clamp_min(0)
    return x.gather(1, before[None, :, None].expand_as(x))


def in_groups(x: Tensor) -> Tensor:
    """A norm over groups of channels, and over all tokens at once."""
    return nn.functional.group_norm(x.transpose(1, 2), 4).transpose(1, 2)


MIXING = {
    shifted: "moves tokens",
    with_the_first: "slice over the tokens",
    past_maximum: "cummax over the tokens",
    linear_attention: "einsum compares tokens with one another",
    convolved: "pad joins tokens with others",
    looked_up_before: "index_select over the tokens",
    gathered_before: "gather over the tokens",
}


@pytest.mark.parametrize("function", MIXING, ids=lambda function: function.__name__)
def test_what_mixes_tokens_beside_attention_is_named_with_its_line(function: Callable[[Tensor], Tensor]) -> None:
    result, _, _ = raise_tiny(causal_softmax, activation=function)
    assert not result.program.raised
    misses = [miss for miss in result.near_misses if MIXING[function] in miss.reason]
    assert misses and misses[0].source.startswith("test_raising.py:")


def test_an_op_that_is_not_known_is_tried_out() -> None:
    module, tokens = Tiny(causal_softmax, activation=in_groups).eval(), torch.randint(0, VOCAB, (2, 7))
    inputs = (tokens, torch.arange(7).expand(2, 7).contiguous())
    result = raise_program(capture(module, inputs, decoder=True))
    assert [miss.reason for miss in result.near_misses] == ["group_norm is not known to keep tokens apart"]
    assert not result.program.raised


def side_by_side(x: Tensor) -> Tensor:
    """Channels in groups, looked up, rolled, padded, in products with one another and summed up: each token alone."""
    parts = x.unflatten(-1, (5, 8))
    mixed = torch.einsum("btgc,bthc->btgh", parts, parts) @ parts
    turned = torch.stack([mixed, parts.flip(-1).roll(1, 2)], -1).cumsum(-1).select(-1, 1)
    picked = nn.functional.pad(turned[:, :, [4, 1, 0, 2]], (0, 0, 0, 1))
    picked = nn.functional.relu6(picked) + nn.functional.selu(picked) + torch.clip(picked, -1, 1).negative()
    return picked.flatten(2) + x.softmax(-1) * x.amax(-1, keepdim=True) + x.topk(1, -1).values


def test_what_mixes_the_channels_of_a_token_alone_is_raised() -> None:
    result, module, inputs = raise_tiny(causal_softmax, activation=side_by_side)
    assert result.program.raised and not result.near_misses
    with torch.no_grad():
        torch.testing.assert_close(result.program.run(inputs[0]), module(*inputs), rtol=0, atol=1e-5)
