"""Bundles: what is compiled is what a program launches, figures are the binary's, and what does not fit is refused."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import op_programs as ops
import pytest
import torch

from memc.artifact import Manifest
from memc.backend import Lowered, LowerOptions, No, Yes
from memc.backends.triton import INSTALL, TritonBackend
from memc.backends.triton import backend as lowering
from memc.backends.triton import bundle as bundles
from memc.backends.triton.bundle import INFO, Bundle, build, fit, read_bundle
from memc.backends.triton.compiler import Binary
from memc.backends.triton.graph import prepare
from memc.backends.triton.launcher import BundleLauncher, Cuda
from memc.backends.triton.variants import Variant, variant_of, variants
from memc.errors import MemcError
from memc.infer import infer
from memc.kernels.launch import GPUS, INTERPRETER, Jit, Launch, function
from memc.kernels.tiles import Asked
from memc.program import Program
from memc.target import get_target
from tests.backends.runs import SCENARIOS, compare, manifest_of
from tests.backends.triton_support import interpret
from tests.core.test_families import raised

pytest.importorskip("triton", reason="Triton is not installed")

TARGET = "nvidia-sm90"
FOLDER = lowering.PLACE / lowering.KERNELS


def program() -> Program:
    return ops.llama("window_memory", layers=1)


@dataclass(frozen=True)
class Made:
    """A lowered program and where it lies."""

    folder: Path
    lowered: Lowered
    bundle: Bundle


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("triton")
    lowered = TritonBackend().lower(program(), get_target(TARGET), folder, LowerOptions(context=40))
    return Made(folder, lowered, read_bundle(folder / FOLDER / INFO))


def test_a_bundle_has_binaries_with_their_figures(made: Made) -> None:
    assert made.bundle.target == TARGET and made.bundle.binaries
    for binary in made.bundle.binaries:
        assert (made.folder / FOLDER / binary.file).read_bytes()[:4] == b"\x7fELF"
        assert (made.folder / FOLDER / f"{binary.variant.key}.ttir").read_text().strip()
        assert 0 < binary.registers <= 255 and binary.spills == 0 and binary.scratch == 2
        assert binary.symbol == binary.variant.kernel.partition(".")[2]
    assert "compiled, not run" in made.lowered.forms["kernels"] or torch.cuda.is_available()
    assert {state.update for state in made.lowered.states} == {"alias"}


@dataclass
class Checked:
    """Interprets what a bundle holds and fails on anything else."""

    held: set[str]
    gpu: Any = INTERPRETER
    tiles: Mapping[str, Any] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def __call__(self, launch: Launch) -> None:
        key = variant_of(launch).key
        assert key in self.held, launch.kernel
        self.used.add(key)
        Jit(INTERPRETER)(launch)


def test_what_is_launched_is_in_the_bundle(made: Made) -> None:
    runner = interpret(program())
    keys = {binary.variant.key for binary in made.bundle.binaries}
    runner.launcher = checked = Checked(keys, GPUS[TARGET], made.bundle.tiles)
    for scenario in ("pieces", "padding"):
        assert compare(program(), runner, SCENARIOS[scenario]) < 1e-4
    assert checked.used


def test_a_bundle_that_lacks_a_kernel_is_noticed(made: Made) -> None:
    runner = interpret(program())
    keys = {binary.variant.key for binary in made.bundle.binaries[1:]}
    runner.launcher = Checked(keys, GPUS[TARGET], made.bundle.tiles)
    with pytest.raises(AssertionError, match=made.bundle.binaries[0].variant.kernel):
        compare(program(), runner, SCENARIOS["pieces"])


@dataclass
class Recorder:
    """A driver that remembers."""

    loaded: list[tuple[str, int]] = field(default_factory=list)
    launched: list[tuple[Any, ...]] = field(default_factory=list)

    def load(self, binary: bytes, symbol: str, shared: int) -> Any:
        assert binary[:4] == b"\x7fELF"
        self.loaded.append((symbol, shared))
        return symbol

    def launch(self, kernel: Any, grid: Any, threads: int, shared: int, stream: int, values: Sequence[Any]) -> None:
        self.launched.append((kernel, grid, threads, list(values)))


def example(made: Made, x: torch.Tensor) -> Launch:
    variant = next(b.variant for b in made.bundle.binaries if b.variant.kernel == "norm.normalise")
    tensors: dict[str, Any] = {name: x for name, kind in variant.arguments.items() if kind == "*fp32"}
    return Launch(variant.kernel, (3, 1, 1), {**tensors, "rows": 5}, variant.constants, variant.warps, variant.stages)


def test_a_launcher_passes_what_the_binary_takes(made: Made) -> None:
    driver = Recorder()
    launcher = BundleLauncher(GPUS[TARGET], made.bundle, made.folder / FOLDER, driver)
    x = torch.zeros(4, 16)
    for _ in range(2):
        launcher(example(made, x))
    launcher(example(made, x.flatten()[1:17]))
    assert driver.loaded == [("normalise", driver.loaded[0][1])]
    kernel, grid, threads, values = driver.launched[0]
    assert (kernel, grid, threads) == ("normalise", (3, 1, 1), 128)
    assert [type(value) for value in values] == [ctypes.c_void_p] * 4 + [ctypes.c_int] + [ctypes.c_void_p] * 2
    assert [value.value for value in values] == [x.data_ptr()] * 4 + [5, None, None]
    # A view that begins between two multiples is handed over as a copy.
    assert all(value.value % 16 == 0 for value in driver.launched[2][3][:4])
    unknown = replace(example(made, x), warps=16)
    with pytest.raises(MemcError, match=r"holds no norm\.normalise") as refused:
        launcher(unknown)
    assert refused.value.code == "E602"


def binary(**changes: Any) -> Binary:
    variant = Variant(kernel="norm.normalise", arguments={}, constants={"block_size": 64}, warps=4, stages=2)
    figures = {"threads": 128, "shared": 0, "registers": 32, "spills": 0, "scratch": 2, **changes}
    return Binary(variant=variant, symbol="normalise", file="x.cubin", **figures)


def test_spills_and_too_much_shared_memory_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = get_target("nvidia-sm120")
    gpu, wanted = GPUS[target.name], [binary().variant]

    def built(**figures: int) -> Bundle:
        made = binary(**figures)
        monkeypatch.setattr(bundles, "compiled", lambda *_: {made.variant.key: made})
        return build(wanted, target, gpu, tmp_path)

    assert len(built(shared=101_376).binaries) == 1
    with pytest.raises(MemcError, match="spills 8 bytes of stack") as refused:
        built(spills=8)
    assert "block_size 64, 4 warps" in str(refused.value)
    with pytest.raises(MemcError, match="needs 101377 bytes of shared memory, nvidia-sm120 has 101376"):
        built(shared=101_377)


def fitting(monkeypatch: pytest.MonkeyPatch, fine: Callable[[Variant], bool], folder: Path) -> Bundle:
    """Fit a bundle with a compiler for which only what is ``fine`` does not spill."""

    def compiled(wanted: list[Variant], *_: object) -> dict[str, Binary]:
        made = {}
        for variant in wanted:
            figures = binary(spills=0 if fine(variant) else 8)
            made[variant.key] = figures.model_copy(update={"variant": variant, "file": f"{variant.key}.cubin"})
            (folder / f"{variant.key}.cubin").touch()
            (folder / f"{variant.key}.ttir").touch()
        return made

    monkeypatch.setattr(bundles, "compiled", compiled)
    made = program()
    infer(made)
    return fit(made, prepare(made).module, get_target(TARGET), GPUS[TARGET], folder)


def test_what_spills_is_cut_narrower_and_the_bundle_says_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fine(variant: Variant) -> bool:
        return variant.kernel != "attention.prompt" or (variant.warps == 4 and variant.stages == 1)

    bundle = fitting(monkeypatch, fine, tmp_path)
    assert set(bundle.tiles) == {"attention.prompt"}
    assert {tile.warps for tile in bundle.tiles["attention.prompt"].values()} == {4}
    held = {f"{b.variant.key}{end}" for b in bundle.binaries for end in (".cubin", ".ttir")}
    assert {path.name for path in tmp_path.iterdir()} == {*held, INFO}
    assert read_bundle(tmp_path / INFO) == bundle
    # Host code that is given these tiles launches what the bundle holds.
    runner = interpret(program())
    runner.launcher = Checked({b.variant.key for b in bundle.binaries}, GPUS[TARGET], bundle.tiles)
    assert compare(program(), runner, SCENARIOS["prompt"]) < 1e-4
    with pytest.raises(MemcError, match="a kernel spills 8 bytes"):
        fitting(monkeypatch, lambda variant: variant.kernel != "attention.prompt", tmp_path)


def test_lengths_of_an_encoder_and_a_decoder_need_no_kernels_of_their_own() -> None:
    made = raised("t5")[0].program
    needed = variants(made, prepare(made).module, GPUS[TARGET], Asked({})).values()
    assert {True, False} == {n.variant.constants["has_bias"] for n in needed if n.variant.kernel == "attention.prompt"}


def test_a_kernel_that_does_not_compile_is_named(tmp_path: Path) -> None:
    bad = Variant(kernel="norm.normalise", arguments={"x": "*fp32"}, constants={}, warps=4, stages=2)
    with pytest.raises(MemcError, match=r"does not compile norm\.normalise") as refused:
        build([bad], get_target(TARGET), GPUS[TARGET], tmp_path)
    assert refused.value.code == "E602"


def test_the_interpreter_is_on_in_this_process_only() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"
    assert "Interpreted" in type(function("norm.normalise")).__name__
    assert TritonBackend().self_test() == ""


def manifest(made: Made) -> Manifest:
    return manifest_of(made.lowered, program(), "fp32", "triton").model_copy(update={"target": TARGET})


def test_loading_without_the_gpu_says_so(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "here", lambda: "")
    with pytest.raises(MemcError, match="torch sees no GPU here"):
        TritonBackend().load(made.folder, manifest(made))
    monkeypatch.setattr(lowering, "here", lambda: "nvidia-sm80")
    with pytest.raises(MemcError, match="the kernels are for nvidia-sm90, this GPU is nvidia-sm80") as refused:
        TritonBackend().load(made.folder, manifest(made))
    assert "--target nvidia-sm80" in str(refused.value.next)


def test_a_changed_binary_is_not_loaded(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "here", lambda: TARGET)
    files = {path.relative_to(made.folder).as_posix(): "0" * 64 for path in made.folder.rglob("*") if path.is_file()}
    changed = manifest(made).model_copy(update={"files": files})
    with pytest.raises(MemcError, match="digest of") as refused:
        TritonBackend().load(made.folder, changed)
    assert refused.value.code == "E402"


def test_a_driver_without_its_binding_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", None)
    with pytest.raises(MemcError, match="cuda-bindings is not installed"):
        Cuda()


def test_a_missing_or_unknown_triton_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TritonBackend().missing() == ""
    monkeypatch.setattr("memc.backends.triton.version", lambda name: "3.10.1")
    assert TritonBackend().missing() == "triton 3.10.1 is installed, 3.6 to 3.9 are known: " + INSTALL
    monkeypatch.setattr("memc.backends.triton.find_spec", lambda name: None)
    assert TritonBackend().missing() == "triton is not installed: " + INSTALL
    with pytest.raises(MemcError, match="triton is not installed"):
        TritonBackend().lower(program(), get_target(TARGET), Path("nowhere"), LowerOptions())


def test_a_bundle_that_does_not_read(tmp_path: Path) -> None:
    (tmp_path / INFO).write_text(json.dumps({"target": TARGET}))
    with pytest.raises(MemcError) as refused:
        read_bundle(tmp_path / INFO)
    assert refused.value.code == "E309"


def test_what_is_supported() -> None:
    target = get_target(TARGET)
    backend = TritonBackend()
    found = {}
    made = {"llama": program(), "sparse": ops.sparse_attention(), "bits": ops.sparse_attention(bits=4)}
    made |= {"compact": ops.compact_attention(), "refreshed": ops.sparse_attention(refresh=2, mass=0.5)}
    made |= {"tree": ops.sparse_attention(method="hip"), "wide": ops.sparse_attention(key=260)}
    made |= {"landmarks": ops.sparse_attention(method="landmark"), "by events": ops.eventful_attention()}
    for name, each in made.items():
        for node in each.module.graph.nodes:
            found[name, str(node.target)] = backend.supports(node, target)
    assert isinstance(found["llama", "memc.window_memory.default"], Yes)
    chosen = {"sparse": "sparse", "tree": "sparse", "bits": "quantised", "refreshed": "refreshed", "compact": "compact"}
    for name, op in chosen.items():
        assert found[name, f"memc.{op}_attention.default"] == Yes("Triton kernels, state in place")
    for name in ("wide", "landmarks", "by events"):
        refused = found[name, "memc.sparse_attention.default"]
        assert isinstance(refused, No) and "--backend eager" in refused.reason
    assert backend.refuses_weights("int8", target) and not backend.refuses_weights("bf16", target)
    assert "compiles for" in str(backend.refuses_weights("fp32", get_target("x86-64-v3")))
