"""A backend in memory for the tests of the runtime: two tiny models in numpy, and an artifact's folder around them."""

import json
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from memc.artifact import Manifest, Port, State, seal
from memc.backend import Backend, Runner, RunState
from memc.runtime import Session

VOCAB = 400
WIDTH = 8
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "naïve café, 東京 and 😀 emoji",
    "a dog and a fox and the end.",
]


class FakeState(RunState):
    def __init__(self, batch, hidden, tokens, positions):
        self.batch, self.hidden, self.tokens, self.positions = batch, hidden, tokens, positions

    def copy(self):
        return self.select(list(range(self.batch)))

    def select(self, rows):
        return FakeState(len(rows), self.hidden[rows], self.tokens[rows], self.positions[rows])

    def arrays(self):
        return {"hidden": self.hidden, "tokens": self.tokens, "positions": self.positions}

    @property
    def bytes(self):
        return sum(array.nbytes for array in self.arrays().values())


class FakeRunner(Runner):
    """``grows`` False: a recurrent model; True: one that sums over all tokens held. Each row and token on its own."""

    def __init__(self, manifest, grows=False, seed=0, poison=None):
        self.manifest, self.grows, self.poison = manifest, grows, poison
        self.calls = []
        rng = np.random.default_rng(seed)
        self.embed = rng.normal(size=(VOCAB, WIDTH))
        self.mix = rng.normal(size=(WIDTH, WIDTH)) / 3
        self.head = rng.normal(size=(VOCAB, WIDTH)) * 2

    def new_state(self, batch, capacity=None):
        empty = np.zeros((batch, 0), np.int64)
        return FakeState(batch, np.zeros((batch, WIDTH)), empty, empty.copy())

    def restore(self, arrays, capacity=None):
        return FakeState(len(arrays["hidden"]), arrays["hidden"], arrays["tokens"], arrays["positions"])

    def run(self, tokens, positions, state, keep=None, fetched=None):
        assert tokens.dtype == positions.dtype == np.int64 and tokens.shape == positions.shape
        keep = np.arange(tokens.shape[1]) if keep is None else keep
        self.calls.append((tokens.shape[1], len(keep)))
        if self.grows:
            state.tokens = np.concatenate([state.tokens, tokens], 1)
            state.positions = np.concatenate([state.positions, positions], 1)
        out = np.full((*tokens.shape, VOCAB), 7.0, np.float32)
        for row in range(tokens.shape[0]):
            for column, (token, position) in enumerate(zip(tokens[row], positions[row], strict=True)):
                if position >= 0:
                    out[row, column] = self.head @ self._hidden(state, row, token, position)
                if token == self.poison and position >= 0:
                    out[row, column, 3] = np.nan
        return out[:, keep]

    def _hidden(self, state, row, token, position):
        if self.grows:
            seen = (state.positions[row] >= 0) & (state.positions[row] <= position)
            held, at = state.tokens[row][seen], state.positions[row][seen]
            return np.tanh((np.exp(-0.3 * (position - at))[:, None] * self.embed[held]).sum(0))
        before = state.hidden[row] if position > 0 else np.zeros(WIDTH)
        state.hidden[row] = np.tanh(self.mix @ before + self.embed[token] + np.sin(position))
        return state.hidden[row]


class FakeBackend(Backend):
    name, weights = "fake", ("fp32",)

    def supports(self, node, target):
        raise AssertionError

    def refuses_weights(self, weights, target):
        raise AssertionError

    def lower(self, program, target, folder, options):
        raise AssertionError

    def load(self, folder, manifest, threads=None):
        return FakeRunner(manifest)


def byte_tokenizer():
    """Byte-level BPE, as GPT-2, Llama 3 and SmolLM have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS * 3,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<s>", "</s>", "<|user|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def metaspace_tokenizer():
    """Words that start with a mark for the space, bytes as a fallback, a leading space dropped, as Llama 2 has."""
    words = ["<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz.,"]
    merges = [("▁", "a"), ("t", "h"), ("th", "e"), ("▁", "the")]
    vocab = {word: n for n, word in enumerate([*words, *("".join(merge) for merge in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return tokenizer


def make_manifest(**changes):
    states = [State(input="hidden", output="hidden.next", dtype="float64", shape=["B", WIDTH])]
    return Manifest(
        **{
            "schema": "memc.artifact/1",
            "version": "0",
            "source": "fake",
            "source_digest": "0",
            "family": "fake",
            "target": "cpu",
            "backend": "fake",
            "weights": "fp32",
            "lowered": "lowered/fake/model.bin",
            "inputs": [Port(name="tokens", role="tokens", dtype="int64", shape=["B", "T"])],
            "outputs": [Port(name="logits", role="logits", dtype="float32", shape=["B", "K", VOCAB])],
            "states": states,
            "vocab_size": VOCAB,
            **changes,
        }
    )


def make_artifact(folder: Path, tokenizer=None, files=None, **changes) -> Path:
    """Write an artifact; ``files`` are JSON documents, or texts, by name."""
    (folder / "lowered/fake").mkdir(parents=True)
    (folder / "lowered/fake/model.bin").write_bytes(b"weights")
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in (files or {}).items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    seal(folder, make_manifest(**changes))
    return folder


def make_session(folder: Path, *, grows=False, chunk=256, poison=None, seed=0, **artifact) -> Session:
    if grows:
        grown = State(input="tokens", output="tokens.next", dtype="int64", shape=["B", "S"], grows=1)
        artifact = {"states": [grown], **artifact}
    manifest = make_manifest(**{k: v for k, v in artifact.items() if k not in ("tokenizer", "files")})
    if not folder.is_dir() or not any(folder.iterdir()):
        make_artifact(folder, **artifact)
    return Session(folder, manifest, FakeRunner(manifest, grows, seed, poison), chunk=chunk)
