"""Registration of an attention that chooses what it reads, and of its gradient: the choice itself has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.library import register_autograd

from memc.kernels.common import accumulation_type, define_backward, like, or_zeros, register_forward

GRADS = "Tensor grad_out, Tensor grad_lse, Tensor grad_next_key, Tensor grad_next_value"
INPUTS = "Tensor query, Tensor key, Tensor value, Tensor positions"
PAST = "Tensor past_key, Tensor past_value, Tensor past_positions, Tensor past_pages"
OPTIONS = (
    "float scale, str method, int page, int budget, int sinks, int window, int rerank=1, int dense_below=0,"
    " float softcap=0.0, int channels=0, float mass=1.0"
)


def register(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., tuple[Tensor | None, ...]],
    *,
    states: tuple[str, ...] = (),
    options: str = OPTIONS,
) -> None:
    """Register ``memc::name``; ``states`` are those that it has beside ``PAST``, as its schema writes them."""
    tensors = ", ".join([GRADS, INPUTS, PAST, *states])
    schema = f"({tensors}, Tensor? sink_logits=None, *, {options})"

    def fake(*args: Any, **_: Any) -> tuple[Tensor, ...]:
        query, key, value, _positions, past_key, past_value, *rest = args[4:]
        sinks = rest[2 + len(states) :]
        return tuple(like(x) for x in (query, key, value, past_key, past_value, [*sinks, None][0]))

    op = define_backward(name, f"{schema} -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", fake, backward)

    def setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Any, ...]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.options = keyword_only_inputs
        ctx.mark_non_differentiable(*output[4:])

    def autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        query, key, value, _, past_key, *_, sink_logits = inputs
        out, lse, next_key, next_value, *_ = grads
        held = past_key.shape[2] + key.shape[2]
        q, k, v, pk, pv, s = op(
            or_zeros(out, query.new_empty(*query.shape[:3], value.shape[3])),
            or_zeros(lse, query.new_empty(query.shape[:3], dtype=accumulation_type(query))),
            or_zeros(next_key, key.new_empty(*key.shape[:2], held, key.shape[3])),
            or_zeros(next_value, value.new_empty(*value.shape[:2], held, value.shape[3])),
            *inputs,
            **ctx.options,
        )
        none = [None] * (2 + len(states))
        return q, k, v, None, pk, pv, *none, s if sink_logits is not None else None

    register_forward(name, forward)
    register_autograd(f"memc::{name}", autograd, setup_context=setup)
