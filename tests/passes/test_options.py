"""What the passes leave alone, and why; options and spec strings."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from memc import plugins, sites
from memc.blocks import (
    AttentionBlock,
    Bidirectional,
    Chunked,
    OtherBias,
    OtherMask,
    Prefix,
    RelativeBias,
    SlidingWindow,
)
from memc.errors import MemcError
from memc.passes.linearize import Linearize
from memc.passes.sparsify import Sparsify
from memc.passes.window import Window
from memc.pipeline import Pass, parse_spec
from memc.program import Program
from tests.passes.tiny_program import SLOPES, TARGET, tiny

PASSES = {
    "window": Window(window=5),
    "shared": Linearize(window=5, feature_size=12),
    "lizard": Linearize(form="lizard", window=5, feature_size=12),
    "sparsify": Sparsify(budget=64, page=4, window=5),
}

CHANGES: dict[str, dict[str, Any]] = {
    "cross_attention": {"kind": "cross_attention", "kv_source": "cross"},
    "bidirectional": {"mask": Bidirectional()},
    "chunked": {"mask": Chunked(8)},
    "prefix": {"mask": Prefix(3)},
    "mask": {"mask": OtherMask("a checkerboard")},
    "relative_bias": {"bias": RelativeBias()},
    "bias": {"bias": OtherBias("a picture")},
    "shared_kv": {"kv_source": "layer 0"},
    "not_streamable": {"streamable": False},
    "hidden": {"hidden": None},
    "sliding_window": {"mask": SlidingWindow(5)},
}


def codes(rewrite: Pass, program: Program) -> list[str]:
    plan = rewrite.plan(program, TARGET)
    assert len(plan.sites) + len(plan.rejections) == 2
    assert all(rejection.reason for rejection in plan.rejections)
    return [rejection.code for rejection in plan.rejections]


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("code", CHANGES)
def test_refuses_a_block_with_its_reason(code: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sites.attention_blocks

    def second_is_odd(program: Program) -> tuple[AttentionBlock, ...]:
        first, second = real(program)
        return first, replace(second, **CHANGES[code])

    program = tiny()
    assert codes(PASSES[name], program) == []
    monkeypatch.setattr(sites, "attention_blocks", second_is_odd)
    taken = {"window": ("hidden", "sliding_window"), "sparsify": ("hidden",)}.get(name, ())
    assert codes(PASSES[name], program) == ([] if code in taken else [code])


@pytest.mark.parametrize("name", PASSES)
def test_refuses_encoders_alibi_and_sinks(name: str) -> None:
    program = tiny()
    encoder = replace(program, model=replace(program.model, decoder=False))
    assert codes(PASSES[name], encoder) == ["encoder"] * 2
    assert codes(PASSES[name], tiny(slopes=SLOPES)) == (["alibi"] * 2 if name in ("lizard", "sparsify") else [])
    sinks = tiny(sink_logits=(0.5, -1.0, 2.0, 0.0))
    assert codes(PASSES[name], sinks) == (["sink_logits"] * 2 if name == "lizard" else [])


@pytest.mark.parametrize("name", PASSES)
def test_refuses_a_state_that_another_layer_reads(name: str) -> None:
    program = tiny()
    graph = program.module.graph
    first, second = graph.find_nodes(op="call_function", target=torch.ops.memc.attention.default)
    second.args = (*second.args[:4], *first.args[4:])
    program.module.recompile()
    assert codes(PASSES[name], program) == ["shared_kv"] * 2


def test_zero_sites_is_a_plan_with_reasons() -> None:
    for rewrite in (Window(keep="every:1"), Linearize(keep="[0, 1]"), Sparsify(keep="first:2")):
        plan = rewrite.plan(tiny(), TARGET)
        assert (plan.sites, [r.code for r in plan.rejections]) == ((), ["kept", "kept"])


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ("none", []),
        ("every:4", [3, 7, 11]),
        ("first:2", [0, 1]),
        ("last:3", [9, 10, 11]),
        ("[0,5,7]", [0, 5, 7]),
        ("[ 5 , 0 ]", [0, 5]),
        ("[]", []),
        ("first:99", list(range(12))),
    ],
)
def test_keep(keep: str, kept: list[int]) -> None:
    for cls in (Window, Linearize, Sparsify):
        assert cls(keep=keep).keep == keep
    assert sorted(sites.kept_layers(keep, range(12))) == kept


@pytest.mark.parametrize("keep", ["all", "every:0", "every:", "every:-1", "[1;2]", "[1,]", "[-1]", "3", "first:x", ""])
def test_a_keep_of_no_known_form_is_refused(keep: str) -> None:
    for cls in (Window, Linearize, Sparsify):
        with pytest.raises(MemcError, match="E203 option 'keep'"):
            cls(keep=keep)


@pytest.mark.parametrize(
    "keep",
    ["heads", "heads:", "heads:0%", "heads:0.0%", "heads:100%", "heads:5", "heads:[3]", "heads:[3.0.1]", "heads:x"],
)
def test_heads_of_no_known_form_are_refused(keep: str) -> None:
    with pytest.raises(MemcError, match="E203 option 'keep' names heads as heads:P%"):
        Linearize(keep=keep)


@pytest.mark.parametrize("cls", [Window, Sparsify])
def test_some_passes_keep_whole_layers(cls: type[Window | Sparsify]) -> None:
    for keep in ("heads:25%", "heads:[0.0]"):
        with pytest.raises(MemcError, match="E203 option 'keep' is none, every:N, first:N, last:N or a list of layers"):
            cls(keep=keep)


def test_keeping_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(MemcError, match=r"names layer 2.*layers 0 to 1"):
        Window(keep="[0,2]").plan(tiny(), TARGET)


@pytest.mark.parametrize(
    "spec",
    [
        "window",
        "window:window=64,sinks=0,keep=[0,5]",
        "window:keep=every:4",
        "sparsify",
        "sparsify:method=moments,budget=96,page=8,sinks=0,window=9,rerank=1,dense_below=0,keep=first:2",
        "linearize",
        "linearize:window=128,feature=elu,gate=channel,update=gated_delta,keep=[0,5]",
        "linearize:form=lizard,meta=2,keep=last:2",
        "linearize:keep=auto:12.5%",
        "linearize:keep=heads:7.5%",
        "linearize:window=16,keep=heads:[3.0,3.2,7.1]",
        "linearize:keep=heads:[]",
    ],
)
def test_specs_round_trip(spec: str) -> None:
    rewrite = parse_spec(spec)
    assert rewrite.spec == spec
    assert parse_spec(rewrite.spec) == rewrite


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("window:window=0", "at least 1"),
        ("window:sinks=-1", "at least 0"),
        ("window:window=many", "takes int"),
        ("window:windows=4", "did you mean 'window'"),
        ("sparsify:method=mean", "one of bounds, moments, hcam, hip, landmark, lowbit"),
        ("sparsify:rerank=-1", "at least 0"),
        ("sparsify:budget=100", "not whole pages of 16.* Next: write sparsify:budget=112"),
        ("sparsify:budget=40", "not whole pages of 16.* Next: write sparsify:budget=80"),
        ("sparsify:budget=64,window=60", "may hold 96 tokens, the budget 64.* Next: write sparsify:budget=96"),
        ("sparsify:budget=64,sinks=20", "may hold 96 tokens, the budget 64"),
        ("linearize:form=shard", "one of shared, lizard"),
        ("linearize:gate=heads", "one of none, head, token, channel"),
        ("linearize:feature=hedgehog,feature_size=7", "even"),
        ("linearize:meta=2", "form=shared has no meta"),
        ("linearize:form=lizard,sinks=0", "form=lizard has no sinks"),
        ("linearize:form=lizard,update=gated_delta", "goes with form=shared"),
    ],
)
def test_bad_options_are_refused(spec: str, message: str) -> None:
    with pytest.raises(MemcError, match=message) as caught:
        parse_spec(spec)
    assert caught.value.code == "E203"


def test_no_number_is_too_large_or_none_for_any_option() -> None:
    from memc.analysis.methods import METHODS
    from memc.evaluate.tasks import TASKS

    checked = 0
    for cls in (*map(type, map(parse_spec, plugins.BUILTIN["memc.passes"])), *METHODS.values(), *TASKS.values()):
        for spec in dataclasses.fields(cls):
            values = {int: [10**20], float: [math.inf, math.nan]}.get(type(spec.default), [])
            for value in values:
                with pytest.raises(MemcError, match=spec.name) as caught:
                    cls.from_options({spec.name: value})
                assert caught.value.code == "E203"
                checked += 1
    assert checked > 50


def test_every_refusal_is_documented() -> None:
    shared = {"encoder", "kept", *CHANGES} - {"hidden", "sliding_window"}
    for cls, more in (
        (Window, set()),
        (Linearize, {"alibi", "sink_logits", "hidden", "sliding_window"}),
        (Sparsify, {"alibi", "sliding_window"}),
    ):
        text = (cls.__doc__ or "").partition("Does not handle:")[2]
        assert all(f"``{code}``" in text for code in shared | more)
