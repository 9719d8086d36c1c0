"""Train a small transformer until it recalls, linearize it, and measure how much of the recall is left.

Multi-query associative recall (Arora et al. 2024, arXiv 2312.04927): a sequence tells pairs of a key and a value, and
later asks for the value of every key. With a window of 16, and of 32 as well, two layers reach 62 tokens back and every
value stands at least 63 before the place that asks for it, so that no training could make those windows answer: what a
linear layer gets right comes out of its memory. There are no sink tokens, since the pairs stand first.

    python examples/recall.py            # three minutes of one core, which does nothing else
    python examples/recall.py --short    # half a minute: shorter sequences, eager backend, fewer rows

Expect 1.00 of the original; of both windows, and of linear attention before it is trained, less than the eighth that
guessing among the told values would get; and of trained linear attention nearly all, from a state that takes the bytes
of a window of 32 and stays as large however long the sequence gets. ``--features 8`` shows it with too small a memory.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import memc
from memc.evaluate import run_tasks
from memc.evaluate.tasks import Task, Words, parse_tasks
from memc.recipe import Recipe, Train

WIDTH, HEADS, LAYERS = 64, 2, 2
TEST, TRANSFER, TRAINING = 0, 1, 2  # seeds, the last of the first step


@dataclass(frozen=True)
class Setting:
    """What is recalled and by how much: sequences of ``length`` tokens, a window of ``window``, ``features`` a head."""

    vocab: int = 64
    pairs: int = 8
    gap: int = 64
    length: int = 128
    window: int = 16
    features: int = 32
    steps: int = 600
    tokens: int = 200_000
    asked: int = 200
    backend: str = "onnx"
    short: bool = False

    @property
    def task(self) -> Task:
        """What ``memc eval --task`` would ask: every answer stands ``gap`` tokens or more after the value."""
        return parse_tasks(f"mqar:pairs={self.pairs},gap={self.gap},vocab={self.vocab}")[0]

    def draw(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids ``[count,length]`` and where the answers stand."""
        samples = self.task.samples(Words(self.vocab), self.length, count, seed)
        answers = np.zeros((count, self.length), bool)
        for row, sample in enumerate(samples):
            answers[row, [question.start for question in sample.questions]] = True
        return np.stack([sample.ids for sample in samples]), answers


SHORT = Setting(16, 4, 32, 48, 8, 16, steps=150, tokens=16_000, asked=50, backend="eager", short=True)


def turn(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate ``[B,H,T,D]`` by its positions ``[B,T]``."""
    half = x.shape[-1] // 2
    angles = positions[:, None, :, None] * 1000.0 ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


class Block(nn.Module):
    """Causal attention with rotary positions, and a feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        normed = self.norm1(x)
        q, k, v = (f(normed).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(turn(q, positions), turn(k, positions), v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    """A decoder of two blocks."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, vocab, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.2)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x, positions)
        return self.head(self.norm(x))


def train(setting: Setting) -> Model:
    """Train on the answers, and a little on the rest, so that what the original says elsewhere means something."""
    torch.manual_seed(0)
    model, batch = Model(setting.vocab), 32
    made = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.95), weight_decay=0.0)
    rates = torch.optim.lr_scheduler.OneCycleLR(made, 3e-3, setting.steps, pct_start=0.1, cycle_momentum=False)
    positions = torch.arange(setting.length).expand(batch, -1)
    for step in range(setting.steps):
        ids, answers = map(torch.from_numpy, setting.draw(batch, TRAINING + step))
        logits = model(ids, positions)[:, :-1]
        losses = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        loss = losses[answers[:, 1:]].mean() + 0.1 * losses.mean()
        made.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        made.step()
        rates.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} of {setting.steps}: loss {loss.detach():.3f}", file=sys.stderr)
    return model.eval()


@dataclass(frozen=True)
class Row:
    """What one variant recalls, what its state takes for one sequence of the setting's length, and its pass."""

    name: str
    recall: float
    state_bytes: int
    spec: str


def measure(
    name: str, setting: Setting, program: memc.Program, folder: Path, *passes: str, data: Sequence[str] = ()
) -> Row:
    """Convert, as the command line does, and ask what comes out, token by token. With data the passes are trained."""
    # A model this small can afford to train all of its parameters in recovery; sampling from it gives no recall.
    train = Train(length=setting.length, batch=2, sampled=0.0, adapters=0, adapter_rate=1e-3)
    document = memc.convert(
        program,
        folder / name,
        recipe=Recipe(recipe=1, train=train),
        passes=passes,
        data=data,
        tokens=setting.tokens if data else None,
        backend=setting.backend,
        contexts=(setting.length,),
        threads=1,
    )
    assert document.measured is not None
    session = memc.load(folder / name)
    (cell,) = run_tasks(session, [setting.task], [setting.length], samples=setting.asked, seed=TEST)
    spec = document.passes[0].spec if passes else ""
    row = Row(name, cell.accuracy, document.measured.state_bytes[setting.length], spec)
    print(f"{row.name:32} {row.recall:8.3f} {row.state_bytes:12,d}", flush=True)
    return row


def compare(setting: Setting, folder: Path) -> list[Row]:
    """Train the original, and measure it and everything made of it."""
    model = train(setting)
    example = torch.arange(7).expand(2, 7).contiguous()
    program = memc.capture(model, (example, example))
    # Token ids: this model has no tokenizer. One sequence in twenty is held out.
    ids = str(folder / "ids.npy")
    np.save(ids, setting.draw(setting.tokens // setting.length * 11 // 10, TRANSFER)[0])

    def row(name: str, *passes: str, data: Sequence[str] = ()) -> Row:
        return measure(name, setting, program, folder, *passes, data=data)

    window = f"window:window={setting.window},sinks=0"
    linear = f"linearize:window={setting.window},sinks=0,feature_size={setting.features}"
    print(f"{setting.task.spec}, {setting.length} tokens\n{'':32} {'recall':>8} {'state, bytes':>12}")
    rows = [
        original := row("original"),
        row(f"window of {setting.window}", window),
        row("linear, untrained", f"{linear},keep=none"),
        trained := row("linear, trained", f"{linear},keep=none", data=[ids]),
    ]
    equal = trained.state_bytes * setting.length // original.state_bytes
    rows.append(row(f"window of {equal}, the same bytes", f"window:window={equal},sinks=0"))
    if not setting.short:
        rows.append(row("linear, trained, 1 of 2 kept", f"{linear},keep=auto:50%", data=[ids]))
        kept = rows[-1].spec.partition("keep=")[2]
        rows.append(row(f"window of {setting.window}, layer {kept} kept", f"{window},keep={kept}"))
    return rows


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="something smaller, in seconds")
    parser.add_argument("--features", type=int, metavar="N", help="features of a head: the size of the memory")
    given = parser.parse_args(arguments)
    setting = SHORT if given.short else Setting()
    if given.features is not None:
        setting = replace(setting, features=given.features)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return compare(setting, Path(folder))


if __name__ == "__main__":
    main()
