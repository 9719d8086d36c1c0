"""What follows from an op's arguments, which are declared once: schemas, and how calls are taken apart."""

from __future__ import annotations

import pytest
import torch

import memc.kernels  # noqa: F401 - defines the gradients' ops
from memc.dialect import OPS
from memc.dialect.attention import Attention, attention
from memc.dialect.in_place import IN_PLACE


def made(**options: float) -> Attention:
    query, key = torch.zeros(1, 2, 3, 4), torch.zeros(1, 1, 3, 4)
    held = torch.zeros(1, 1, 0, 4)
    positions = torch.arange(3)[None]
    return Attention(query, key, key, positions, held, held, positions[:, :0], scale=0.5, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("op", OPS)
def test_tensors_come_first_and_options_by_keyword(op: str) -> None:
    spec = OPS[op]
    found = [
        (a.name, str(a.type).startswith(("Tensor", "Optional[Tensor")), a.kwarg_only)
        for a in spec.overload._schema.arguments
    ]
    assert [name for name, tensor, _ in found if tensor] == list(spec.arguments.tensors())
    assert all(tensor != by_keyword for _, tensor, by_keyword in found)
    assert len(spec.overload._schema.returns) == len(spec.returns)
    assert set(spec.grads_from) <= set(spec.returns) and set(spec.grads_to) <= set(spec.arguments.tensors())


@pytest.mark.parametrize("overload", IN_PLACE, ids=str)
def test_states_are_written_in_place_and_nothing_else(overload: torch._ops.OpOverload) -> None:
    spec = IN_PLACE[overload]
    written = {a.name for a in overload._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    assert written == set(spec.states)
    assert len(overload._schema.returns) == len(spec.returns) - len(spec.states)


def test_a_call_is_made_of_what_it_was_unpacked_to() -> None:
    args = made(window=2, softcap=1.5)
    tensors, options = args.unpack()
    assert tensors[0] is args.query and tensors[-2:] == (None, None)
    assert options == {"scale": 0.5, "window": 2, "chunk": 0, "prefix": 0, "softcap": 1.5}
    again = Attention(*tensors, **options)
    assert all(getattr(again, name) is getattr(args, name) for name in Attention.tensors())
    assert attention.bind(tensors, options) == {**dict(zip(Attention.tensors(), tensors, strict=True)), **options}


def test_gradients_come_first_for_the_op_and_last_for_its_code() -> None:
    args = made()
    tensors, options = args.unpack()

    def run(given: Attention, *grads: str) -> tuple[float, tuple[str, ...]]:
        return given.scale, grads

    assert attention.taking(run, 2)("out", "key", *tensors, **options) == (0.5, ("out", "key"))
    assert attention.taking(run)(*tensors, **options) == (0.5, ())
    names = [a.name for a in torch.ops.memc.attention_backward.default._schema.arguments]
    assert names[:4] == ["grad_out", "grad_next_key", "grad_next_value", "query"]


def test_arguments_that_do_not_fit_are_refused_by_the_fake_kernel() -> None:
    args = made()
    with pytest.raises(RuntimeError, match="multiple of the number of key-value heads"):
        Attention(args.query[:, :1], args.key.expand(-1, 2, -1, -1), *args.unpack()[0][2:], scale=1.0).outputs()
