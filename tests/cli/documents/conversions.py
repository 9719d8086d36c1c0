"""Documents of conversions, and the folder that one leaves."""

from __future__ import annotations

from pathlib import Path

from memc.report import facts as f
from memc.report import files
from memc.report import models as m
from memc.report.read import CAPTURE, CONVERT, FOLDER, RAISE, VERIFY
from tests.cli.documents.models import MODEL, blocks, near_misses
from tests.cli.documents.passes import pass_file_of, relations


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
            original_decode_ms={512: 17.0, 2048: 23.0},
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
