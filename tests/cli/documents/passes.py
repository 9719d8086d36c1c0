"""Reports of passes, with and without training."""

from __future__ import annotations

from memc.report import facts as f
from memc.report import files


def pass_file_of() -> files.PassReportFile:
    return files.PassReportFile(
        spec="linearize:window=256",
        sites=[f.SiteFacts(layer=n, path=f"model.layers.{n}.self_attn", kind="attention") for n in range(29)],
        skipped=[
            f.SkippedFacts(layer=29, path="model.layers.29", kind="attention", code="softcap", reason="is capped")
        ],
        relations=relations(),
        details={str(n): {"half_life": 512.0, "form": "shared"} for n in range(29)},
        untrained=True,
        new_parameters=1_700_000,
        parameters=136_215_008,
        state_bytes={512: 12_000_000},
        timing=f.Timing(seconds=3.25, peak_rss_bytes=1_500_000_000),
    )


def training(*, kept: tuple[int, ...] = (3, 7), trained: float = 0.25) -> files.TrainingFacts:
    """Facts of a training of eight layers that keeps some; restoring layer 5 makes the imagined model worse."""
    alone = dict.fromkeys(range(8), 0.5) | {3: 0.125, 5: 0.625, 6: 0.375, 7: 0.25}
    steps = list(range(1, 9))
    return files.TrainingFacts(
        tokens=200_000,
        transfer=files.TransferFacts(
            steps=273,
            tokens=139_776,
            curve=files.CurveFacts(
                steps=steps,
                losses={"output": [1 / step for step in steps], "<b>mass</b>": [2.0 / step for step in steps]},
            ),
            errors={
                "untrained": dict.fromkeys(range(8), 0.75),
                "initial": dict.fromkeys(range(8), 0.5),
                "trained": dict.fromkeys(range(8), trained),
            },
            by_position={
                5: [f.PositionError(start=n // 2, end=n, error=0.5 / n) for n in (64, 128, 256, 512)],
            },
            seconds=512.0,
        ),
        choice=files.ChoiceFacts(
            kept=list(kept), share=0.25, kl_nothing_restored=0.5625, kl_restored_alone=alone, seconds=36.0
        ),
        recovery=files.RecoveryFacts(
            steps=48,
            tokens=49_152,
            adapter_rank=8,
            curve=files.CurveFacts(steps=steps, losses={"kl": [0.1 / step for step in steps], "text": [3.0] * 8}),
            guard_kl=[(0, 0.0625), (16, 0.03125), (32, 0.04), (48, 0.05)],
            best_step=16,
            seconds=256.0,
        ),
        branches=branches(),
    )


def branches() -> files.BranchFacts:
    """A memory that carries about half of its due, in layers of few and of many heads and one with heads kept."""

    def layer(number: int, heads: int, kept: tuple[int, ...] = ()) -> files.LayerShare:
        due = [None if head in kept else (0.004, 0.25, 0.125, 1.0)[head % 4] for head in range(heads)]
        carried = [share and share / 2 for share in due]
        path = f"model.layers.{number}.self_attn"
        return files.LayerShare(layer=number, path=path, tokens=3552, carried=carried, due=due)

    return files.BranchFacts(
        branches=["memory", "window"],
        stands_for="tokens that left the window",
        ablation=files.AblationFacts(
            tokens=3584,
            as_it_is=files.BranchDistance(perplexity_ratio=1.0151, kl_mean=0.03125),
            without={
                "memory": files.BranchDistance(perplexity_ratio=1.0625, kl_mean=0.0771),
                "window": files.BranchDistance(perplexity_ratio=212.5, kl_mean=5.25),
            },
        ),
        shares=[layer(0, 9), layer(5, 9, kept=(0, 1, 2)), layer(121, 32)],
        seconds=81.5,
    )


def trained_pass() -> files.PassReportFile:
    """The report file of the imagined pass on a model of eight layers, two of which its training kept."""
    facts = training()
    return files.PassReportFile(
        spec="linearize:window=256,keep=[3,7]",
        sites=[
            f.SiteFacts(layer=n, path=f"model.layers.{n}.self_attn", kind="attention")
            for n in range(8)
            if n not in (3, 7)
        ],
        skipped=[
            f.SkippedFacts(
                layer=n, kind="attention", code="kept", reason="the option keep=[3,7] leaves this layer as it is"
            )
            for n in (3, 7)
        ],
        relations=[
            f.RelationFacts(relation="bounded", metric="kl_ratio_to_window", value=0.4, budget=1.0, passed=True)
        ],
        training=facts,
        new_parameters=340_000,
        timing=f.Timing(seconds=850.0),
    )


def heads_file_of() -> files.PassReportFile:
    """A pass that kept single heads, of models of few and of many heads: a layer each."""

    def layer(number: int, kv_heads: int, size: int, kept: list[int], **scores: float) -> files.LayerHeads:
        found = {kind: [0.001 * ((7 * head) % 9) for head in range(kv_heads * size)] for kind in ("induction", "echo")}
        for name, score in scores.items():
            kind, _, head = name.partition("_")
            found[kind][int(head)] = score
        path = f"model.layers.{number}.self_attn"
        return files.LayerHeads(layer=number, path=path, kv_heads=kv_heads, kept=kept, **found)

    heads = files.HeadFacts(
        chance=0.0054,
        layers=[
            layer(17, 3, 3, [1], induction_3=0.7593, induction_4=0.38, echo_3=0.0049),
            layer(18, 3, 3, [2], induction_6=0.8699, induction_7=0.64, echo_7=0.0149),
            layer(19, 8, 4, [0, 7], induction_0=1.0, echo_31=0.3404),
            layer(20, 1, 16, []),
            layer(121, 12, 1, [5], induction_5=0.12),
        ],
    )
    return files.PassReportFile(
        spec="linearize:window=64,keep=heads:[17.1,18.2,19.0,19.7,121.5]",
        sites=[f.SiteFacts(layer=17, path="model.layers.17.self_attn", kind="attention")],
        details={
            "17": {"window": 64, "kept_heads": [1], "state_bytes_per_token": 520},
            "heads": heads.model_dump(mode="json"),
        },
        untrained=True,
        new_parameters=80_000,
    )


def relations() -> list[f.RelationFacts]:
    return [
        f.RelationFacts(relation="close", value=3.1e-6, budget=1e-4, noise_floor=1e-6, tokens=256, passed=True),
        f.RelationFacts(
            relation="bounded", metric="perplexity_ratio_to_window", value=1.0003, budget=1.01, passed=True
        ),
    ]
