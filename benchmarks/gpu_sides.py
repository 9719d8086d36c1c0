"""What ``gpu.py`` times: memc's kernels, what others have of the kind, and steps of whole models. Needs torch alone.

Everything takes its device and its sizes, so that small ones run on a CPU, in Triton's interpreter.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import memc.kernels  # noqa: F401 - runs the ops
from memc.artifact import Manifest
from memc.backend import LowerOptions
from memc.backends.triton.backend import describe
from memc.backends.triton.graph import prepare
from memc.backends.triton.runner import TensorSlots, TritonRunner
from memc.frontend import capture_source
from memc.kernels.launch import Launcher
from memc.pipeline import parse_spec
from memc.program import Program, named_tensors, retie
from memc.raising import raise_program
from memc.target import get_target

Side = Callable[[], Any]

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
LARGE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
"""Llama 3's 8B."""


@dataclass(frozen=True)
class Shape:
    """Sizes of an attention op."""

    batch: int
    heads: int
    groups: int
    tokens: int
    size: int
    device: torch.device
    dtype: torch.dtype = torch.bfloat16

    def heads_of(self, count: int, *last: int) -> Tensor:
        """Return random numbers ``[B, count, T, last...]``."""
        sizes = [self.batch, count, self.tokens, *(last or (self.size,))]
        return torch.randn(sizes, device=self.device, dtype=self.dtype)

    def positions(self) -> Tensor:
        """Return positions from 0 on."""
        return torch.arange(self.tokens, device=self.device).expand(self.batch, -1).contiguous()


def linear(shape: Shape) -> tuple[dict[str, Side], dict[str, Side]]:
    """Return the sides of gated linear attention, one gate a head: forward, and forward with backward.

    fla's kernels where they are installed: ``chunk_simple_gla`` does the same, ``chunk_gla`` takes a gate a channel.
    """
    query, key, value = (shape.heads_of(shape.heads) for _ in range(3))
    gate = functional.logsigmoid(shape.heads_of(shape.heads, 1).float())
    state = torch.zeros(shape.batch, shape.heads, shape.size, shape.size, device=shape.device)
    positions = shape.positions()
    scaled = query * shape.size**-0.5

    def own() -> Tensor:
        return torch.ops.memc.linear_memory(scaled, key, value, gate, positions, state)[0]  # type: ignore[no-any-return]

    sides: dict[str, Callable[[], Tensor]] = {"memc": own}
    leaves = [scaled, key, value, gate]
    try:
        from fla.ops.gla import chunk_gla
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        pass
    else:
        by_token = [x.transpose(1, 2).contiguous() for x in (query, key, value)]
        per_head = gate.squeeze(-1).transpose(1, 2).contiguous()
        per_channel = per_head[..., None].expand(*by_token[1].shape).contiguous()
        leaves += [*by_token, per_head, per_channel]
        sides["fla chunk_simple_gla"] = lambda: chunk_simple_gla(*by_token, per_head)[0]
        sides["fla chunk_gla"] = lambda: chunk_gla(*by_token, per_channel)[0]

    def trained(side: Callable[[], Tensor]) -> None:
        for leaf in leaves:
            leaf.grad = None
        with torch.enable_grad():
            side().float().sum().backward()

    def untrained(side: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            return side()

    for leaf in leaves:
        leaf.requires_grad_()
    return (
        {name: partial(untrained, side) for name, side in sides.items()},
        {name: partial(trained, side) for name, side in sides.items()},
    )


def prompt(shape: Shape, window: int) -> dict[str, Side]:
    """Return the sides of a prompt in one layer: window and memory, the same of fla and flex_attention, and SDPA."""
    query = shape.heads_of(shape.heads)
    key, value = shape.heads_of(shape.groups), shape.heads_of(shape.groups)
    gate = functional.logsigmoid(shape.heads_of(shape.groups, 1).float())
    state = torch.zeros(shape.batch, shape.groups, shape.size, shape.size, device=shape.device)
    positions = shape.positions()
    past = key.new_zeros(shape.batch, shape.groups, window, shape.size)
    empty = torch.full((shape.batch, window), -1, device=shape.device)
    scale = shape.size**-0.5

    def own() -> Tensor:
        near, _, left_key, left_value, left, *_ = torch.ops.memc.window_memory(
            query, key, value, positions, past, past, empty, scale=scale, window=window
        )
        far, _ = torch.ops.memc.linear_memory(query, left_key, left_value, gate, left, state)
        return near + far  # type: ignore[no-any-return]

    def sdpa() -> Tensor:
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    sides: dict[str, Side] = {"memc": own, "SDPA": sdpa}
    try:
        from fla.ops.simple_gla import chunk_simple_gla
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError:
        return sides

    def near_only(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q - k < window)

    mask = create_block_mask(near_only, None, None, shape.tokens, shape.tokens, device=shape.device)
    attend = torch.compile(flex_attention)
    repeat = shape.heads // shape.groups
    by_token = [
        x.repeat_interleave(n, 1).transpose(1, 2).contiguous() for x, n in ((query, 1), (key, repeat), (value, repeat))
    ]
    per_head = gate.squeeze(-1).repeat_interleave(repeat, 1).transpose(1, 2).contiguous()

    def others() -> Tensor:
        near = attend(query, key, value, block_mask=mask, scale=scale, enable_gqa=True)
        far = chunk_simple_gla(*by_token, per_head)[0].transpose(1, 2)
        return near + far  # type: ignore[no-any-return]

    return {**sides, "fla + flex_attention": others}


def sparse(shape: Shape, held_tokens: int, budget: int, page: int = 64) -> dict[str, Side]:
    """Return the sides of one token's attention after ``held_tokens``: pages by their bounds, and SDPA over all."""
    query = shape.heads_of(shape.heads)
    key, value = shape.heads_of(shape.groups), shape.heads_of(shape.groups)
    past = Shape(shape.batch, shape.heads, shape.groups, held_tokens, shape.size, shape.device, shape.dtype)
    past_key, past_value = past.heads_of(shape.groups), past.heads_of(shape.groups)
    positions = torch.full((shape.batch, 1), held_tokens, device=shape.device)
    pages = past_key.unflatten(2, (-1, page))
    bounds = torch.cat([pages.amax(3), pages.amin(3)], -1)
    options = {"method": "bounds", "page": page, "budget": budget, "sinks": page, "window": page}

    def own() -> Tensor:
        return torch.ops.memc.sparse_attention(  # type: ignore[no-any-return]
            query,
            key,
            value,
            positions,
            past_key,
            past_value,
            past.positions(),
            bounds,
            scale=shape.size**-0.5,
            **options,
        )[0]

    def dense() -> Tensor:
        return functional.scaled_dot_product_attention(query, past_key, past_value, enable_gqa=True)

    return {"memc": own, "SDPA": dense}


def hybrid(sizes: Mapping[str, Any], spec: str, target: str, dtype: torch.dtype, device: torch.device) -> Program:
    """Capture a model of some sizes from its configuration, rewrite it by ``spec``, and fill it with random weights."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": 1 << 18,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **sizes,
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        program = raise_program(capture_source(folder, weights=False).program).program
    rewrite = parse_spec(spec)
    program, _ = rewrite.apply(program, rewrite.plan(program, get_target(target)))
    made: dict[int, Tensor] = {}
    for _, value in named_tensors(program.module):
        if id(value) not in made and value.is_floating_point():
            fresh = torch.randn(value.shape, device=device, dtype=value.dtype) * 0.02
            made[id(value)] = fresh
    retie(program.module, {n: made[id(v)] for n, v in list(named_tensors(program.module)) if id(v) in made})
    program.module.to(device)
    program.make_tensors_on(device)
    program.module.requires_grad_(False)
    return program


class Steps:
    """A program's step on a state that is as long as a context, and the bytes that it cannot help reading."""

    def __init__(self, program: Program, launcher: Launcher, batch: int, context: int, device: torch.device) -> None:
        """Allocate the state, random as after ``context`` tokens: a step takes as long as after a prompt."""
        prepared = prepare(program)
        lowered = describe(program, prepared, LowerOptions(context=context + 1024), {})
        facts = {"version": "0", "source": "random", "source_digest": "", "family": "llama", "weights": "random"}
        manifest = Manifest(
            **facts,
            target="cpu",
            backend="triton",
            lowered=lowered.path,
            inputs=lowered.inputs,
            outputs=lowered.outputs,
            states=lowered.states,
            capacity=lowered.capacity,
            vocab_size=program.model.vocab_size,
        )
        self.runner = TritonRunner(prepared, manifest, device, launcher)
        state = self.runner.new_state(batch)
        assert isinstance(state, TensorSlots)
        self.state, self.position = state, context
        self.state.lengths[:] = context
        for spec in manifest.states:
            tensor = self.state.tensors[spec.input]
            if tensor.is_floating_point():
                tensor.normal_(std=0.02)
            elif spec.grows is None:  # the positions of a ring, which has the last tokens
                tensor.copy_(torch.arange(context - tensor.shape[1], context, device=device).expand_as(tensor))
            else:
                tensor[:, :context] = torch.arange(context, device=device)
        weights = {name: value for name, value in named_tensors(program.module) if value.is_floating_point()}
        read = {id(value): value.numel() * value.element_size() for value in weights.values()}
        # Of a table of tokens one row is read, unless it is the last layer's matrix too.
        untied = any("lm_head" in name for name in weights)
        self.bytes = sum(read.values()) - (max(read.values()) if untied else 0)
        for spec in program.states:
            # What grows is read; what does not is written too.
            self.bytes += spec.bytes(context, batch) * (1 if spec.grows is not None else 2)

    def __call__(self) -> None:
        """Decode one token in every sequence."""
        tokens = np.zeros((self.state.batch, 1), np.int64)
        positions = np.full((self.state.batch, 1), self.position, np.int64)
        self.runner.run(tokens, positions, self.state)
        self.position += 1


class Dense:
    """A step of the same sizes in torch: SDPA over a cache of fixed size, through torch.compile with CUDA graphs."""

    def __init__(
        self,
        sizes: Mapping[str, int],
        batch: int,
        context: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        compiled: bool,
    ) -> None:
        """Allocate random weights and a random cache."""
        width, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
        self.heads, self.groups = sizes["num_attention_heads"], sizes["num_key_value_heads"]
        self.size = width // self.heads

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype) * 0.02

        out = (self.heads + 2 * self.groups) * self.size
        inner = sizes["intermediate_size"]
        self.layers = [
            (random(out, width), random(width, width), random(2 * inner, width), random(width, inner))
            for _ in range(layers)
        ]
        self.table = random(sizes["vocab_size"], width)
        slots = context + 1024
        self.cache = [tuple(random(batch, self.groups, slots, self.size) for _ in range(2)) for _ in range(layers)]
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.slot = torch.full((1,), context, dtype=torch.int64, device=device)
        self.seen = torch.arange(slots, device=device)[None, None, None, :]
        self.step = torch.compile(self._step, mode="reduce-overhead") if compiled else self._step

    def _step(self) -> Tensor:
        x = self.table[self.tokens]
        mask = self.seen <= self.slot
        for (qkv, out, up, down), (keys, values) in zip(self.layers, self.cache, strict=True):
            h = functional.rms_norm(x, x.shape[-1:])
            parts = functional.linear(h, qkv).unflatten(-1, (-1, self.size)).transpose(1, 2)
            query, key, value = parts.split([self.heads, self.groups, self.groups], 1)
            keys.index_copy_(2, self.slot, key)
            values.index_copy_(2, self.slot, value)
            a = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)
            x = x + functional.linear(a.transpose(1, 2).flatten(2), out)
            gate, inner = functional.linear(functional.rms_norm(x, x.shape[-1:]), up).chunk(2, -1)
            x = x + functional.linear(functional.silu(gate) * inner, down)
        return functional.linear(functional.rms_norm(x, x.shape[-1:]), self.table)

    def __call__(self) -> None:
        """Decode one token in every sequence."""
        with torch.no_grad():
            self.step().argmax(-1).cpu()
