"""The pass itself: its options, what it takes, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from memc import sites
from memc.analysis.heads import head_roles
from memc.blocks import Alibi, AttentionBlock, SlidingWindow
from memc.errors import MemcError
from memc.passes.linearize.site import PARAMETERS, rewrite_site
from memc.pipeline import Pass, PassReport, Plan, option
from memc.program import Program
from memc.relation import Bounded, Close, Relation
from memc.rewrite import Editor
from memc.target import Target
from memc.train.transfer import Transfer

SEQUENCES = (8, 512)
"""Calibration sequences that first values are fitted to, and their tokens: as many as a training begins with."""


@dataclass(frozen=True)
class Linearize(Pass):
    """Replace softmax over everything by a sliding window and a gated linear memory.

    ``form=shared`` (default): the window (rotary inside, ``sinks`` first tokens read exactly) and the memory share one
    denominator, as in LoLCATs (Zhang et al. 2024, eq. 7) but with the window's log-sum-exp applied to both parts; the
    memory holds exactly the tokens that left the window. Its mass has a learned scale that depends on the data.
    Identity setting: ``window`` at least as long as the context. Prompts of at most ``window`` tokens give the
    original logits by construction, trained or not. Untrained, the memory is all but off, so that the perplexity
    beyond is that of the ``window`` pass; with ``start=fitted`` feature maps, gate and mass are fitted in closed form
    to the attention that is replaced, on calibration text, which training would begin with.

    ``form=lizard``: the layer of Lizard (arXiv 2507.09025, section 3): a rotary-free gated branch over all tokens with
    a normaliser of its own, plus alpha times a rotary-free window with ``meta`` value-less logits. ``gate=token`` is
    one gate for all heads, with a bias (0 in the paper). It has no identity setting: at the first token the gated
    branch is v and the window branch a positive share of v, so y = v only with alpha = 0; then y is the gated branch
    alone, whose weights phi(q).phi(k) have a rank of at most ``feature_size`` over any set of queries and keys, while
    those of softmax have full rank and turn with the distance of rotary positions. It is of no use untrained.

    ``keep=heads:P%`` keeps softmax, and the growing state that it needs, for the P percent of key-value heads (each
    with the query heads that read it) whose best query head looks up earlier tokens most by the scores of
    :mod:`memc.analysis.heads`; fewer where no more look up at all. The other heads of their layers become linear.

    Parameters are new and float32, called ``memc.linearize.layers.N.*``, and untrained unless a conversion has data to
    train them on; the gate starts with a half-life of 512 tokens. Under ALiBi, which the window keeps, it starts as
    fast to forget as the slopes are steep: a decay of exp(-slope) a token is what the distance weighs there.
    ``update=gated_delta`` (shared form) overwrites what a unit key held (Gated DeltaNet, Yang et al. 2025) and has no
    denominator of its own: its mass is the learned scale alone.

    Does not handle:

    - ``encoder``: models that are no decoders.
    - ``cross_attention``: keys and values of another sequence.
    - ``bidirectional``: tokens that read later ones.
    - ``chunked``, ``prefix``, ``mask``: chunked, prefix and unknown masks.
    - ``relative_bias``, ``bias``: learned or unknown biases on the scores.
    - ``alibi``: ALiBi, in the ``lizard`` form, whose window knows no distances.
    - ``rotary``: heads of which a part is rotated by itself (multi-head latent attention), in the ``lizard`` form.
    - ``sink_logits``: learned sinks of the model's own, in the ``lizard`` form (``shared`` keeps them in the window).
    - ``sliding_window``: layers that never read past ``window`` tokens and have nothing to remember.
    - ``hidden``: queries, keys and values that are not projected from one tensor, which the gates read.
    - ``shared_kv``: keys and values that another layer reads too.
    - ``not_streamable``: blocks that cannot run on a sequence in pieces.
    - ``kept``: layers that the option ``keep`` names.
    """

    name: ClassVar[str] = "linearize"

    form: str = option("shared", "how window and memory are mixed", choices=("shared", "lizard"))
    window: int = option(64, "most recent tokens that softmax reads, the token itself included", unit="tokens", min=1)
    sinks: int = option(4, "first tokens of the sequence that softmax always reads (shared)", unit="tokens", min=0)
    meta: int = option(4, "value-less learned logits in the window's denominator (lizard)", unit="logits", min=0)
    feature: str = option(
        "auto",
        "feature map of queries and keys; auto is softmax, or the paper's hedgehog with form=lizard",
        choices=("auto", "softmax", "hedgehog", "elu", "relu"),
    )
    feature_size: int = option(128, "features of a query or key; even for hedgehog", unit="channels", min=2)
    gate: str = option("token", "what the memory's decay depends on", choices=("none", "head", "token", "channel"))
    update: str = option("gated", "how the memory is written", choices=("gated", "gated_delta"))
    start: str = option(
        "plain",
        "first values of what is new: plain (the memory all but off), or fitted to calibration text in closed form",
        choices=("plain", "fitted"),
    )
    keep: str = option("auto", sites.AUTO_HELP)

    def __post_init__(self) -> None:
        """Check every option, and those that go together."""
        super().__post_init__()
        if sites.auto_share(self.keep) is None and not sites.check_heads(self.name, self.keep):
            sites.check_keep(self.name, self.keep)
        other, unused = ("meta", self.meta) if self.form == "shared" else ("sinks", self.sinks)
        if unused != 4:
            raise MemcError("E203", f"form={self.form} has no {other}", where=f"{self.name}:{other}={unused}")
        if self.form == "lizard" and self.start == "fitted":
            raise MemcError("E203", "start=fitted goes with form=shared", where=f"{self.name}:form=lizard")
        if self.form == "lizard" and self.update == "gated_delta":
            raise MemcError("E203", "update=gated_delta goes with form=shared", where=f"{self.name}:form=lizard")
        if self.feature_map == "hedgehog" and self.feature_size % 2:
            where = f"{self.name}:feature_size={self.feature_size}"
            raise MemcError("E203", "feature_size is even for feature=hedgehog", where=where)

    @property
    def feature_map(self) -> str:
        """The feature map that ``feature`` stands for."""
        if self.feature != "auto":
            return self.feature
        return "hedgehog" if self.form == "lizard" else "softmax"

    def open_share(self) -> float | None:
        """Return the share of layers that ``keep=auto`` leaves open."""
        return sites.auto_share(self.keep)

    def resolve(self, program: Program, target: Target) -> tuple[Linearize, dict[str, Any]]:
        """Name the heads that ``keep=heads:P%`` keeps, by their scores on repeated random tokens."""
        share, blocks = sites.heads_share(self.keep), self._open(program)
        if share is None or not blocks or program.is_fake:
            return self, {}
        roles = head_roles(program)
        kept = roles.best(share, [(block.layer, block.path) for block in blocks])
        return replace(self, keep=sites.listed_groups(kept)), {"heads": roles.to_json(kept)}

    def trained_relations(self, plan: Plan) -> tuple[Relation, ...]:
        """Promise, in the ``shared`` form, to be nearer to the original than the ``window`` pass is."""
        if self.form == "lizard":
            return plan.relations
        return *plan.relations[:1], Bounded("perplexity_ratio", None), Bounded("kl_ratio_to_window", 1.0)

    def needs_training(self) -> str | None:
        """Return the option ``keep`` where it asks for a share of the layers."""
        return f"keep={self.keep}" if self.keep.startswith("auto:") else None

    def settle(self, layers: Iterable[int]) -> Linearize:
        """Return the pass with the layers that stay softmax named."""
        return replace(self, keep=sites.listed(layers))

    def calibrates(self) -> tuple[int, int] | None:
        """Ask for the sequences that first values are fitted to."""
        return SEQUENCES if self.start == "fitted" else None

    def offers(self) -> tuple[Linearize, ...]:
        """Offer two windows with memories of fitted first values, which need no training."""
        return tuple(replace(self, window=window, start="fitted") for window in (64, 256))

    def only(self, layers: Collection[int], present: Collection[int]) -> Linearize:
        """Return the pass keeping every other layer."""
        return replace(self, keep=sites.all_but(layers, present))

    def one_by_one(self, program: Program, plan: Plan) -> Iterator[tuple[int, Program]]:
        """Rewrite each layer alone, with the first values that it has beside the others: they learn from the original.

        So the calibration text is run once.
        """
        whole = dict(self.apply(program, plan)[0].module.named_parameters())
        for layer, result in super().one_by_one(program, replace(plan, calibration=None)):
            for name, value in result.module.named_parameters():
                if name.startswith(PARAMETERS):
                    value.data.copy_(whole[name].data)
            yield layer, result

    def plan(self, program: Program, target: Target) -> Plan:
        """Choose every causal attention block that ``keep`` does not name."""
        blocks = sites.attention_blocks(program)
        heads = sites.kept_groups(self.keep, blocks, self._open(program))
        chosen, rejections = sites.choose_sites(blocks, self.keep, lambda block: self._refuse(program, block), heads)
        relations: tuple[Relation, ...] = (Bounded("perplexity_ratio", None),)
        if self.form == "shared":
            exact = Close(1e-4, tokens=self.window)
            relations = (exact, Bounded("perplexity_ratio_to_window", 1.001))
            if self.start == "fitted":  # to attention, not to the predictions: that it helps is measured, not promised
                relations = (exact, Bounded("perplexity_ratio", None), Bounded("kl_ratio_to_window", None))
        return Plan(self.spec, chosen, rejections, relations)

    def apply(self, program: Program, plan: Plan) -> tuple[Program, PassReport]:
        """Rewrite the plan's sites; the memory of the ``shared`` form starts all but off, unless it is fitted."""
        editor = Editor(program)
        blocks = sites.planned_blocks(editor.program, plan)
        made = [rewrite_site(self, editor, block, split) for block, split in blocks]
        details = sites.by_layer((block for block, _ in blocks), (facts for facts, _ in made))
        report = PassReport(
            plan.spec,
            plan.sites,
            plan.rejections,
            plan.relations,
            sum(facts["new_parameters"] for facts, _ in made),
            True,
            details,
            tuple(objective for _, objective in made),
        )
        result = editor.finish()
        if plan.calibration is not None:
            Transfer(program, result, report.objectives).initialise(plan.calibration.tokens, plan.calibration.positions)
        return result, report

    def _open(self, program: Program) -> list[AttentionBlock]:
        """Return the blocks that can be rewritten."""
        return [block for block in sites.attention_blocks(program) if self._refuse(program, block) is None]

    def _refuse(self, program: Program, block: AttentionBlock) -> sites.Refusal | None:
        refusal = sites.refuse_constant_state(program, block)
        if refusal is not None:
            return refusal
        if isinstance(block.bias, Alibi) and self.form == "lizard":
            return "alibi", "ALiBi weighs tokens by their distance, which this form leaves out; form=shared keeps it"
        if isinstance(block.mask, SlidingWindow) and block.mask.size <= self.window:
            size = block.mask.size
            return "sliding_window", f"the layer never reads past {size} tokens; the pass 'window' bounds its state"
        if block.hidden is None:
            return "hidden", "query, key and value are not projected from one tensor, which the gates read"
        if self.form == "lizard" and sites.placed_before_rotation(program, block):
            return (
                "rotary",
                "a part of every head is rotated by itself, which this form leaves out; form=shared keeps it",
            )
        if block.sink_logits is not None and self.form == "lizard":
            return "sink_logits", "the model has sinks of its own where this form puts its meta logits"
        return None
