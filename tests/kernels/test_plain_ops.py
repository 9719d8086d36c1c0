"""Kernel law of the ops that keep no state: ``memc::full_attention``, ``memc::rotary`` and ``memc::norm``."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import memc.kernels  # noqa: F401
from tests.kernels.cases import F64, Shape, shapes, walk

OPS = torch.ops.memc
BIASES = ("none", "rows", "heads", "full", "keys")


def full_attention_oracle(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None, bias: Tensor | None, **o: Any
) -> Tensor:
    batch, heads, tokens, _ = q.shape
    per_group = heads // k.shape[1]
    out = torch.zeros(batch, heads, tokens, v.shape[3], dtype=F64)
    for b in range(batch):
        for h in range(heads):
            for t in range(tokens):
                scores, values = [], []
                for s in range(k.shape[2]):
                    if positions is not None and int(positions[b, s]) < 0:
                        continue
                    score = o["scale"] * float(q[b, h, t] @ k[b, h // per_group, s])
                    if o["softcap"]:
                        score = o["softcap"] * math.tanh(score / o["softcap"])
                    if bias is not None:
                        score += float(bias.expand(batch, heads, tokens, k.shape[2])[b, h, t, s])
                    scores.append(score)
                    values.append(v[b, h // per_group, s])
                sink = math.exp(float(o["sink_logits"][h])) if o["sink_logits"] is not None else 0.0
                total = sum(math.exp(x) for x in scores) + sink
                if total > 0:
                    for x, y in zip(scores, values, strict=True):
                        out[b, h, t] += math.exp(x) / total * y
    return out


@given(shapes(8), st.integers(1, 7), st.sampled_from(BIASES), st.booleans(), st.sampled_from([0.0, 1.5]))
def test_full_attention_equals_oracle(shape: Shape, held: int, kind: str, sink: bool, softcap: float) -> None:
    generator = shape.generator()
    q, _, _ = shape.qkv(generator)
    _, k, v = Shape(**{**shape.__dict__, "tokens": held}).qkv(generator)
    positions = walk(Shape(**{**shape.__dict__, "tokens": held}), generator, padding=0.4)
    sizes = {
        "rows": (shape.tokens, held), "heads": (shape.heads, 1, held),
        "full": (shape.batch, shape.heads, shape.tokens, held), "keys": (held,),
    }.get(kind)  # fmt: skip
    bias = None if sizes is None else torch.randn(sizes, dtype=F64, generator=generator)
    if bias is not None:
        bias = bias.masked_fill(torch.rand(bias.shape, generator=generator) < 0.3, -torch.inf)
    logits = torch.randn(shape.heads, dtype=F64, generator=generator) if sink else None
    out = OPS.full_attention(q, k, v, positions, bias, logits, scale=0.7, softcap=softcap)
    expected = full_attention_oracle(q, k, v, positions, bias, sink_logits=logits, scale=0.7, softcap=softcap)
    torch.testing.assert_close(out, expected)


def test_full_attention_over_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from memc.kernels.attention import reference as causal
    from memc.kernels.full_attention import reference

    q, k, v = Shape(2, 2, 2, 11, 3, 2, 0).qkv(torch.Generator().manual_seed(0))
    leaves = [x.requires_grad_() for x in (q, k, v, torch.randn(11, 11, dtype=F64), torch.randn(1, 11, dtype=F64))]
    state = (k[:, :, :0].detach(), v[:, :, :0].detach(), torch.zeros(2, 0, dtype=torch.int64))
    positions = torch.arange(11).expand(2, 11)

    def everything() -> list[Tensor]:
        outs = [OPS.full_attention(q, k, v, None, bias, scale=0.7) for bias in leaves[3:]]
        outs.append(OPS.attention(q, k, v, positions, *state, scale=0.7)[0])
        return [*outs, *torch.autograd.grad(sum(x.square().sum() for x in outs), leaves)]

    whole = everything()
    monkeypatch.setattr(reference, "BLOCK_SCORES", 4 * 2 * 11 * 3)
    monkeypatch.setattr(causal, "BLOCK_SCORES", 4 * 2 * 11 * 3)
    for one, other in zip(whole, everything(), strict=True):
        torch.testing.assert_close(one, other)


@given(shapes(9), st.booleans(), st.integers(0, 2))
def test_rotary_equals_complex_rotation(shape: Shape, interleaved: bool, pairs: int) -> None:
    generator = shape.generator()
    size = 2 * pairs + 1
    x = torch.randn(shape.batch, shape.heads, shape.tokens, size, dtype=F64, generator=generator)
    positions, freq = walk(shape, generator), torch.rand(pairs, dtype=F64, generator=generator)
    out = OPS.rotary(x, positions, freq, interleaved=interleaved, scaling=1.3)
    expected = x.clone()
    for i in range(pairs):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
        turned = torch.complex(x[..., first], x[..., second]) * torch.polar(
            torch.tensor(1.3, dtype=F64), (positions * freq[i])[:, None]
        )
        expected[..., first], expected[..., second] = turned.real, turned.imag
    torch.testing.assert_close(out, expected)


def test_rotary_with_the_other_pairing_is_found() -> None:
    x, positions, freq = torch.randn(1, 1, 3, 4), torch.arange(1, 4)[None], torch.tensor([1.0, 0.1])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(OPS.rotary(x, positions, freq), OPS.rotary(x, positions, freq, interleaved=True))


@pytest.mark.parametrize("center", [False, True])
def test_norm_equals_oracle(center: bool) -> None:
    x, weight, bias = torch.randn(2, 3, 5, dtype=F64), torch.randn(5, dtype=F64), torch.randn(5, dtype=F64)
    out = OPS.norm(x, weight, bias, eps=1e-3, center=center)
    for index in range(6):
        row = x.view(6, 5)[index]
        shifted = row - row.sum() / 5 if center else row
        expected = shifted / math.sqrt(float((shifted * shifted).sum()) / 5 + 1e-3) * weight + bias
        torch.testing.assert_close(out.view(6, 5)[index], expected)
    assert OPS.norm(x.bfloat16(), weight.float(), eps=1e-3).dtype == torch.bfloat16


def test_norm_with_the_epsilon_outside_is_found() -> None:
    x = torch.randn(3, 5, dtype=F64)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(OPS.norm(x, eps=0.1), x / (x.square().mean(-1, keepdim=True).sqrt() + 0.1))


def test_full_attention_that_reads_padding_is_found() -> None:
    q, k, v = Shape(1, 1, 1, 4, 3, 2, 0).qkv(torch.Generator().manual_seed(0))
    expected = full_attention_oracle(
        q, k, v, torch.tensor([[0, -1, 1, 2]]), None, scale=1.0, softcap=0.0, sink_logits=None
    )
    with pytest.raises(AssertionError):
        torch.testing.assert_close(OPS.full_attention(q, k, v, scale=1.0), expected)
