"""Documents of an imagined conversion, for the tests of views and commands."""

from __future__ import annotations

from pathlib import Path

from memc.report import bank as b
from memc.report import facts as f
from memc.report import files
from memc.report import models as m
from memc.report.read import CAPTURE, CONVERT, FOLDER, RAISE, VERIFY

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


def relations() -> list[f.RelationFacts]:
    return [
        f.RelationFacts(relation="close", value=3.1e-6, budget=1e-4, noise_floor=1e-6, tokens=256, passed=True),
        f.RelationFacts(
            relation="bounded", metric="perplexity_ratio_to_window", value=1.0003, budget=1.01, passed=True
        ),
    ]


def converted(*, dry_run: bool = False) -> m.ConvertDocument:
    item = pass_file_of()
    return m.ConvertDocument(
        out="out",
        target="cpu",
        backend="onnx",
        weights="int8",
        dry_run=dry_run,
        model=MODEL,
        passes=[
            m.PassFacts(
                spec=item.spec,
                sites=len(item.sites),
                rewritten=item.sites,
                skipped=item.skipped,
                relation="bounded",
                value=None if dry_run else 1.0003,
                budget=1.01,
                relations=[r.model_copy(update={"value": None}) if dry_run else r for r in relations()],
                new_parameters=1_700_000,
                untrained=True,
                seconds=3.25,
            )
        ],
        original=predicted(1),
        predicted=predicted(4),
        curves={"original": curve(1), "converted": curve(4)},
        measured=None
        if dry_run
        else m.Measured(
            parameters=136_215_008,
            decode_ms={512: 15.3, 2048: 16.1},
            disk_bytes=800_000_000,
            peak_rss_bytes=2_000_000_000,
            seconds=61.5,
            at="2026-11-28T13:40:00+00:00",
        ),
        checks=[] if dry_run else checks(),
        verified=not dry_run,
        versions={"memc": "0.1.0", "torch": "2.13.0"},
        seed=7,
        threads=2,
        machine="Linux x86_64, 2 cores",
        command="memc convert models/SmolLM2-135M-Instruct.Q4_1.gguf -o out-again --recipe out/recipe.yaml --threads 2",
        untrained=True,
        warnings=["beyond_trained: 32768 tokens are past the trained positions"],
        next=['memc generate out --prompt "Hello"', "memc report out --html"],
    )


def fitted() -> files.FitFacts:
    """Three settings over thirty layers; the second limit binds."""
    settings = ["sparsify:budget=256,dense_below=512", "window:window=64", "window"]
    layers = [
        files.FitLayer(
            layer=layer,
            spec=["", settings[1], settings[2], settings[1]][layer % 4] if layer != 5 else settings[0],
            kl={spec: 0.001 * (1 + layer % 3) / (1 + index) for index, spec in enumerate(settings)},
        )
        for layer in range(30)
    ]
    prune = [f"prune:amount={amount},unit=ffn,of=layers,alike=true" for amount in (0.1, 0.25)]
    layers += [
        files.FitLayer(
            layer=layer,
            kind="feed_forward",
            spec=prune[0] if layer in (3, 4) else "",
            kl={prune[0]: 0.002 * (1 + layer % 5), prune[1]: 0.01 * (1 + layer % 5)},
        )
        for layer in range(30)
    ]
    return files.FitFacts(
        limits=[
            files.FitLimit(limit="state@32k<=0.5x", reached=6.0e8, original=1.5e9, used=0.8),
            files.FitLimit(limit="ppl<=1.05x", reached=1.047, original=1.0, used=0.997),
        ],
        layers=layers,
        weights="int8",
        weights_kl={"int8": 0.0009, "int4": 0.0912},
        binds="ppl<=1.05x",
        kl_expected=0.0325,
        kl_mean=0.04125,
        perplexity_ratio=1.047,
        tokens=2048,
        seconds=211.5,
    )


def predicted(saving: int) -> m.Predicted:
    return m.Predicted(
        parameters=134_515_008,
        flops_per_token=2.9e8,
        flops_by_context={512: 2.9e8, 4096: 4.1e8},
        bytes_read_per_token={512: 5.4e8, 4096: 7.3e8},
        decode_ms={512: 14.2, 4096: 21.7 / saving},
        prefill_ms={512: 2150.0, 4096: 26_400.0 / saving},
        state_bytes={512: 23_592_960, 4096: 188_743_680 // saving, 32768: 1_509_949_440 // saving},
        weight_bytes=538_060_032,
        peak_rss_bytes=1_900_000_000,
        disk_bytes=1_076_120_064,
        seconds=42.0,
    )


def curve(saving: int) -> m.ByContext:
    contexts = [128 << step for step in range(11)]
    return m.ByContext(
        bytes_read_per_token={n: 5.4e8 + 46_080 * n / saving for n in contexts},
        decode_ms={n: 14.2 + n / 1000 / saving for n in contexts},
        prefill_ms={n: 4.0 * n + n * n / 4000 / saving for n in contexts},
        state_bytes={n: 46_080 * n // saving for n in contexts},
    )


def checks() -> list[f.CheckFacts]:
    return [
        f.CheckFacts(
            name="lowered", value=2.1e-5, budget=1e-3, noise_floor=1.2e-6, passed=True, detail="fp32, 6 shapes"
        ),
        f.CheckFacts(name="perplexity ratio", value=1.21, budget=1.1, passed=False, detail="sampled text, 2048 tokens"),
    ]


def write_report(folder: Path, name: str, document: f.Document) -> None:
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    (folder / FOLDER / name).write_text(document.to_json())


def write_artifact(folder: Path, *, finished: bool = True) -> Path:
    """Write the report files of the imagined conversion; unfinished: up to the pass, and an error."""
    write_report(folder, CAPTURE, files.CaptureReport(model=MODEL, timing=f.Timing(seconds=4.5)))
    write_report(
        folder, RAISE, files.RaiseReport(blocks=blocks(), near_misses=near_misses(), timing=f.Timing(seconds=1.5))
    )
    write_report(folder, "02-linearize.json", pass_file_of())
    if finished:
        write_report(folder, VERIFY, verified())
        write_report(folder, CONVERT, converted().model_copy(update={"out": str(folder)}))
        (folder / "memc.json").write_text("{}")
    else:
        error = m.ErrorDocument(code="E401", message="verification failed", next="memc report out", exit_code=4)
        write_report(folder, "error.json", error)
    return folder


def verified() -> files.VerifyReport:
    """Checks, and gates of two layers, one of which forgets nothing that can be told."""
    gates = [
        f.GateFacts(path="model.layers.3.self_attn", shares={5: 0.25, 7: 0.75}),
        f.GateFacts(path="model.layers.4.self_attn", shares={16: 1.0}),
    ]
    return files.VerifyReport(checks=checks(), text="sampled", tokens=2048, gates=gates)


def evaluated() -> m.EvalDocument:
    sides = {
        name: m.EvalSide(
            source=name,
            perplexity=30.0 + index,
            tokens=2044,
            by_position=[
                m.PositionBucket(start=1, end=256, perplexity=33.0, tokens=1020),
                m.PositionBucket(start=256, end=512, perplexity=28.5, tokens=1024),
            ],
            by_context=[
                m.ContextPerplexity(context=32, perplexity=45.0, tokens=1984),
                m.ContextPerplexity(context=512, perplexity=30.0 + index, tokens=2044),
            ],
        )
        for index, name in enumerate(("a", "b"))
    }
    return m.EvalDocument(
        sides=sides,
        text="book.txt",
        window=512,
        kl_mean=0.0123,
        kl_p99=0.3,
        top1_agreement=0.93,
        ratio=1.0667,
        by_context=[
            m.Divergence(context=32, ratio=1.0, kl_mean=1e-7, kl_p99=1e-6, top1_agreement=1.0),
            m.Divergence(context=512, ratio=1.0667, kl_mean=0.0123, kl_p99=0.3, top1_agreement=0.93),
        ],
        free_running=m.FreeRunningFacts(
            prompts=4,
            prompt_tokens=512,
            new_tokens=256,
            first_difference=[12, 80, 256, 40],
            equal_before=0.379,
            equal=0.41,
        ),
        warnings=["the text has 2048 tokens: no window of 4096 is full"],
    )


def recalled() -> m.EvalDocument:
    sides = {}
    for name, source, share in (("a", "out/streaming", 0.25), ("b", "out/dense", 1.0)):
        passkey = [
            m.TaskCell(
                task="passkey",
                length=length,
                depth=depth,
                samples=10,
                questions=10,
                accuracy=1.0 if depth == 1.0 else share,
                stderr=0.0 if depth == 1.0 or share == 1.0 else 0.14,
            )
            for length in (512, 32768)
            for depth in (0.0, 0.25, 0.5, 0.75, 1.0)
        ]
        chance = {"mqar:pairs=8,gap=256": 0.125, "needle_multivalue": 0.25}
        others = [
            m.TaskCell(task=task, length=512, samples=10, questions=80, accuracy=0.9 * share, stderr=0.03, chance=least)
            for task, least in chance.items()
        ]
        sides[name] = m.EvalSide(source=source, cells=[*passkey, *others], tasks={"passkey": 0.4})
    return m.EvalDocument(sides=sides, samples=10, seed=0)


def benched() -> m.BenchDocument:
    rows = [
        m.BenchRow(
            side=side,
            context=context,
            prefill_tokens_per_s=412.5,
            decode_tokens_per_s=1000 / ms,
            decode_ms_median=ms,
            decode_ms_p90=ms * 1.1,
            cpu_ms_median=ms * 1.9,
            state_bytes=23_592_960,
            rss_bytes=10**9,
        )
        for context in (512, 4096)
        for side, ms in (("a", 9.5), ("b", 12.25))
    ]
    return m.BenchDocument(threads=2, machine="Linux x86_64, 2 cores", sides={"a": "out", "b": "dense"}, rows=rows)


def examined() -> m.DoctorDocument:
    return m.DoctorDocument(
        version="0.1.0",
        python="3.11.7",
        machine="Linux x86_64, 2 cores",
        threads=2,
        packages={"torch": "2.13.0", "onnxruntime": "1.32.0", "triton": None},
        backends=[
            m.BackendRow(name="eager", available=True, version="2.13.0", weights=["fp32", "bf16"]),
            m.BackendRow(name="mine", available=False, reason="cannot be imported: no module 'mine'"),
        ],
        kernels={"com.microsoft.LinearAttention": ["float"]},
        coverage=[
            m.CoverageRow(family="llama", captured=True, attention=True, ffn=True, logits=True),
            m.CoverageRow(
                family="t5", captured=True, attention=True, ffn=True, logits=False, note="modeling_t5.py:412: bias"
            ),
        ],
        problems=["backend mine: cannot be imported: no module 'mine'"],
    )


def bank(*, trained: bool = False, cluster: bool = False) -> b.BankDocument:
    levels = [
        b.BankLevel(
            level=level,
            rank=rank,
            clusters=16 ** (level + 1),
            empty=3 if level == 2 else 0,
            trained=16 ** (level + 1) - level if trained and rank else 0,
            smallest=812 // 16**level,
            median=1000 / 16**level,
            largest=1466 // 16**level,
            balance=1.4375 + level,
            limit=0.96875,
            record_bytes=6 * 30 * 576 * rank,
            level_bytes=6 * 30 * 576 * rank * 16 ** (level + 1),
            tier=tier,
            seconds=seconds,
        )
        for level, (rank, tier, seconds) in enumerate([(64, "memory", 0.001), (16, "disk", 0.0025), (0, "", 0.0)])
    ]
    found = b.BankCluster(
        cluster="0.3",
        passages=62,
        trained=trained,
        children=[4] * 15 + [2],
        nearest=[
            b.BankPassage(index=17, source="novels.txt", distance=0.5, text="Emma Woodhouse,\nhandsome, clever"),
            b.BankPassage(index=1811, source="notes.jsonl", distance=0.5625, text="kludge \x1b[31m " + "word " * 90),
        ],
    )
    return b.BankDocument(
        bank="bank",
        model=MODEL.source,
        model_digest=MODEL.digest,
        encoder="sentence-transformers/all-MiniLM-L6-v2",
        encoder_width=384,
        branch=16,
        layers=list(range(30)),
        width=576,
        dtype="bfloat16",
        seed=0,
        passages=16_000,
        sources={"novels.txt": 12_000, "notes.jsonl": 4_000},
        fetched_parameters=90 * 576 * 80,
        bank_parameters=90 * 576 * (64 * 16 + 16 * 256),
        disk_bytes=600_000_000,
        predicted_seconds=0.0035,
        levels=levels,
        cluster=found if cluster else None,
    )


def bank_trained() -> b.BankTrainDocument:
    jobs = [
        b.BankJob(
            job=job,
            passages=passages,
            blocks=17,
            steps=passages,
            tokens=256 * passages,
            loss_first=3.75,
            loss_last=3.25 if passages else None,
            seconds=passages / 2,
        )
        for job, passages in (("0", 812), ("15", 1466), ("generic", 2278))
    ]
    rows = [
        b.BankHeldOut(cluster="0", tokens=2040, original=38.5, block=32.25, generic=32.5, wrong=39.125),
        b.BankHeldOut(cluster="15", tokens=1530, original=50.25, block=34.5, generic=None, wrong=51.0),
    ]
    return b.BankTrainDocument(bank="bank", jobs=jobs, held_out=rows)
