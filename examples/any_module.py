"""Convert a model that no library knows: capture it, look at what was found, linearize it, and stream through it."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import memc

VOCAB, WIDTH, HEADS, WINDOW = 50, 32, 4, 8


class Block(nn.Module):
    """Attention and feed-forward as one would write them by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (t.view(batch, length, HEADS, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    """A decoder with learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(64, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.head(self.blocks(self.tokens(tokens) + self.places(positions)))


def main() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, VOCAB, (2, 7))
    program = memc.capture(Model().eval(), (tokens, torch.arange(7).expand(2, 7).contiguous()))

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        document = memc.convert(program, out, passes=[f"linearize:window={WINDOW},sinks=2"])
        for result in document.passes:
            print(f"{result.spec}: {result.sites} layers, verified: {document.verified}")

        session = memc.load(out)
        ids = torch.randint(0, VOCAB, (30,)).tolist()
        whole = session.logits([ids])[0, -1]

        state = session.new_state()
        session.prefill([ids[:11]], state)
        for token in ids[11:]:
            last = session.step([token], state)
        print(f"30 tokens, at once or one by one: logits differ by {abs(whole - last[0]).max():.1e}")


if __name__ == "__main__":
    main()
