"""Models, blocks, passes and checks as the reports have them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

from memc.blocks import (
    Alibi,
    AttentionBlock,
    Bidirectional,
    Block,
    Causal,
    Chunked,
    FeedForwardBlock,
    NearMiss,
    OtherBias,
    OtherMask,
    Prefix,
    RelativeBias,
    SlidingWindow,
)
from memc.conversion.pipeline import PassRun, relation_facts
from memc.dialect import op_spec
from memc.pipeline import PassReport
from memc.program import Program
from memc.raising import block_parameters
from memc.raising.evaluate import ancestors
from memc.raising.feed_forward import LINEAR
from memc.recipe import Train
from memc.report.facts import BlockFacts, CheckFacts, ModelFacts, NearMissFacts, RelationFacts, SiteFacts, SkippedFacts
from memc.report.files import AblationFacts
from memc.report.models import PassFacts
from memc.verify import CheckResult


def model_facts(program: Program, *, remote_code: bool = False) -> ModelFacts:
    """Describe the source model of a program."""
    info = program.model
    return ModelFacts(
        source=info.source,
        digest=info.digest,
        parameters=program.parameter_count,
        family=info.family,
        vocab_size=info.vocab_size,
        max_positions=info.max_positions,
        absolute_positions=info.absolute_positions,
        decoder=info.decoder,
        inputs=[f"{spec.name} [{', '.join(map(str, spec.shape))}]" for spec in program.inputs],
        remote_code=remote_code,
    )


def block_facts(block: Block, program: Program) -> BlockFacts:
    """Describe one block."""
    parameters = block_parameters(program, [block]) or None
    match block:
        case AttentionBlock():
            return _attention(block, program).model_copy(update={"parameters": parameters})
        case FeedForwardBlock():
            return BlockFacts(
                layer=block.layer,
                path=block.path,
                kind=block.kind,
                activation=block.activation,
                gated=block.gate is not None if block.kind == "feed_forward" else None,
                width=block.width,
                hidden=block.hidden,
                parameters=parameters,
            )


def near_miss_facts(misses: Iterable[NearMiss]) -> list[NearMissFacts]:
    """Describe what was nearly a block."""
    return [NearMissFacts(**dataclasses.asdict(miss)) for miss in misses]


def op_counts(program: Program) -> dict[str, int]:
    """Count the dialect ops of a program by name."""
    specs = (op_spec(node.target) for node in program.module.graph.nodes if node.op == "call_function")
    return dict(sorted(Counter(spec.name for spec in specs if spec is not None).items()))


def check_facts(check: CheckResult) -> CheckFacts:
    """Render a check as reports have it."""
    return CheckFacts(
        name=check.name,
        value=check.value,
        budget=check.budget,
        noise_floor=check.noise_floor,
        passed=check.passed,
        detail=check.detail,
    )


def planned_facts(report: PassReport, settings: Train | None = None) -> PassFacts:
    """Render what a pass is going to do; ``settings`` are those of training, None where there is none."""
    return _pass_facts(
        spec=report.spec,
        rewritten=[SiteFacts(**dataclasses.asdict(site)) for site in report.sites],
        skipped=[
            SkippedFacts(layer=r.layer, path=r.path, kind=r.kind, code=r.code, reason=r.reason)
            for r in report.rejections
        ],
        relations=[relation_facts(relation) for relation in report.relations],
        new_parameters=report.new_parameters,
        untrained=report.untrained,
        trains=_stages(report, settings) if settings else [],
    )


def _stages(report: PassReport, settings: Train) -> list[str]:
    if report.objectives:
        return ["transfer", *(["recovery"] if settings.transfer < 1 else [])]
    if report.learns:
        return ["text"]
    if report.adapts:
        return ["recovery"]
    if not report.recovers:
        return []
    return ["recovery"] if settings.onto == "result" else ["adapters for the original"]


def pass_facts(run: PassRun) -> PassFacts:
    """Render what a pass did."""
    report = run.report
    return _pass_facts(
        spec=report.spec,
        rewritten=report.sites,
        skipped=report.skipped,
        relations=report.relations,
        new_parameters=report.new_parameters,
        untrained=report.untrained,
        training=report.training,
        seconds=report.timing.seconds,
        resumed=run.resumed,
    )


def ablations(runs: Iterable[PassRun]) -> dict[str, AblationFacts]:
    """Return what was measured of the branches of trained passes, by spec."""
    trained = [(run.report.spec, run.report.training) for run in runs]
    branches = {spec: facts.branches for spec, facts in trained if facts is not None}
    return {spec: facts.ablation for spec, facts in branches.items() if facts is not None and facts.ablation}


def _pass_facts(rewritten: list[SiteFacts], relations: list[RelationFacts], **rest: Any) -> PassFacts:
    last = relations[-1] if relations else RelationFacts(relation="exact")
    return PassFacts(
        sites=len(rewritten),
        rewritten=rewritten,
        relations=relations,
        relation=last.metric if last.relation == "bounded" else last.relation,
        value=last.value,
        budget=last.budget,
        **rest,
    )


def _attention(block: AttentionBlock, program: Program) -> BlockFacts:
    return BlockFacts(
        layer=block.layer,
        path=block.path,
        kind=block.kind,
        heads=block.num_heads,
        kv_heads=block.num_kv_heads,
        head_dim=block.head_dim,
        value_dim=block.value_dim,
        scale=block.scale,
        **_mask(block),
        **_bias(block),
        positions=_positions(block, program),
        rotary_size=block.rotary.size if block.rotary else None,
        softcap=block.softcap,
        qk_norm=block.qk_norm,
        sink_logits=block.sink_logits is not None,
    )


def _positions(block: AttentionBlock, program: Program) -> Literal["rotary", "learned", "none", "other"]:
    if block.rotary is not None:
        return "rotary"
    if program.model.absolute_positions:
        return "learned"
    # Of keys in two parts, one of which is rotated, say: what is computed behind their projections reads positions.
    projections = [node for node in program.module.graph.nodes if node.target in LINEAR]
    read = ancestors([block.query, block.key], projections)
    return "other" if any(node.op == "placeholder" and node.target == "positions" for node in read) else "none"


def _mask(block: AttentionBlock) -> dict[str, Any]:
    match block.mask:
        case Causal():
            return {"mask": "causal"}
        case SlidingWindow(size):
            return {"mask": "sliding_window", "window": size, "mask_size": size}
        case Chunked(size):
            return {"mask": "chunked", "mask_size": size}
        case Prefix(size):
            return {"mask": "prefix", "mask_size": size}
        case Bidirectional():
            return {"mask": "bidirectional"}
        case OtherMask(reason):
            return {"mask": "other", "reason": reason}


def _bias(block: AttentionBlock) -> dict[str, Any]:
    match block.bias:
        case None:
            return {"bias": "none"}
        case Alibi():
            return {"bias": "alibi"}
        case RelativeBias():
            return {"bias": "relative"}
        case OtherBias(reason):
            return {"bias": "other"} | ({"reason": reason} if not isinstance(block.mask, OtherMask) else {})
