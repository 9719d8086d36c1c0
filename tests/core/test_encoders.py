"""Encoders and encoder-decoders become artifacts, run by name or by token ids, and refuse what they cannot do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from memc import api, load
from memc.artifact import read_manifest
from memc.backend import LowerOptions
from memc.backends.eager import EagerBackend
from memc.cli import main
from memc.conversion.lowering import lower, verify_lowered
from memc.errors import MemcError
from memc.frontend import capture
from memc.program import Program
from memc.raising import raise_program
from memc.recipe import Recipe
from memc.runtime import Session
from memc.target import get_target
from memc.verify import inputs_of, sample_text, token_limit, whole
from tests.families import FFN, HEADS, HIDDEN, POSITIONS, VOCAB, raw_program

DENSE = Recipe(recipe=1)


def refused(code: str, call: object, *args: object, **kwargs: object) -> str:
    with pytest.raises(MemcError) as caught:
        call(*args, **kwargs)  # type: ignore[operator]
    assert caught.value.code == code, caught.value
    return str(caught.value)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bert") / "out"
    document = api.convert(raw_program("bert")[0], out, recipe=DENSE, backend="eager", seed=3)
    assert document.verified
    return out


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Session:
    out = tmp_path_factory.mktemp("t5") / "out"
    api.convert(raw_program("t5")[0], out, recipe=DENSE, backend="eager")
    return load(out)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Session:
    out = tmp_path_factory.mktemp("vit") / "out"
    api.convert(raw_program("vit")[0], out, recipe=DENSE)
    return load(out)


def test_rows_of_any_lengths_equal_one_at_a_time(bert: Path) -> None:
    session = load(bert)
    rows = [[5, 6, 7], [8], [9, 3, 4], [*range(3, 20)]]
    together = session.logits(rows)
    assert together.shape == (4, 17, HIDDEN)
    for row, found in zip(rows, together, strict=True):
        np.testing.assert_allclose(found[: len(row)], session.logits(row)[0], atol=1e-5)
        assert not found[len(row) :].any()
    assert [piece.shape for _, piece in session.logit_chunks(rows, chunk=2)] == [together.shape]


def test_a_table_of_positions_limits_the_length(bert: Path) -> None:
    session = load(bert)
    assert session.capacity == POSITIONS
    assert session.logits(np.full((2, POSITIONS), 5)).shape == (2, POSITIONS, HIDDEN)
    refused("E206", session.logits, np.full((2, POSITIONS + 1), 5))
    refused("E206", session.logits, tokens=np.full((2, POSITIONS + 1), 5))


def test_inputs_are_taken_by_name_and_checked(t5: Session, vit: Session) -> None:
    tokens, targets = np.arange(6).reshape(2, 3), np.arange(8).reshape(2, 4)
    by_name = t5.logits(tokens=tokens, decoder_tokens=targets)
    np.testing.assert_array_equal(t5.logits(tokens, decoder_tokens=targets.tolist()), by_name)
    assert by_name.shape == (2, 4, VOCAB)
    assert "decoder_tokens" in refused("E208", t5.logits, tokens)
    assert "tokens" in refused("E208", t5.logits, decoder_tokens=targets)
    assert "decoder_tokens" in refused("E200", t5.logits, tokens, pixels=targets)
    assert "int64" in refused("E200", t5.logits, tokens, decoder_tokens=targets * 0.5)
    assert "B = 2" in refused("E200", t5.logits, tokens, decoder_tokens=targets[:1])
    assert "equally long" in refused("E200", t5.logits, [[1], [2, 3]], decoder_tokens=targets)
    for far in (VOCAB, -VOCAB):
        refused("E200", t5.logits, tokens, decoder_tokens=targets + far)
    assert "pixel_values" in refused("E208", vit.logits, tokens)
    pixels = np.random.default_rng(0).normal(size=(3, 3, 20, 20))  # float64: narrowed to what the model takes
    assert vit.logits(pixel_values=pixels).shape == (3, 26, HIDDEN)
    assert "[3, 20, 3]" in refused("E200", vit.logits, pixel_values=pixels[:, :, :, :3][0])


def test_values_out_of_range_are_refused_by_the_runtime_too(bert: Path, tmp_path: Path) -> None:
    api.convert(raw_program("torch_encoder")[0], tmp_path / "out", recipe=DENSE)
    refused("E200", load(tmp_path / "out").logits, tokens=np.array([[VOCAB]]))
    refused("E200", load(bert).logits, tokens=np.array([[VOCAB]]))


@pytest.mark.parametrize("command", [["generate", "--prompt", "hi"], ["eval", "--text", "README.md"], ["bench"]])
def test_what_needs_a_decoder_refuses_by_name(
    bert: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([command[0], str(bert), *command[1:], "--json"])
    error = json.loads(capsys.readouterr().out)
    assert (code, error["code"]) == (2, "E208")
    assert "bert is no decoder" in error["message"]


def test_a_pass_for_causal_attention_ends_with_its_reason(tmp_path: Path) -> None:
    for name in ("bert", "t5"):
        message = refused("E307", api.convert, raw_program(name)[0], tmp_path / name, passes=["window:window=4"])
        assert "x encoder" in message and "--recipe dense" in message and not (tmp_path / name).exists()


def test_the_report_says_how_it_is_fed_and_no_cost_of_decoding(
    bert: Path, vit: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(bert)]) == 0
    said = capsys.readouterr().out
    assert "takes tokens [B, T]" in said and "verified" in said
    assert "ms a token" not in said and "state at" not in said and "memc generate" not in said
    assert main(["report", str(vit.folder)]) == 0
    said = capsys.readouterr().out
    assert "pixel_values [B, 3, 20, 20]" in said and "work for an input" in said
    text = json.loads((bert / "report" / "text.json").read_text())
    assert text["origin"] == "16 sequences of 40 uniformly drawn tokens, seed 3"
    assert max(map(max, text["tokens"])) > HIDDEN  # of the whole vocabulary, not of the width that comes out
    assert json.loads((vit.folder / "report" / "text.json").read_text())["origin"] == "uniformly drawn inputs, seed 0"
    told = read_manifest(vit.folder).how_to_run
    assert "pixel_values [B,3,20,20] float32" in told and "positions" not in told


def test_the_check_of_what_was_lowered_can_fail(tmp_path: Path) -> None:
    program = raise_program(raw_program("t5")[0]).program
    _, manifest = lower(program, EagerBackend(), get_target("cpu"), tmp_path, LowerOptions())
    runner, text = EagerBackend().load(tmp_path, manifest), sample_text(program, 0)
    (check,) = verify_lowered(runner, program, text, "fp32", None)
    assert check.passed
    with torch.no_grad():
        next(p for name, p in runner.program.module.named_parameters() if "decoder" in name).mul_(1.5)  # type: ignore[attr-defined]
    (check,) = verify_lowered(runner, program, text, "fp32", None)
    assert not check.passed


class Masked(nn.Module):
    """An encoder of tokens, token types and a mask of 0 and 1, as BERT takes them, with one vector a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.types = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(2, HIDDEN)
        layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, FFN, dropout=0.0, batch_first=True, norm_first=True)
        self.layer = layer
        self.head = nn.Linear(HIDDEN, 5)

    def forward(self, tokens: Tensor, mask: Tensor, types: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.types(types)
        x = self.layer(x, src_key_padding_mask=mask == 0)
        weights = mask[..., None].to(x.dtype)
        return self.head((x * weights).sum(1) / weights.sum(1).clamp_min(1))


def masked_program() -> tuple[Program, nn.Module]:
    torch.manual_seed(0)
    module = Masked().eval()
    tokens = torch.arange(14).view(2, 7)
    return capture(module, (tokens, torch.ones_like(tokens), tokens % 2), decoder=False), module


@pytest.mark.parametrize("backend", ["eager", "onnx"])
def test_masks_and_token_types_are_inputs_of_their_own(tmp_path: Path, backend: str) -> None:
    program, module = masked_program()
    assert [(spec.name, spec.role) for spec in program.inputs] == [
        ("tokens", "tokens"),
        ("mask", "other"),
        ("types", "other"),
    ]
    document = api.convert(program, tmp_path / "out", recipe=DENSE, backend=backend)
    assert document.verified
    session = load(tmp_path / "out")
    tokens = np.random.default_rng(1).integers(0, VOCAB, (3, 11))
    mask = (np.arange(11) < np.array([[11], [4], [7]])).astype(np.int64)
    types = (np.arange(11) > 3)[None].repeat(3, 0).astype(np.int64)
    with torch.no_grad():
        want = module(*(torch.from_numpy(each) for each in (tokens, mask, types))).numpy()
    np.testing.assert_allclose(session.logits(tokens, mask=mask, types=types), want, atol=1e-5)
    # What is masked is not read.
    other = np.where(mask == 1, tokens, 1)
    np.testing.assert_allclose(session.logits(other, mask=mask, types=types), want, atol=1e-5)


def test_what_is_drawn_fits_the_model_and_depends_on_the_tokens_alone() -> None:
    program = raise_program(masked_program()[0]).program
    assert token_limit(program) == VOCAB
    tokens = torch.arange(40).view(2, 20)
    first, again, other = (inputs_of(program, t) for t in (tokens, tokens.clone(), tokens + 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])
    assert set(first[2].unique().tolist()) == {0, 1}  # two token types
    assert whole(program, tokens).shape == (2, 5)
    undecided = replace(program, model=replace(program.model, vocab_size=50))
    assert token_limit(undecided) == 50


def test_a_folder_is_converted_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=1,
                                 num_attention_heads=HEADS, max_position_embeddings=POSITIONS)).eval()  # fmt: skip
    model.save_pretrained(tmp_path / "bert")
    out = tmp_path / "out"
    assert main(["convert", str(tmp_path / "bert"), "-o", str(out), "--recipe", "dense", "--target", "cpu"]) == 0
    assert "verified" in capsys.readouterr().out
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        want = model(ids).last_hidden_state.numpy()
    np.testing.assert_allclose(load(out).logits(ids.tolist()), want, atol=1e-4)
