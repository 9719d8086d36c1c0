"""Documents of what was measured: evaluations, timings, and of the machine."""

from __future__ import annotations

from memc.report import models as m


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
            m.BackendRow(
                name="eager",
                available=True,
                version="2.13.0",
                weights=["fp32", "bf16"],
                lacks={
                    "there": "cc is needed to link for it: install cc",
                    "here": "cc is needed to link for it: install cc",
                },
            ),
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
