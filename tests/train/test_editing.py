"""Edits by a side copy: what was edited follows, what is unrelated keeps every bit, and faults of both are seen."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from memc.errors import MemcError
from memc.passes.memory_bank import MemoryBank
from memc.program import Program, get_tensor, set_tensor
from memc.progress import Silent
from memc.train.editing import Edit, Edited, EditSettings, SideEditor, edit_program, follows
from memc.verify import split_invariance
from tests.core.test_families import raised
from tests.passes.tiny_program import TARGET, tiny, tokens_of
from tests.train.tiny_training import changed, tensors_of

EDITS = (Edit((5, 6, 7), (11,)), Edit((9, 3, 3, 8), (12, 20)), Edit((30, 2), (4, 4, 31)))
SETTINGS = EditSettings(steps=120, rate=2e-2)


def with_side(program: Program) -> Program:
    pass_ = MemoryBank(kind="side")
    return pass_.apply(program, pass_.plan(program, TARGET))[0]


def unrelated() -> Tensor:
    return tokens_of(6, 9, seed=4)


@cache
def edited() -> Edited:
    return edit_program(with_side(tiny()), EDITS, unrelated(), Silent(), SETTINGS)


def test_every_edit_follows_and_none_did_before() -> None:
    assert not any(follows(tiny(), edit) for edit in EDITS)
    assert all(follows(edited().program, edit) for edit in EDITS)
    assert edited().clear and all(0 < steps <= 120 for steps in edited().steps)


def test_an_edit_of_several_wordings_follows_each_of_them() -> None:
    edit = replace(EDITS[0], others=((8, 1), (2, 29, 30, 31)))
    done = edit_program(with_side(tiny()), [edit, EDITS[1]], unrelated(), Silent(), SETTINGS)
    assert all(follows(done.program, Edit(prompt, edit.target)) for prompt in edit.prompts)
    assert follows(done.program, edit) and follows(done.program, EDITS[1])
    alone = edit_program(with_side(tiny()), EDITS[:2], unrelated(), Silent(), SETTINGS)
    assert not follows(alone.program, edit)


def test_more_edits_than_are_replayed_are_learned_together() -> None:
    """All of them are told from what is unrelated; not every one is followed by so small a model."""
    edits = [*EDITS, Edit((17, 21), (2,)), Edit((26, 5, 9), (7,))]
    said: list[str] = []
    editor = SideEditor(with_side(tiny()), unrelated(), replace(SETTINGS, steps=100))
    editor.learn_together(edits, lambda _, text: said.append(text))
    done = editor.finish()
    assert done.clear and len(done.differences) == len(edits)
    assert sum(follows(done.program, edit) for edit in edits) >= 3
    assert set(done.steps) == {len(said)} and said[-1].endswith("parts learned")
    assert torch.equal(done.program.run(unrelated()), tiny().run(unrelated()))
    once = edit_program(with_side(tiny()), edits, unrelated(), Silent(), replace(SETTINGS, steps=1))
    assert set(once.steps) == {1} and not any(follows(once.program, edit) for edit in edits)


def test_what_is_unrelated_keeps_every_bit() -> None:
    assert torch.equal(edited().program.run(unrelated()), tiny().run(unrelated()))


def test_nothing_but_the_copy_changes() -> None:
    before = with_side(tiny())
    first = tensors_of(before)
    done = edit_program(before, EDITS[:1], unrelated(), Silent(), EditSettings(steps=3))
    assert not changed(first, tensors_of(before))
    names = {name for name in first if name.startswith("memc.memory_bank.")}
    assert changed(first, tensors_of(done.program)) == names and len(names) == 2


def test_a_sequence_that_goes_on_stays_routed() -> None:
    """An edit's prompt in pieces gives what it gives whole, beside one that is not routed."""
    tokens = torch.stack([torch.tensor([*EDITS[1].prompt, *EDITS[1].target, 7, 7, 7]), unrelated()[0]])
    assert split_invariance(edited().program, tokens).passed
    before, after = tiny().run(tokens), edited().program.run(tokens)
    assert torch.equal(before[1], after[1]) and not torch.equal(before[0, 3:], after[0, 3:])


def test_a_threshold_that_is_too_low_or_too_high_shows() -> None:
    name = next(n for n, _ in edited().program.module.named_parameters() if n.endswith("threshold"))
    for value in (0.0, 1e6):
        program = edited().program.copy()
        assert get_tensor(program.module, name).item() > 0
        broken = with_side(tiny())
        for other, tensor in program.module.named_parameters():
            if other.startswith("memc."):
                set_tensor(broken.module, other, torch.tensor([value]) if other == name else tensor)
        same = torch.equal(broken.run(unrelated()), tiny().run(unrelated()))
        assert same == (value > 0) and all(follows(broken, edit) for edit in EDITS) == (value == 0)


def test_the_threshold_leaves_the_share_that_is_asked_for() -> None:
    """Of sequences that taught nothing, every fifth; that of all of them is above what any token has."""
    many = tokens_of(40, 9, seed=4)
    editor = SideEditor(with_side(tiny()), many, EditSettings(steps=3, rate=2e-2))
    editor.learn(EDITS[0])
    before, found = tiny().run(many), []
    for keep in (0.25, 0.5, 1.0):
        done = editor.finish(keep)
        same = (done.program.run(many) == before).flatten(1).all(1)
        assert same[4::5].float().mean() >= keep and done.unrelated == editor.finish().unrelated
        found.append(done.threshold)
    assert found[0] < found[1] < found[2] and done.unrelated < found[2] and same.all()


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_families_of_other_shapes_are_edited(family: str) -> None:
    """A projection stored the other way round, and a block that sees flattened tokens.

    The logits of these untrained models are all small: the target gets likelier, if not the likeliest.
    """
    program, edit = raised(family)[0].program, EDITS[0]
    done = edit_program(with_side(program), [edit], unrelated(), Silent(), EditSettings(steps=40, rate=2e-2))
    likely = [each.run(torch.tensor([edit.prompt]))[0, -1].softmax(-1)[edit.target[0]] for each in
              (program, done.program)]  # fmt: skip
    assert done.clear and likely[1] > 1.1 * likely[0]
    assert torch.equal(done.program.run(unrelated()), program.run(unrelated()))


def test_what_cannot_be_edited_is_refused() -> None:
    with pytest.raises(MemcError) as caught:
        SideEditor(tiny(), unrelated(), SETTINGS)
    assert caught.value.code == "E208"
    editor = SideEditor(with_side(tiny()), unrelated(), SETTINGS)
    for edit in (Edit((), (3,)), Edit((3,), ()), Edit((3,), (4,), ((),))):
        with pytest.raises(MemcError) as caught:
            editor.learn(edit)
        assert caught.value.code == "E205"
