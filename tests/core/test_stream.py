"""Calibration sequences run piece by piece: the values of one run, and little held in between."""

from __future__ import annotations

import pytest
import torch

from memc.analysis.stream import Stream
from memc.pipeline import Calibration
from memc.raising import find_blocks
from memc.raising.feed_forward import linear_input
from tests.passes.tiny_program import tiny, tokens_of
from tests.train.tiny_training import values_of


def test_pieces_give_the_values_of_one_run() -> None:
    program = tiny(layers=3)
    tokens = tokens_of(4, 11)
    positions = torch.arange(11).repeat(4, 1)
    positions[1, 6:] = torch.arange(5)  # two documents in a row
    stream = Stream(program, Calibration(tokens, positions, "here"))
    whole = values_of(program, tokens, positions)
    downs = [block.down for block in find_blocks(program) if block.kind == "feed_forward"]
    for down in downs:
        assert down is not None
        watched = linear_input(down)
        rows = [seen[watched] for seen in stream.advance(down, [watched])]
        torch.testing.assert_close(torch.cat(rows), whole[watched.name], atol=1e-5, rtol=0)


def test_only_what_is_still_read_is_held() -> None:
    program = tiny(layers=3)
    stream = Stream(program, Calibration(tokens_of(2, 11), torch.arange(11).repeat(2, 1), "here"))
    sizes = []
    for down in [block.down for block in find_blocks(program) if block.kind == "feed_forward"]:
        assert down is not None
        list(stream.advance(down, []))
        held = stream._held[0]
        sizes.append(sum(v.numel() for n, v in held.items() if isinstance(v, torch.Tensor) and n.op != "placeholder"))
    assert sizes == [2 * 11 * 24] * 3, "the residual stream and the block's output, and no layer's next states"


def test_a_node_is_replaced_for_what_is_still_to_come() -> None:
    program = tiny()
    calibration = Calibration(tokens_of(2, 9), torch.arange(9).expand(2, 9).contiguous(), "here")
    order = list(program.module.graph.nodes)
    node = next(n for n in order if n.target == torch.ops.aten.linear.default)
    (source, *_) = node.all_input_nodes
    stream = Stream(program, calibration)
    before = [seen[source] for seen in stream.advance(source, [source])]
    stream.replace(node, source, lambda x: x.new_ones(*x.shape[:-1], 3))
    again = list(stream.advance(node, [node, source]))
    assert all(torch.equal(seen[source], x) for seen, x in zip(again, before, strict=True)), "held from before"
    assert all(torch.equal(seen[node], torch.ones(1, 9, 3)) for seen in again)
    with pytest.raises(AssertionError):
        stream.replace(node, source, torch.clone)
