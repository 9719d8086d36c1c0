"""What analyses find."""

from __future__ import annotations

from memc.report import facts as f
from memc.report import models as m
from tests.cli.documents.models import MODEL


def analysed(method: str) -> m.AnalysisDocument:
    """What an analysis found in two layers: heads that carry the context, or the bigram subnetwork."""
    heads = method == "heads"
    units = []
    for layer in (0, 29):
        scores = [round(0.1 * ((4 * head + layer) % 9) - 0.2, 4) for head in range(9)]
        effects = {
            "context": [max(0.0, score) for score in scores],
            "memory": [max(0.0, -score) for score in scores],
            "context_error": [0.01] * 9,
            "memory_error": [0.02] * 9,
        }
        kept = [head for head, score in enumerate(scores) if score > 0.4]
        path = f"model.layers.{layer}.self_attn"
        kinds = {"layer": layer, "path": path, "kind": "attention", "kv_heads": 3}
        units.append(m.UnitFacts(**kinds, scores=scores, kept=kept, **(effects if heads else {})))
        if not heads:
            path = f"model.layers.{layer}.mlp"
            scores = [0.5 - 0.001 * channel for channel in range(1536)]
            kept = [] if layer else [*range(500)]
            units.append(m.UnitFacts(layer=layer, path=path, kind="feed_forward", scores=scores, kept=kept))
    found = m.BigramFacts(
        tokens=512,
        share=0.0417,
        penalty=1.0,
        steps=200,
        kl_whole=3.25,
        kl_kept=0.375,
        kl_none=8.5,
        kl_random=6.125,
        correlation=0.9531,
        kl_without=7.75,
        kl_without_random=0.5,
    )
    answers = m.MediationFacts(
        prompts=32, favour="context", share=0.05, answered_context=0.5625, answered_memory=0.21875
    )
    left = f.SkippedFacts(layer=7, path="model.layers.7.mlp", kind="moe", code="moe", reason="a mixture of experts")
    return m.AnalysisDocument(
        method="heads" if heads else "bigram",
        model=MODEL,
        text="passages sampled from the model",
        units=units,
        left_out=[] if heads else [left],
        bigram=None if heads else found,
        mediation=answers if heads else None,
        timing=f.Timing(seconds=64.0),
    )
