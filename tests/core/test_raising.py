"""Raising: masks by evaluation, idioms, near misses with their source line, and planning without weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from memc.blocks import (
    Alibi,
    AttentionBlock,
    Bidirectional,
    Causal,
    Chunked,
    FeedForwardBlock,
    Mask,
    OtherMask,
    Prefix,
    RelativeBias,
    SlidingWindow,
)
from memc.frontend import capture
from memc.raising import Raised, raise_program
from memc.raising.masks import classify, classify_bias, classify_mask

VOCAB, WIDTH, HEADS, LIMIT = 31, 24, 3, 64


def allowed(mask: Mask, tokens: int) -> Tensor:
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    causal = key <= query
    match mask:
        case Causal():
            return causal
        case SlidingWindow(size):
            return causal & (query - key < size)
        case Chunked(size):
            return causal & (query // size == key // size)
        case Prefix(size):
            return causal | ((query < size) & (key < size))
        case _:
            return torch.ones(tokens, tokens, dtype=torch.bool)


@given(st.sampled_from([SlidingWindow, Chunked, Prefix]), st.integers(2, 9))
def test_every_mask_is_named_by_its_values(kind: Callable[[int], Mask], size: int) -> None:
    assert classify_mask(allowed(kind(size), 17)) == kind(size)


@given(st.integers(0, 16), st.integers(0, 16))
def test_one_wrong_entry_is_no_known_mask(row: int, column: int) -> None:
    values = allowed(SlidingWindow(6), 17)
    values[row, column] ^= True
    found = classify_mask(values)
    assert isinstance(found, OtherMask) or torch.equal(allowed(found, 17), values)


@pytest.mark.parametrize("size", [5, 300, 4096, 131072])
@pytest.mark.parametrize("kind", [SlidingWindow, Chunked])
def test_windows_too_wide_to_evaluate_are_found(kind: Callable[[int], Mask], size: int) -> None:
    def matrix(tokens: int, replace: dict[int, int]) -> Tensor:
        mask = allowed(kind(replace.get(size, size)), tokens)
        return torch.where(mask, 0.0, -torch.inf)[None]

    found = classify(matrix, {size}, causal_hint=False)
    assert (found.mask, found.bias) == (kind(size), None)


def test_biases_are_named_by_their_values() -> None:
    tokens, slopes = 9, torch.tensor([0.5, 0.25])
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    causal = allowed(Causal(), tokens).expand(2, -1, -1)
    distance = slopes[:, None, None] * (key - query)
    assert classify_bias(distance, causal) == Alibi((0.5, 0.25))
    # The same up to what is added to a whole row, as in models that use the key's position alone.
    assert classify_bias(slopes[:, None, None] * key.expand(tokens, tokens), causal) == Alibi((0.5, 0.25))
    assert isinstance(classify_bias(distance**2, causal), RelativeBias)
    assert classify_bias(torch.zeros(2, tokens, tokens), causal) is None


class Tiny(nn.Module):
    """One attention block with a replaceable score function, and one feed-forward block."""

    def __init__(self, scores: Callable[[Tensor], Tensor], activation: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LIMIT, WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.sinks = nn.Parameter(torch.randn(HEADS))
        self.register_buffer("near", allowed(SlidingWindow(20), LIMIT))
        self.register_buffer("kept", allowed(Causal(), LIMIT).float()[None, None])
        self.scores, self.activation = scores, activation

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        batch, length = tokens.shape
        x = self.tokens(tokens) + self.places(positions)
        q, k, v = self.qkv(x).view(batch, length, HEADS, 3, -1).permute(3, 0, 2, 1, 4).unbind(0)
        probabilities = self.scores(self, q @ k.transpose(-1, -2) / math.sqrt(8))
        x = x + self.out((probabilities @ v).transpose(1, 2).reshape(batch, length, WIDTH))
        return self.head(x + self.down(self.activation(self.up(x))))


def causal_softmax(module: Tiny, scores: Tensor) -> Tensor:
    length = scores.shape[-1]
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    return scores.masked_fill(~mask, -torch.inf).softmax(-1)


def with_sinks(module: Tiny, scores: Tensor) -> Tensor:
    length = scores.shape[-1]
    scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -1e30)
    column = module.sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, length, 1)
    joined = torch.cat([scores, column], dim=-1)
    joined = joined - joined.max(dim=-1, keepdim=True).values
    return joined.softmax(-1)[..., :-1]


def capped(module: Tiny, scores: Tensor) -> Tensor:
    return causal_softmax(module, 5.0 * torch.tanh(scores / 5.0))


def masked_before_scaling(module: Tiny, scores: Tensor) -> Tensor:
    length = scores.shape[-1]
    blocked = torch.full((length, length), torch.finfo(scores.dtype).min).triu(1)
    return ((scores * math.sqrt(8) + blocked) / math.sqrt(8)).softmax(-1)


def kept_finite(module: Tiny, scores: Tensor) -> Tensor:
    length, lowest = scores.shape[-1], torch.finfo(scores.dtype).min
    scores = scores + torch.full((length, length), lowest).triu(1)
    return torch.max(scores, torch.tensor(lowest)).softmax(-1)


def window_in_a_table(module: Tiny, scores: Tensor) -> Tensor:
    length = scores.shape[-1]
    return scores.masked_fill(~module.near[:length, :length], -torch.inf).softmax(-1)


def multiplied_by_a_table(module: Tiny, scores: Tensor) -> Tensor:
    kept = module.kept[:, :, : scores.shape[-2], : scores.shape[-1]]
    return (scores * kept + -1e4 * (1 - kept)).softmax(-1)


def squared(module: Tiny, scores: Tensor) -> Tensor:
    return causal_softmax(module, scores * scores)


def token_dependent(module: Tiny, scores: Tensor) -> Tensor:
    return causal_softmax(module, scores + scores.mean(dim=1, keepdim=True))


def raise_tiny(scores: Callable[..., Tensor], **options: object) -> tuple[Raised, Tiny, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    module = Tiny(scores, **options).eval()  # type: ignore[arg-type]
    tokens = torch.randint(0, VOCAB, (2, 7))
    inputs = (tokens, torch.arange(7).expand(2, 7).contiguous())
    return raise_program(capture(module, inputs)), module, inputs


@pytest.mark.parametrize("scores", [causal_softmax, with_sinks, capped, masked_before_scaling, kept_finite])
def test_written_out_attention_is_raised(scores: Callable[..., Tensor]) -> None:
    result, module, inputs = raise_tiny(scores)
    block = next(block for block in result.blocks if isinstance(block, AttentionBlock))
    assert (result.near_misses, block.mask, block.num_heads, block.head_dim) == ((), Causal(), HEADS, 8)
    assert block.scale == pytest.approx(8**-0.5)
    assert block.softcap == (5.0 if scores is capped else None)
    assert (block.sink_logits is not None) == (scores is with_sinks)
    assert block.projections["key"].rows == tuple(h * 24 + 8 + c for h in range(HEADS) for c in range(8))
    with torch.no_grad():
        torch.testing.assert_close(result.program.run(inputs[0]), module(*inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        (squared, "scaled by a tensor"),
        (multiplied_by_a_table, "scaled by a tensor"),
        (token_dependent, "depends on the tokens"),
    ],
)
def test_a_near_miss_names_the_idiom_the_difference_and_the_line(scores: Callable[..., Tensor], reason: str) -> None:
    result, _, _ = raise_tiny(scores)
    assert not result.program.raised
    miss = next(miss for miss in result.near_misses if miss.nearest == "softmax attention")
    assert reason in miss.reason
    assert miss.source.startswith("test_raising.py:")


def test_a_window_in_a_table_of_the_model_is_found() -> None:
    result, module, _ = raise_tiny(window_in_a_table)
    block = next(block for block in result.blocks if isinstance(block, AttentionBlock))
    assert block.mask == SlidingWindow(20)
    tokens, positions = torch.randint(0, VOCAB, (2, LIMIT)), torch.arange(LIMIT).expand(2, LIMIT)
    with torch.no_grad():
        torch.testing.assert_close(result.program.run(tokens), module(tokens, positions), rtol=0, atol=1e-5)


class MaskedByTokens(Tiny):
    """Its keys are masked by what they are."""

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(positions)
        length = tokens.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril() & (x.sum(-1) > 0)[:, None, None]
        return self.head(nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], mask)[:, 0])


class Near(nn.Module):
    """An encoder whose tokens read their neighbours, with queries and keys that are scaled as they are projected."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.qkv, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length = tokens.shape
        q, k, v = self.qkv(self.tokens(tokens)).chunk(3, -1)
        q, k, v = (x.view(batch, length, HEADS, -1).transpose(1, 2) for x in (q * 0.1, k / 2.0, v))
        at = torch.arange(length)
        scores = (q @ k.transpose(-1, -2)).masked_fill((at[:, None] - at).abs() > 2, -torch.inf)
        return self.head((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, WIDTH))


def test_what_is_not_raised_computes_what_it_did() -> None:
    torch.manual_seed(0)
    module, tokens = Near().eval(), torch.randint(0, VOCAB, (2, 9))
    result = raise_program(capture(module, (tokens,)))
    assert [miss.nearest for miss in result.near_misses] == ["softmax attention"] and not result.program.raised
    with torch.no_grad():
        torch.testing.assert_close(result.program(tokens)[0], module(tokens), rtol=0, atol=1e-6)


def test_a_mask_that_tokens_choose_is_no_mask_that_is_known() -> None:
    tokens = torch.randint(0, VOCAB, (2, 7))
    module = MaskedByTokens(causal_softmax).eval()
    result = raise_program(capture(module, (tokens, torch.arange(7).expand(2, 7).contiguous())))
    assert not result.program.raised
    assert [miss.reason for miss in result.near_misses if miss.nearest == "sdpa"] == ["the mask depends on the tokens"]


def in_two_parts(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[..., :13] = torch.relu(x[..., :13])
    y[..., 13:] = x[..., 13:]
    return y


def test_parts_that_are_written_side_by_side_are_joined() -> None:
    result, module, inputs = raise_tiny(causal_softmax, activation=in_two_parts)
    targets = {node.target for node in result.program.module.graph.nodes}
    assert torch.ops.aten.cat.default in targets and torch.ops.aten.slice_scatter.default not in targets
    with torch.no_grad():
        torch.testing.assert_close(result.program.run(inputs[0]), module(*inputs), rtol=0, atol=1e-5)


def half_written(x: Tensor) -> Tensor:
    y = x * 2
    y[..., 13:] = x[..., 13:]
    return y


def test_a_part_that_is_written_into_a_value_stays_a_write() -> None:
    result, module, inputs = raise_tiny(causal_softmax, activation=half_written)
    assert any(node.target == torch.ops.aten.slice_scatter.default for node in result.program.module.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(result.program.run(inputs[0]), module(*inputs), rtol=0, atol=1e-5)


class SelectsPositions(Tiny):
    """Looks its positions up from the third row on, all sequences in one row."""

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        rows = self.places.weight.index_select(0, positions.reshape(-1) + 2).view(*tokens.shape, WIDTH)
        x = self.tokens(tokens) + rows
        q, k, v = self.qkv(x).view(*tokens.shape, HEADS, 3, -1).permute(3, 0, 2, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + self.out(y.transpose(1, 2).flatten(2)))


def test_positions_selected_from_a_table_limit_the_length() -> None:
    torch.manual_seed(0)
    tokens, module = torch.randint(0, VOCAB, (2, 7)), SelectsPositions(causal_softmax).eval()
    program = raise_program(capture(module, (tokens, torch.arange(7).expand(2, 7).contiguous()))).program
    assert (program.model.absolute_positions, program.model.max_positions) == (True, LIMIT - 2)
    positions = torch.arange(-1, 6).expand(2, 7).contiguous()
    with torch.no_grad():
        padded = program(tokens, positions, *program.new_state(2))[0][:, 1:]
        torch.testing.assert_close(padded, module(tokens[:, 1:], positions[:, 1:]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (torch.relu, "relu"),
        (lambda x: torch.relu(x) ** 2, "relu2"),
        (nn.functional.silu, "silu"),
        (lambda x: x * torch.sigmoid(1.702 * x), "quick_gelu"),
        (lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), "gelu"),
        (lambda x: torch.where(x > 0, 0.8 * x * x + x, torch.expm1(torch.min(x, torch.tensor(-1e-6))) - x), "other"),
    ],
)
def test_activations_are_named_by_their_values(activation: Callable[[Tensor], Tensor], name: str) -> None:
    result, _, _ = raise_tiny(causal_softmax, activation=activation)
    block = next(block for block in result.blocks if isinstance(block, FeedForwardBlock))
    assert (block.activation, block.hidden) == (name, 40)


def test_a_straight_line_between_two_projections_is_no_activation() -> None:
    result, _, _ = raise_tiny(causal_softmax, activation=lambda x: 3 * x + 1)
    assert not any(isinstance(block, FeedForwardBlock) for block in result.blocks)


def test_raising_leaves_the_raw_program_alone() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, VOCAB, (2, 7))
    inputs = (tokens, torch.arange(7).expand(2, 7).contiguous())
    raw = capture(Tiny(causal_softmax).eval(), inputs)
    before = str(raw.module.graph)
    raise_program(raw)
    assert str(raw.module.graph) == before


def test_bidirectional_attention_is_found_as_such() -> None:
    result, _, _ = raise_tiny(lambda module, scores: scores.softmax(-1))
    block = next(block for block in result.blocks if isinstance(block, AttentionBlock))
    assert (block.mask, block.streamable) == (Bidirectional(), False)
