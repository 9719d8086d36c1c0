"""Kernels behind ``memc::full_attention`` in Triton's interpreter against the reference in float64, and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memc.dialect.full_attention import full_attention
from memc.kernels.full_attention import device as device_code
from memc.kernels.full_attention import reference as reference_code
from memc.kernels.launch import GPUS
from tests.kernels.triton_support import (
    Code,
    assert_near,
    autograd_of,
    cut_small,  # noqa: F401 - a fixture
    in_double,
    interpreted,  # noqa: F401 - a fixture
    poisoned,
)

device = Code(full_attention, device_code)
reference = Code(full_attention, reference_code)


def call(queries: int, keys: int, *, padded: bool) -> list[Any]:
    """Return arguments; with padding, the keys of the second row are all padding: it reads nothing."""
    positions = torch.arange(keys).repeat(2, 1)
    positions[0, 3:7] = -1
    positions[1] = -1
    tensors = [torch.randn(2, 2, queries, 12), torch.randn(2, 1, keys, 12), torch.randn(2, 1, keys, 20)]
    return [*tensors, positions if padded else None, None, torch.randn(2) if padded else None]


@pytest.mark.parametrize(("queries", "keys", "padded"), [(23, 37, True), (19, 5, False), (1, 20, True)])
@pytest.mark.usefixtures("cut_small")
def test_values_and_gradients_equal_the_reference(queries: int, keys: int, padded: bool) -> None:
    arguments = call(queries, keys, padded=padded)
    options = {"scale": 0.4, "softcap": 2.0 if padded else 0.0}
    grad = torch.randn(2, 2, queries, 20)
    with poisoned():
        out = device.forward(*arguments, **options)
        grads = device.backward(grad, *arguments, **options)
    assert_near(out, reference.forward(*in_double(arguments), **options))
    expected = autograd_of(lambda *a: (reference.forward(*a, **options),), arguments, [grad])
    for found, wanted in zip([x for x in grads if x.numel()], expected, strict=True):
        assert_near(found, wanted, atol=1e-5)


@pytest.mark.usefixtures("cut_small")
def test_padding_may_hold_anything_and_a_mask_that_is_forgotten_is_found() -> None:
    arguments = call(5, 20, padded=True)
    clean = device.forward(*arguments, scale=0.4)
    unmasked = device.forward(*arguments[:3], None, *arguments[4:], scale=0.4)
    with pytest.raises(AssertionError):
        assert_near(unmasked, reference.forward(*in_double(arguments), scale=0.4))
    for x in arguments[1:3]:
        x.masked_fill_((arguments[3] < 0)[:, None, :, None], torch.nan)
    assert torch.equal(device.forward(*arguments, scale=0.4), clean)


@pytest.mark.parametrize("shape", [(2, 2, 19, 37), (2, 1, 1, 37), (1, 2, 19, 37), (19, 1), (37, 19), ()], ids=str)
@pytest.mark.usefixtures("cut_small")
def test_a_bias_of_any_strides_is_added(shape: tuple[int, ...]) -> None:
    arguments, options = call(19, 37, padded=True), {"scale": 0.4, "softcap": 2.0}
    bias = torch.randn(shape)
    if shape[-1:] == (37,):  # some are masked, and all of what one query may read
        bias.masked_fill_(torch.rand(shape) < 0.3, -torch.inf)
        bias[..., 0, :] = -torch.inf
        bias[..., -1, :] = torch.finfo(torch.float32).min  # as masks of models have it: a mean is left
    arguments[4] = bias.T if shape == (37, 19) else bias
    grad = torch.randn(2, 2, 19, 20)
    assert not device.refuses(GPUS["nvidia-sm90"], *arguments, **options)
    with poisoned():
        out = device.forward(*arguments, **options)
    expected = reference.forward(*in_double(arguments), **options)
    assert_near(out, expected)
    with pytest.raises(AssertionError):
        assert_near(device.forward(*arguments[:4], None, *arguments[5:], **options), expected)
    grads = device.backward(grad, *arguments, **options)
    wanted = autograd_of(lambda *a: (reference.forward(*a, **options),), arguments, [grad])
    for found, one in zip([x for x in grads if x.numel()], wanted, strict=True):
        assert_near(found, one, atol=1e-5)
