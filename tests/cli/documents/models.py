"""Documents of models: the blocks of one, and what inspecting it says."""

from __future__ import annotations

from memc.report import facts as f
from memc.report import models as m

MODEL = f.ModelFacts(
    source="models/SmolLM2-135M-Instruct.Q4_1.gguf",
    digest="b179c952",
    parameters=134_515_008,
    family="llama",
    vocab_size=49152,
    max_positions=8192,
)


def blocks() -> list[f.BlockFacts]:
    found = []
    for layer in range(30):
        path = f"model.layers.{layer}"
        found.append(
            f.BlockFacts(
                layer=layer,
                path=f"{path}.self_attn",
                kind="attention",
                heads=9,
                kv_heads=3,
                head_dim=64,
                scale=0.125,
                mask="sliding_window" if layer % 2 else "causal",
                window=512 if layer % 2 else None,
                bias="none",
                positions="rotary",
                softcap=50.0 if layer == 29 else None,
            )
        )
        found.append(
            f.BlockFacts(
                layer=layer,
                path=f"{path}.mlp",
                kind="feed_forward",
                activation="silu",
                gated=True,
                width=576,
                hidden=1536,
                raised=layer != 7,
                reason="down projection reads [red]two[/red] values\x1b[31m" if layer == 7 else "",
            )
        )
    return found


def near_misses() -> list[f.NearMissFacts]:
    return [
        f.NearMissFacts(
            layer=7,
            path="model.layers.7.mlp",
            kind="feed_forward",
            nearest="gated feed-forward",
            reason="the gate is added, not multiplied",
            node="add_31",
            source="modeling_mine.py:88",
        )
    ]


def inspected() -> m.InspectDocument:
    return m.InspectDocument(
        model=MODEL,
        blocks=blocks(),
        near_misses=near_misses(),
        state_bytes={512: 23_592_960, 4096: 188_743_680, 32768: 1_509_949_440},
        bytes_read_per_token={512: 5.61e8, 4096: 7.26e8, 32768: 2.05e9},
        flops_per_token=2.9e8,
        flops_by_context={512: 2.9e8, 4096: 4.1e8, 32768: 1.4e9},
        warnings=["8 positions are beyond what the model was trained on"],
    )
