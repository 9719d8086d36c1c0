"""The ``window`` pass: softmax attention over the last tokens and the first few, with a state of constant size."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch.fx import Node

from memc import sites
from memc.blocks import AttentionBlock, SlidingWindow
from memc.dialect import arguments
from memc.head_split import HeadSplit, attend_kept, attend_window, join_heads, split_states
from memc.pipeline import Pass, PassReport, Plan, option
from memc.program import Program
from memc.relation import Bounded, Close, Relation
from memc.rewrite import Editor, result_of, window_states
from memc.target import Target


@dataclass(frozen=True)
class Window(Pass):
    """Let every token read the last ``window`` tokens and the first ``sinks`` (StreamingLLM, Xiao et al. 2024).

    Training-free. Each site's ``memc::attention`` becomes ``memc::window_memory``, whose state holds ``window + sinks``
    tokens. Soft-cap, ALiBi slopes and sink logits stay. A layer that never read past w tokens takes
    ``min(window, w)``; when that is w it takes no sink tokens, since it never read them, and stays the same function.

    Identity setting: ``window`` at least as long as the context. Prompts of at most ``window`` tokens give the original
    logits by construction; beyond, the perplexity ratio is measured and nothing is promised.

    Does not handle:

    - ``encoder``: models that are no decoders.
    - ``cross_attention``: keys and values of another sequence.
    - ``bidirectional``: tokens that read later ones.
    - ``chunked``, ``prefix``, ``mask``: chunked, prefix and unknown masks.
    - ``relative_bias``, ``bias``: learned or unknown biases on the scores (ALiBi is handled).
    - ``shared_kv``: keys and values that another layer reads too.
    - ``not_streamable``: blocks that cannot run on a sequence in pieces.
    - ``kept``: layers that the option ``keep`` names.
    """

    name: ClassVar[str] = "window"

    window: int = option(256, "most recent tokens that a token reads, itself included", unit="tokens", min=1)
    sinks: int = option(4, "first tokens of the sequence that every token reads", unit="tokens", min=0)
    keep: str = option("none", sites.KEEP_HELP)

    def __post_init__(self) -> None:
        """Check every option."""
        super().__post_init__()
        sites.check_keep(self.name, self.keep)

    def offers(self) -> tuple[Window, ...]:
        """Offer windows a factor of four apart."""
        return tuple(replace(self, window=window) for window in (64, 256, 1024))

    def only(self, layers: Collection[int], present: Collection[int]) -> Window:
        """Return the pass keeping every other layer."""
        return replace(self, keep=sites.all_but(layers, present))

    def plan(self, program: Program, target: Target) -> Plan:
        """Choose every causal attention block that ``keep`` does not name."""
        blocks = sites.attention_blocks(program)
        chosen, rejections = sites.choose_sites(
            blocks, self.keep, lambda block: sites.refuse_constant_state(program, block)
        )
        planned = {(site.layer, site.path) for site in chosen}
        relations: tuple[Relation, ...] = (Close(1e-4),)
        if not all(self._is_exact(block) for block in blocks if (block.layer, block.path) in planned):
            relations = (Close(1e-4, tokens=self.window), Bounded("perplexity_ratio", None))
        return Plan(self.spec, chosen, rejections, relations)

    def apply(self, program: Program, plan: Plan) -> tuple[Program, PassReport]:
        """Rewrite the plan's sites."""
        editor = Editor(program)
        blocks = sites.planned_blocks(editor.program, plan)
        facts = [self._rewrite(editor, block, split) for block, split in blocks]
        details = sites.by_layer((block for block, _ in blocks), facts)
        report = PassReport(plan.spec, plan.sites, plan.rejections, plan.relations, details=details)
        return editor.finish(), report

    def _is_exact(self, block: AttentionBlock) -> bool:
        return isinstance(block.mask, SlidingWindow) and block.mask.size <= self.window

    def _rewrite(self, editor: Editor, block: AttentionBlock, split: HeadSplit) -> dict[str, Any]:
        window, sinks = self.window, self.sinks
        if isinstance(block.mask, SlidingWindow) and block.mask.size <= window:
            window, sinks = block.mask.size, 0
        node = block.attention
        inputs, kept = {name: value for name, value in arguments(node).items() if isinstance(value, Node)}, None
        if split.kept:
            states, specs = split_states(editor, node, len(split.kept), window + sinks)
            kept = attend_kept(editor, block, split)
            inputs.update(states)
        else:
            specs = window_states(editor, node, window + sinks)

        output = attend_window(editor, block, split, inputs, window, sinks)
        old = result_of(node, 0)
        assert old is not None
        old.replace_all_uses_with(output if kept is None else join_heads(editor, block, split, kept, output))
        return {"window": window, "sinks": sinks, "state_bytes": sum(spec.bytes(0) for spec in specs)}
