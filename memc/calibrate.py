"""Measuring this machine: random models, lowered as any other, show the rates that predictions are made with."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from memc import machine
from memc.backend import LowerOptions, Runner
from memc.conversion.lowering import lower
from memc.conversion.speed import random_states
from memc.cost import CHANNELS, Work, op_flops, work
from memc.doctor import require_backend
from memc.errors import MemcError
from memc.frontend import capture_source
from memc.pipeline import parse_spec
from memc.plugins import load_kernels, load_plugin
from memc.program import Program
from memc.progress import Progress, Silent
from memc.raising import raise_program
from memc.target import Target, get_target
from memc.weights import materialize

QUANTISED = ("int8", "int4")
STEPS = 28
"""Steps that are timed; the first sixth does not count."""
PROMPT, PROMPTS = 256, 6
VOCABULARY = 256


@dataclass(frozen=True)
class Scale:
    """How much is measured with: bytes of float32 weights, of a state, and of a file; well past every cache."""

    weight_bytes: int = 1 << 28
    state_bytes: int = 1 << 27
    file_bytes: int = 1 << 28

    @classmethod
    def here(cls) -> Scale:
        """Return the default, or four times the last cache of this machine where that is more."""
        least = 4 * (machine.cache_bytes() or 0)
        return cls(max(cls.weight_bytes, least), max(cls.state_bytes, least))


@dataclass(frozen=True)
class Shape:
    """A random Llama; heads have 64 channels, as in the models that are small enough for a CPU."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int

    @property
    def weights(self) -> int:
        """Parameters of the layers' projections."""
        attention = 2 * self.hidden * 64 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def token_bytes(self) -> int:
        """Bytes of state that a token adds, in float32."""
        return self.layers * 2 * 4 * 64 * self.kv_heads


NARROW = Shape(hidden=64, inner=128, layers=16, heads=2, kv_heads=1)
"""Nothing but launches."""
LAYER = Shape(hidden=1024, inner=4096, layers=1, heads=16, kv_heads=4)
"""Layers of weights."""
LONG = Shape(hidden=192, inner=128, layers=4, heads=6, kv_heads=2)
"""Attention to a long context: three query heads a key-value head, as SmolLM2 has."""
WINDOWED = "window:window=64"
"""The pass that leaves a window alone, which the ops that are measured in prompts are timed against."""
IN_PROMPTS = {
    "linear_memory": "linearize:window=64,keep=none",
    "sparse_attention": "sparsify:dense_below=0",
    "quantised_attention": "sparsify:method=bounds,bits=4,dense_below=0",
    "refreshed_attention": "sparsify:refresh=8,dense_below=0",
    "compact_attention": "sparsify:method=longheads,dense_below=0",
}
"""Ops that are measured in prompts, and the passes that make them."""
CHOICE = 1792
"""Tokens held before the piece of a prompt that is timed where it chooses: more than any budget of these passes."""


@dataclass(frozen=True)
class Probe:
    """A lowered random model.

    Of what is timed the lower quartile counts: the machine undisturbed. With one thread it is time of the processor,
    which what else runs does not add to.
    """

    program: Program
    runner: Runner
    threads: int

    def step_seconds(self, context: int) -> float:
        """Return the time of one token after ``context`` others, whose states are random."""
        state = self.runner.restore(random_states(self.runner.manifest, context), context + 1)
        token, place = np.array([[1]]), np.array([[context]])
        return self._timed(lambda: self.runner.run(token, place, state, np.zeros(1, np.int64)), STEPS)

    def prompt_seconds(self, length: int, held: int = 0) -> float:
        """Return the time of a prompt's last ``length`` tokens after those ``held``, whose states are random.

        The logits of the last one alone are computed.
        """
        tokens = np.ones((1, length), np.int64)
        places = np.arange(held, held + length, dtype=np.int64)[None]
        last, runner = np.array([length - 1]), self.runner
        seen = runner.restore(random_states(runner.manifest, held), held + length) if held else None
        return self._timed(lambda: runner.run(tokens, places, seen or runner.new_state(1, length), last), PROMPTS)

    def _timed(self, call: Callable[[], object], times: int) -> float:
        clock = time.process_time if self.threads == 1 else time.perf_counter
        seconds = []
        for _ in range(times):
            began = clock()
            call()
            seconds.append(clock() - began)
        return statistics.quantiles(seconds[times // 6 :], n=4)[0]

    def work(self, context: int) -> Work:
        """Return what the model of costs counts for one token."""
        return work(self.program, context)


def calibrate(*, threads: int | None = None, scale: Scale | None = None, progress: Progress | None = None) -> Target:
    """Measure this machine with ``threads`` (default: all cores) and return the target ``cpu`` with what was found.

    Rates are those of the target's backend at the work that it does when decoding, not what the hardware could do at
    best: of weights read, of growing states read by attention, of matrix products, by type of weights and, where they
    are quantised, of a token and of a prompt, of linear memories and of choosing attention in prompts, and seconds of a
    launch with what goes with it. As in the file of that
    target they are per core. Takes a minute or two; raises ``MemcError`` E602 without the backend, E501 or E502 where
    memory or disk do not suffice.
    """
    watched, sizes, used = progress or Silent(), scale or Scale.here(), threads or machine.cores()
    target = get_target("cpu")
    need = 4 * (sizes.weight_bytes + sizes.state_bytes)
    if (memory := machine.memory_bytes()) is not None and need > memory:
        raise MemcError("E501", f"{need} bytes of memory are needed, {memory} are there")
    with tempfile.TemporaryDirectory(prefix="memc-") as folder:
        place = Path(folder)
        with watched.step("disk"):
            disk = file_bandwidth(place / "file", sizes.file_bytes)
        with watched.step("launches"):
            launch = _launch_seconds(_probe(NARROW, place / "narrow", target, used, context=8))
        with watched.step("states"):
            state_rate = _state_rate(place / "long", target, used, sizes.state_bytes)
        layers = max(2, round(sizes.weight_bytes / 4 / LAYER.weights))
        wide = Shape(LAYER.hidden, LAYER.inner, layers, LAYER.heads, LAYER.kv_heads)
        with watched.step("ops of prompts"):
            own = _own_rates(place / "own", target, used)
        flops, prompts = {}, {}
        with watched.step("weights"):
            probe = _probe(wide, place / "fp32", target, used, context=2 * PROMPT)
            reading = 4 * wide.weights / _beyond(probe.step_seconds(1), probe, launch)
            flops["fp32"] = PROMPT * 2 * wide.weights / _beyond(probe.prompt_seconds(PROMPT), probe, launch)
        for weights in QUANTISED:
            with watched.step(f"weights {weights}"):
                lowered = _lowered(probe.program, place / weights, target, used, 2 * PROMPT, weights)
                flops[weights] = 2 * wide.weights / _beyond(lowered.step_seconds(1), probe, launch)
                prompts[weights] = PROMPT * 2 * wide.weights / _beyond(lowered.prompt_seconds(PROMPT), probe, launch)
    return target.model_copy(
        update={
            "description": f"this machine, measured on {date.today()}: {machine.describe()}, {used} threads",
            "memory_bandwidth": reading / min(used, CHANNELS),
            "state_bandwidth": min(state_rate, reading) / min(used, CHANNELS),
            "disk_bandwidth": disk,
            "flops": {name: rate / used for name, rate in flops.items()},
            "prompt_flops": {name: rate / used for name, rate in prompts.items()},
            "prompt_ops": {name: rate / used for name, rate in own.items()},
            "launch_overhead": launch,
        }
    )


def file_bandwidth(path: Path, size: int) -> float:
    """Return the bytes per second at which a new file gets onto the disk. Raises ``MemcError`` E502 if it does not."""
    block = np.random.default_rng(0).bytes(min(size, 1 << 24))
    began = time.perf_counter()
    try:
        with path.open("wb") as stream:
            for _ in range(max(1, size // len(block))):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise MemcError("E502", f"a file cannot be written: {error.strerror}", str(path)) from error
    rate = path.stat().st_size / (time.perf_counter() - began)
    path.unlink()
    return rate


def _launch_seconds(probe: Probe) -> float:
    return probe.step_seconds(1) / probe.work(1).kernels


def _state_rate(place: Path, target: Target, threads: int, size: int) -> float:
    """Return the bytes per second of what a long context adds to a step."""
    context = size // LONG.token_bytes
    probe = _probe(LONG, place, target, threads, context + 1)
    seconds = probe.step_seconds(context) - probe.step_seconds(1)
    return (probe.work(context).state_bytes_read - probe.work(1).state_bytes_read) / max(seconds, 1e-9)


def _own_rates(place: Path, target: Target, threads: int) -> dict[str, float]:
    """Return the operations per second of ops in prompts, by what they and what makes their inputs add to windows."""
    dense = _probe(LONG, place, target, threads, CHOICE + PROMPT)

    def probe(name: str, spec: str) -> Probe:
        pass_ = parse_spec(spec)
        program, _ = pass_.apply(dense.program, pass_.plan(dense.program, target))
        return _lowered(program, place / name, target, threads, CHOICE + PROMPT, "fp32")

    found, window = {}, probe("window", WINDOWED)
    beside = {held: window.prompt_seconds(PROMPT, held) for held in (0, CHOICE)}
    for name, spec in IN_PROMPTS.items():
        rewritten, held = probe(name, spec), 0 if name == "linear_memory" else CHOICE
        seconds = rewritten.prompt_seconds(PROMPT, held) - beside[held]
        flops = PROMPT * op_flops(rewritten.program, name, held + PROMPT, prompt=True)
        found[name] = flops / max(seconds, 1e-9)
    return found


def _beyond(seconds: float, probe: Probe, launch: float) -> float:
    """Take the launches out of the time of a call."""
    return max(seconds - launch * probe.work(1).kernels, 1e-9)


def _probe(shape: Shape, place: Path, target: Target, threads: int, context: int) -> Probe:
    """Make a random model in float32 and lower it."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=64,
        max_position_embeddings=1 << 20,
        architectures=["LlamaForCausalLM"],
    )
    source = place / "source"
    source.mkdir(parents=True)
    config.save_pretrained(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(transformers.LlamaForCausalLM(config).state_dict(), source / "model.safetensors")
    captured = capture_source(source)
    assert captured.weights is not None
    program = materialize(raise_program(captured.program).program, captured.weights)
    return _lowered(program, place, target, threads, context, "fp32")


def _lowered(program: Program, place: Path, target: Target, threads: int, context: int, weights: str) -> Probe:
    load_kernels()
    place.mkdir(exist_ok=True)
    backend = load_plugin("memc.backends", require_backend(target))()
    _, manifest = lower(program, backend, target, place, LowerOptions(weights, context=context, threads=threads))
    return Probe(program, backend.load(place, manifest, threads), threads)
