"""The ``sparsify`` pass: softmax attention that keeps every key and reads the few that matter to each token."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from torch.fx import Node

from memc import sites
from memc.analysis.decay import decay_facts, farthest, head_decay
from memc.analysis.heads import head_roles
from memc.blocks import Alibi, AttentionBlock, Chunked, SlidingWindow
from memc.dialect import arguments
from memc.dialect.events import REFINEMENTS
from memc.dialect.selectors import SELECTORS
from memc.dialect.sparse_attention import forced_pages
from memc.head_split import HeadSplit, attend_window, join_heads, split_states
from memc.passes.sparsify import checks, events, extend
from memc.passes.sparsify.attention import attend_retrieving
from memc.pipeline import Pass, PassReport, Plan, option
from memc.program import Program
from memc.relation import Bounded, Close, Relation
from memc.rewrite import Editor, result_of, window_states
from memc.target import Target

METHODS = tuple(name for name, selector in SELECTORS.items() if selector.choice != "levels")
"""What ``method`` may be; two levels are an option of ``bounds``."""

EVENT_OPTIONS = ("gamma", "longest", "refine", "contiguity", "calls")
"""Options that only ``method=em`` reads."""


@dataclass(frozen=True)
class Sparsify(Pass):
    """Let every token read at most ``budget`` earlier tokens, chosen anew for each token and key-value head.

    Training-free but for ``landmark``, and nothing is forgotten: all keys and values stay in the growing state. Each
    site's ``memc::attention`` becomes ``memc::sparse_attention``, which takes the first ``sinks`` tokens, the last
    ``window``, and of the others those that score highest:

    - ``method=lowbit``: by the few ``channels`` of every key in which the query is strongest (SparQ, Ribar et al.
      2024), read from a second copy of the keys that is laid out channel by channel; the state has half as much again;
    - ``method=bounds``: page by page, by the bounds of each channel (Quest, Tang et al. 2024);
      with ``levels=2`` the bounds of super-pages, 16 pages each, are ranked first, and the pages of the best of these
      alone, ``beam`` times as many as are taken (hierarchical, as HISA, arXiv 2603.28458, does it for its indexer);
    - ``method=moments``: page by page, by the mean and variance of each channel;
    - ``method=hcam``: page by page, by the mean of each channel (the summaries of HCAM, Lampinen et al. 2021);
    - ``method=hip``: page by page, by the key in the middle, of those pages alone that a search down a tree of ranges
      comes by (HiP attention, Lee et al. 2024): it finds what resembles its neighbours;
    - ``method=em``: as ``lowbit``, but event by event (EM-LLM, Fountas et al. 2024), see below;
    - ``method=landmark``: page by page, by the last key, and read through it (Landmark Attention, Mohtashami & Jaggi
      2023): another function than the original, which is to be trained, see below.

    With ``mass`` under 1 a token takes of these no more than needed for this share of the sum of the exponentials of
    all their scores (top-p, as Twilight, Lin et al. 2025): ``budget`` is then the most, and what is predicted.
    With ``rerank`` n over 1 a token takes n budgets' worth, ranks these tokens by their whole keys and reads the values
    of the best. With ``refresh`` n over 1 it is ``memc::refreshed_attention``: every n-th token chooses for n (the mask
    refresh of HiP, Lee et al. 2024), by its position and not by the call that it comes in; sinks and window are those
    of each token, and the window is at least n, so that it holds what is newer than the choice.

    Two methods read on past the length that the model was trained on. Each site becomes ``memc::compact_attention``,
    which holds keys as they are before rotation, takes whole pages, and rotates what it reads so that no distance is
    longer than the budget allows, whatever the length of the sequence:

    - ``method=longheads``: by the attention of a page's own subject to its keys; tokens that are not read are left out
      of the count of positions (LongHeads, Lu et al. 2024);
    - ``method=infllm``: by the keys of a page that the queries behind it asked for most; distances are true up to
      ``window``, and ``window`` beyond it (InfLLM, Xiao et al. 2024).

    The larger of ``budget`` and ``dense_below`` (``longheads``), or ``window`` (``infllm``), is what has to stay within
    the trained length.

    Soft-cap and sink logits stay; what is done to queries and keys before the attention (QK-norm, and rotary but for
    these two) is as it was.

    ``method=em`` adds ``memc::events`` behind the logits: the past is cut where the model was surprised by more than
    ``gamma`` standard deviations above the mean of the last 256 tokens, or after ``longest`` of them, each cut moved
    back to where it divides the keys of the last rewritten layer best, by ``refine``. All layers take the same events,
    whole ones in the order of their best tokens, and with a share ``contiguity`` of the budget those directly before
    and behind them. What an event is known of late: a token sees the events of those ``longest`` + ``calls`` before it,
    nearer tokens stand for themselves, so that any split into calls of at most ``calls`` tokens gives the same; in
    longer ones the last tokens see fewer events. The paper takes fixed numbers of representatives of an event, layer
    by layer, and moves boundaries in each of them; here the channels of ``lowbit`` score all of its tokens, and one
    cut serves all layers.

    ``method=landmark`` weighs the tokens of the pages of sinks and window, and of each other page taken its landmark,
    by one softmax; the weight of a landmark is spread over the other tokens of its page by a softmax within it. So
    every page weighs what its last token is worth to the query, whatever the page holds, and that token's own value is
    not read from afar. No budget makes that the original attention, and a pretrained model has not learned to end its
    pages with what they are about. The report therefore says ``untrained`` until a conversion with data has trained it:
    there are no new parameters that a transfer could fit layer by layer, so that adapters on the projections of the
    attention recover the original's predictions, from all of the tokens. The paper inserts a token of its own for every
    landmark and trains the whole model, here the last token of a page stands where that would; sinks and window read as
    they were are ours (``sinks=0,window=1`` is the paper's, but that the last token of a page reads itself), since a
    model whose first tokens are its sinks loses them otherwise.

    What is read for a token at context N, in keys or values of one head of size D: ``channels`` / D N (``lowbit``),
    N / ``page`` (``hcam``), at most 2 log2 N keys for each page that is taken (``hip``) or 2 N / ``page`` to choose by
    (``levels=2``: 2 N / (16 ``page``) and 2 ``beam`` ``rerank`` ``budget`` / ``page``),
    ``rerank`` ``budget`` keys, ``budget`` values, in place of 2 N; with ``refresh`` n, an n-th of what is chosen by, on
    average. Below ``dense_below`` tokens everything is read, which is faster there.

    ``retrieve=heads:P%`` does so for the P percent of the key-value heads (each with the query heads that read it)
    whose best query head looks up earlier tokens most by the scores of :mod:`memc.analysis.heads`, fewer where no more
    do at all; ``retrieve=decay:P%`` for the P percent whose attention decays least with the distance, whatever stands
    there (:mod:`memc.analysis.decay`). The others stream (DuoAttention, Xiao et al. 2025; RazorAttention, Tang et al.
    2025):
    ``memc::window_memory`` of ``stream_window`` tokens and the sinks, whose state does not grow. With ``compensation``
    they read as one more token the mean of all between, weighed by their number (RazorAttention;
    :mod:`memc.compensation`).

    ``bits=8`` or ``bits=4`` hold keys and values in so many bits a channel, for which ``method=bounds`` is needed: keys
    rounded channel by channel within their page, by the same bounds that the page is chosen by, values token by token
    (KIVI, Liu et al. 2024). Tokens read their own page as it is. With 4 bits and pages of 64 the state has a sixth of
    float32's bytes, a third of bfloat16's.

    Identity setting: ``budget`` or ``dense_below`` at least as long as the context (``dense_below`` with
    ``landmark``), and ``stream_window`` where heads stream, ``page`` where ``bits`` are given, and ``window`` with
    ``infllm``. Prompts of at most the longer of the
    first two, and no longer than the others, give the original logits by construction; beyond, the perplexity ratio is
    measured and nothing is promised.

    Does not handle:

    - ``encoder``: models that are no decoders.
    - ``cross_attention``: keys and values of another sequence.
    - ``bidirectional``: tokens that read later ones.
    - ``sliding_window``, ``chunked``: layers that read a bounded number of tokens already.
    - ``prefix``, ``mask``: prefix and unknown masks.
    - ``alibi``: ALiBi, since a page has no one distance to score it by.
    - ``relative_bias``, ``bias``: learned or unknown biases on the scores.
    - ``shared_kv``: keys and values that another layer reads too.
    - ``rotary``: heads of which a part is rotated by itself (multi-head latent attention), with ``retrieve=decay``.
    - ``no_rotary``: layers that rotate no queries and keys, by ``longheads`` and ``infllm``.
    - ``value_size``: values of another size than keys, by ``longheads``.
    - ``not_streamable``: blocks that cannot run on a sequence in pieces.
    - ``kept``: layers that the option ``keep`` names.
    """

    name: ClassVar[str] = "sparsify"

    method: str = option("lowbit", "what tokens, or their pages, are ranked by", choices=METHODS)
    channels: int = option(0, "of every key that lowbit and em rank by; 0 for an eighth", unit="channels", min=0)
    budget: int = option(512, "most tokens that a token reads, sinks and window among them", unit="tokens", min=1)
    page: int = option(
        0,
        "keys described together; divides the budget; 0 for 16, or for up to 64 with landmark, lowbit, em, bits,"
        " longheads or infllm",
        unit="tokens",
        min=0,
    )
    levels: int = option(
        1, "of bounds: with 2, super-pages of 16 pages are ranked first, and the pages of the best alone", min=1, max=2
    )
    beam: int = option(0, "pages that two levels look at for each page that they take; 0 for 4", unit="", min=0)
    sinks: int = option(4, "first tokens of the sequence that every token reads", unit="tokens", min=0)
    window: int = option(48, "most recent tokens that a token reads, itself included", unit="tokens", min=1)
    rerank: int = option(
        0,
        "budgets' worth of pages whose tokens are ranked one by one; 1 for none; 0 for 2, or for 1 with landmark, em,"
        " longheads and infllm, which read what they take whole",
        unit="",
        min=0,
    )
    mass: float = option(
        1.0, "share of the estimated attention past which nothing more is chosen; 1 for all of the budget", min=0, max=1
    )
    refresh: int = option(
        1, "tokens in a row for which the first of them chooses; at most the window", unit="tokens", min=1
    )
    gamma: float = option(1.0, "surprise that ends an event of em, above the mean", unit="standard deviations", min=0)
    longest: int = option(64, "most of an event of em", unit="tokens", min=2)
    refine: str = option("modularity", "by what of the likeness of keys em ends events", choices=REFINEMENTS)
    contiguity: float = option(
        0.3, "share of the budget that em gives to the events before and behind those taken", min=0, max=0.9
    )
    calls: int = option(256, "most of a call, up to which em chooses alike however a text is cut", unit="tokens", min=1)
    dense_below: int = option(1024, "position from which on the choice is made", unit="tokens", min=0)
    bits: int = option(0, "of each channel of the keys and values held, 8 or 4; 0 for their own type", unit="bits")
    retrieve: str = option(
        "all",
        "key-value heads that choose among all tokens: all; heads:P%, the P percent whose query heads look up earlier"
        " tokens most; decay:P%, those whose attention decays least with the distance; or heads:[3.0,3.2], by"
        " LAYER.HEAD. The others stream: they hold sinks and window",
    )
    stream_window: int = option(256, "most recent tokens that a head that streams reads", unit="tokens", min=1)
    compensation: bool = option(
        False, "whether a head that streams reads the mean of all tokens between its sinks and window as one more token"
    )
    keep: str = option("none", sites.KEEP_HELP)

    def __post_init__(self) -> None:
        """Check every option, and those that go together."""
        super().__post_init__()
        sites.check_keep(self.name, self.keep)
        checks.check_retrieve(self.retrieve)
        checks.check_compensation(self.retrieve, compensation=self.compensation)
        checks.check_bits(self.bits, self.method)
        own = (f for f in fields(self) if f.name in EVENT_OPTIONS)
        changed = {f.name: value for f in own if (value := getattr(self, f.name)) != f.default}
        checks.check_events(changed, method=self.method, rerank=self.rerank, refresh=self.refresh, mass=self.mass)
        checks.check_refresh(self.refresh, method=self.method, window=self.window, bits=self.bits)
        checks.check_levels(self.levels, self.beam, method=self.method, bits=self.bits)
        checks.check_mass(self.mass, method=self._row, bits=self.bits)
        page = self.page_size
        sizes = {"page": page, "window": self.window}
        if self.extends:
            checks.check_extending(self.method, rerank=self.rerank, retrieve=self.retrieve, **sizes)
        if self.grouped:
            checks.check_landmarks(self.method, page=page, rerank=self.rerank)
        checks.check_budget(self.budget, sinks=self.sinks, least=self._least(page), **sizes)

    @property
    def extends(self) -> bool:
        """Whether the method reads beyond the length that the model was trained on."""
        return SELECTORS[self.method].extends

    @property
    def grouped(self) -> bool:
        """Whether what the method computes is another function than the original, whatever it reads."""
        return SELECTORS[self.method].grouped

    @property
    def eventful(self) -> bool:
        """Whether the method takes whole events."""
        return SELECTORS[self.method].eventful

    @property
    def page_size(self) -> int:
        """Tokens of a page; longer ones keep a channel of ``lowbit`` in fewer pieces, and bounds in fewer bytes."""
        if self.page or not (self.bits or self.extends or self.method in ("landmark", "lowbit", "em")):
            return self.page or 16
        longest = self.window if self.method == "infllm" else 64
        fitting = (page for page in (64, 32) if self.budget % page == 0 and self._least(page) <= self.budget)
        return next((page for page in fitting if page <= longest), 16)

    @property
    def reads_all_to(self) -> int:
        """Tokens of a sequence up to which everything is read as it was."""
        return self.dense_below if self.grouped else max(self.budget, self.dense_below)

    @property
    def exact_to(self) -> int:
        """Tokens of a sequence up to which heads that retrieve read everything as it was."""
        if self.method == "infllm":
            return min(self.reads_all_to, self.window + 1)
        if self.grouped:  # up to the first token that a whole page lies before, between the sinks' pages and the window
            return max(self.reads_all_to, (-(-self.sinks // self.page_size) + 1) * self.page_size + self.window - 1)
        return min(self.reads_all_to, self.page_size) if self.bits else self.reads_all_to

    def resolve(self, program: Program, target: Target) -> tuple[Sparsify, dict[str, Any]]:
        """Name the heads that ``retrieve`` gives a share of, by their scores on random tokens."""
        decays = sites.decay_share(self.retrieve)
        share, blocks = decays or sites.heads_share(self.retrieve), self._open(program)
        if share is None or not blocks or program.is_fake:
            return self, {}
        among = [(block.layer, block.path) for block in blocks]
        if decays is not None:
            layers = head_decay(program)
            kept = farthest(layers, share, among)
            facts = decay_facts(layers, kept)
        else:
            roles = head_roles(program)
            kept = roles.best(share, among)
            facts = roles.to_json(kept)
        return replace(self, retrieve=sites.listed_groups(kept)), {"heads": facts}

    def offers(self) -> tuple[Sparsify, ...]:
        """Offer two budgets, from where on the larger one pays; none of a method that has to be trained."""
        if self.grouped:
            return ()
        return tuple(replace(self, budget=budget, dense_below=512) for budget in (256, 512))

    def only(self, layers: Collection[int], present: Collection[int]) -> Sparsify:
        """Return the pass keeping every other layer."""
        return replace(self, keep=sites.all_but(layers, present))

    def plan(self, program: Program, target: Target) -> Plan:
        """Choose every causal attention block that ``keep`` does not name."""
        if self.extends:
            sizes = {name: getattr(self, name) for name in ("budget", "window")}
            extend.check_length(program, self.method, dense_below=self.reads_all_to, **sizes)
        blocks = sites.attention_blocks(program)
        chosen, rejections = sites.choose_sites(blocks, self.keep, lambda block: self._refuse(program, block))
        exact = self.exact_to
        if self.retrieve != "all":
            spread = self.retrieve.replace("decay:", "heads:")
            chosen = sites.keeping(chosen, sites.kept_groups(spread, blocks, self._open(program), "retrieve"))
            exact = min(exact, self.stream_window)
        relations: tuple[Relation, ...] = (Close(1e-4, tokens=exact), Bounded("perplexity_ratio", None))
        return Plan(self.spec, chosen, rejections, relations)

    def apply(self, program: Program, plan: Plan) -> tuple[Program, PassReport]:
        """Rewrite the plan's sites."""
        editor = Editor(program)
        blocks = sites.planned_blocks(editor.program, plan)
        last = blocks[-1][0]
        found = self.eventful and (self.retrieve == "all" or any(site.kept for site in plan.sites))
        grown = events.add_states(editor, last) if found else {}
        numbers = {"events": grown["past_events"]} if found else {}
        facts = [self._rewrite(editor, block, split, numbers) for block, split in blocks]
        details = sites.by_layer((block for block, _ in blocks), facts)
        if found:
            options = {name: getattr(self, name) for name in ("gamma", "longest", "refine")}
            details[str(last.layer)] |= events.find_events(editor, last, grown, options)
        changed = self.grouped and (self.retrieve == "all" or any(site.kept for site in plan.sites))
        report = PassReport(
            plan.spec,
            plan.sites,
            plan.rejections,
            plan.relations,
            untrained=changed,
            details=details,
            adapts=changed,
        )
        return editor.finish(), report

    def _open(self, program: Program) -> list[AttentionBlock]:
        """Return the blocks that can be rewritten and are."""
        blocks = sites.attention_blocks(program)
        kept = sites.kept_layers(self.keep, (block.layer for block in blocks))
        return [block for block in blocks if block.layer not in kept and self._refuse(program, block) is None]

    @property
    def _row(self) -> str:
        """The row of the table of selectors that chooses."""
        return "bounds2" if self.levels == 2 else self.method

    def _least(self, page: int) -> int:
        """Return the least budget that sinks and window fit into."""
        return forced_pages(page, self.sinks, self.window) * page

    def _options(self) -> dict[str, Any]:
        """Return how the heads that retrieve choose, with what follows from other options and the model left open."""
        names = ("channels", "budget", "sinks", "window", "bits", "refresh", "mass")
        options = {name: getattr(self, name) for name in names}
        rerank = self.rerank or (1 if self.grouped or self.eventful else 2)
        options |= {"method": self._row, "beam": self.beam or 4}
        options |= {"contiguity": self.contiguity, "delay": self.longest + self.calls}
        return options | {"page": self.page_size, "dense_below": self.reads_all_to, "rerank": rerank}

    def _refuse(self, program: Program, block: AttentionBlock) -> sites.Refusal | None:
        refusal = _refuse(program, block)
        by_decay = sites.decay_share(self.retrieve) is not None
        if refusal is None and by_decay and sites.placed_before_rotation(program, block):
            reason = (
                "a part of every head is rotated by itself, so that distance alone says nothing of what it attends to"
            )
            return "rotary", f"{reason}; retrieve=heads:P% goes by what it looks up"
        return extend.refuse(program, block, self.method) if refusal is None and self.extends else refusal

    def _rewrite(
        self, editor: Editor, block: AttentionBlock, split: HeadSplit, numbers: Mapping[str, Node]
    ) -> dict[str, Any]:
        node = block.attention
        if self.retrieve == "all":
            split = replace(split, kept=tuple(range(split.groups)))
        inputs = {name: value for name, value in arguments(node).items() if isinstance(value, Node)}
        facts: dict[str, Any] = {}
        streamed, slots = None, self.stream_window + self.sinks
        old = result_of(node, 0)
        assert old is not None
        if split.others:
            facts = {"retrieving": list(split.kept), "stream_window": self.stream_window}
            if split.kept:
                states, specs = split_states(editor, node, len(split.kept), slots)
            else:
                states, specs = {}, window_states(editor, node, slots)
            facts["state_bytes"] = sum(spec.bytes(0) for spec in specs)
            sizes = self.stream_window, self.sinks
            streamed = attend_window(editor, block, split, {**inputs, **states}, *sizes, compensation=self.compensation)
        if not split.kept:
            assert streamed is not None
            old.replace_all_uses_with(streamed)
            return facts
        output, more = attend_retrieving(editor, block, split, {**inputs, **numbers}, self._options())
        old.replace_all_uses_with(output if streamed is None else join_heads(editor, block, split, output, streamed))
        return facts | more


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
        reason = "ALiBi weighs tokens by their distance, and a page has no one distance to score it by"
        return "alibi", f"{reason}; the passes 'window' and 'linearize' keep it"
    return refusal
