"""The ``sparsify`` pass: softmax attention that keeps every key and reads the few that matter to each token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from memc import sites
from memc.blocks import Alibi, AttentionBlock, Chunked, SlidingWindow
from memc.dialect import arguments, op_spec
from memc.dialect.sparse_attention import METHODS, forced_pages
from memc.errors import MemcError
from memc.pipeline import Pass, PassReport, Plan, option
from memc.program import Program, StateSpec
from memc.relation import Bounded, Close, Relation
from memc.rewrite import Editor, result_of
from memc.target import Target


@dataclass(frozen=True)
class Sparsify(Pass):
    """Let every token read at most ``budget`` earlier tokens, chosen anew for each token and key-value head.

    Training-free, and nothing is forgotten: all keys and values stay in the growing state. Each site's
    ``memc::attention`` becomes ``memc::sparse_attention``. Keys are described page by page: by the bounds of each
    channel (``method=bounds``; Quest, Tang et al. 2024) or by its mean and variance (``method=moments``). A token takes
    the pages that score highest, the first ``sinks`` tokens and the last ``window`` always among them. With ``rerank``
    n over 1 it takes n budgets' worth of pages, ranks their tokens by their own keys and reads the values of the best.
    Soft-cap and sink logits stay; what is done to queries and keys before the attention (QK-norm, rotary) is as it was.

    What is read for a token at context N, in keys or values of one head: 2 N / ``page`` of descriptions,
    ``rerank`` ``budget`` keys, ``budget`` values, in place of 2 N. Below ``dense_below`` tokens everything is read,
    which is faster there.

    Identity setting: ``budget`` or ``dense_below`` at least as long as the context. Prompts of at most the longer of
    the two give the original logits by construction; beyond, the perplexity ratio is measured and nothing is promised.

    Does not handle:

    - ``encoder``: models that are no decoders.
    - ``cross_attention``: keys and values of another sequence.
    - ``bidirectional``: tokens that read later ones.
    - ``sliding_window``, ``chunked``: layers that read a bounded number of tokens already.
    - ``prefix``, ``mask``: prefix and unknown masks.
    - ``alibi``: ALiBi, since a page has no one distance to score it by.
    - ``relative_bias``, ``bias``: learned or unknown biases on the scores.
    - ``shared_kv``: keys and values that another layer reads too.
    - ``not_streamable``: blocks that cannot run on a sequence in pieces.
    - ``kept``: layers that the option ``keep`` names.
    """

    name: ClassVar[str] = "sparsify"

    method: str = option("bounds", "what a page is described and scored by", choices=METHODS)
    budget: int = option(512, "most tokens that a token reads, sinks and window among them", unit="tokens", min=1)
    page: int = option(16, "keys that share a description; divides the budget", unit="tokens", min=1)
    sinks: int = option(4, "first tokens of the sequence that every token reads", unit="tokens", min=0)
    window: int = option(48, "most recent tokens that a token reads, itself included", unit="tokens", min=1)
    rerank: int = option(2, "budgets' worth of pages whose tokens are ranked one by one; 1 for none", unit="", min=1)
    dense_below: int = option(1024, "position from which on the choice is made", unit="tokens", min=0)
    keep: str = option("none", sites.KEEP_HELP)

    def __post_init__(self) -> None:
        """Check every option, and those that go together."""
        super().__post_init__()
        sites.check_keep(self.name, self.keep)
        where = f"{self.name}:budget={self.budget},page={self.page},sinks={self.sinks},window={self.window}"
        least = forced_pages(self.page, self.sinks, self.window) * self.page
        if self.budget % self.page:
            more = max(least, -(-self.budget // self.page) * self.page)
            message = f"a budget of {self.budget} is not whole pages of {self.page}"
            raise MemcError("E203", message, where, f"write {self.name}:budget={more}")
        if self.budget < least:
            message = f"the pages of {self.sinks} sinks and a window of {self.window} may hold {least} tokens"
            raise MemcError("E203", f"{message}, the budget {self.budget}", where, f"write {self.name}:budget={least}")

    @property
    def exact_to(self) -> int:
        """Tokens of a sequence up to which everything is read."""
        return max(self.budget, self.dense_below)

    def plan(self, program: Program, target: Target) -> Plan:
        """Choose every causal attention block that ``keep`` does not name."""
        blocks = sites.attention_blocks(program)
        chosen, rejections = sites.choose_sites(blocks, self.keep, lambda block: _refuse(program, block))
        relations: tuple[Relation, ...] = (Close(1e-4, tokens=self.exact_to), Bounded("perplexity_ratio", None))
        return Plan(self.spec, chosen, rejections, relations)

    def apply(self, program: Program, plan: Plan) -> tuple[Program, PassReport]:
        """Rewrite the plan's sites."""
        editor = Editor(program)
        blocks = sites.planned_blocks(editor.program, plan)
        details = {str(block.layer): self._rewrite(editor, block) for block, _ in blocks}
        report = PassReport(plan.spec, plan.sites, plan.rejections, plan.relations, details=details)
        return editor.finish(), report

    def _rewrite(self, editor: Editor, block: AttentionBlock) -> dict[str, Any]:
        node, row = block.attention, op_spec(torch.ops.memc.sparse_attention.default)
        assert row is not None
        bound = arguments(node)
        inputs = {name: value for name, value in bound.items() if isinstance(value, Node)}
        held = editor.states_of(node)["past_key"]
        shape = ("B", block.num_kv_heads, f"S/{self.page}", 2 * int(held.shape[3]))
        pages = StateSpec(held.name.replace("_key", "_pages"), held.dtype, shape, grows=2)
        inputs["past_pages"] = editor.add_state(pages, inputs["past_positions"])
        options = {name: getattr(self, name) for name in ("method", "page", "budget", "sinks", "window", "rerank")}
        options |= {"dense_below": self.exact_to, "scale": bound["scale"], "softcap": bound["softcap"]}

        def layer(t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            results = torch.ops.memc.sparse_attention.default(*(t.get(name) for name in _TENSORS), **options)
            return (results[0], *(results[index] for index in row.states.values()))

        output, *after = editor.insert(layer, inputs, node, block.path, tuple(options.items()))
        old = result_of(node, 0)
        assert old is not None
        old.replace_all_uses_with(output)
        for name, value in zip(row.states, after, strict=True):
            editor.set_next(inputs[name], value)
        return {"budget": self.budget, "page": self.page, "page_bytes_per_token": pages.bytes(self.page) / self.page}


def _refuse(program: Program, block: AttentionBlock) -> sites.Refusal | None:
    match block.mask:
        case SlidingWindow(size):
            return "sliding_window", f"the layer never reads past {size} tokens; the pass 'window' bounds its state"
        case Chunked(size):
            return "chunked", f"tokens read only their own chunk of {size}"
        case _:
            pass
    refusal = sites.refuse_constant_state(program, block)
    if refusal is None and isinstance(block.bias, Alibi):
        return "alibi", "ALiBi weighs tokens by their distance, and a page has no one distance to score it by"
    return refusal


_TENSORS = (
    "query",
    "key",
    "value",
    "positions",
    "past_key",
    "past_value",
    "past_positions",
    "past_pages",
    "sink_logits",
)
