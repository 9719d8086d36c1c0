"""The model as a column of layers: what each block was, what it became, and, opened, what is known of the layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from memc.report import branches, charts, training
from memc.report.facts import BlockFacts, GateFacts
from memc.report.files import PassReportFile
from memc.report.inspection import form_text, shape_text
from memc.report.text import amount, brief, escaped, size

STYLE = """
ol.layers { list-style: none; padding: 0; } ol.layers > li { border-bottom: 1px solid var(--line); }
.layers summary { display: flex; flex-wrap: wrap; gap: .25rem .75rem; align-items: baseline; cursor: pointer; }
.layers summary > b { min-width: 5rem; } .layers summary { padding: .2rem 0; }
.layers summary::before { content: "+"; width: .7rem; } .layers details[open] > summary::before { content: "-"; }
.form { border-left: .4rem solid var(--line); padding-left: .4rem; min-width: 15rem; }
.form.s0 { border-color: var(--s0); } .form.s1 { border-color: var(--s1); }
.form.s2 { border-color: var(--s2); } .form.s3 { border-color: var(--s3); } .form.s4 { border-color: var(--s4); }
@media (max-width: 30rem) { .form { min-width: 0; } .layers summary > b { min-width: 4.5rem; } }
.legend .form { display: inline-block; min-width: 0; margin-right: 1rem; }
.layers dl { margin: .25rem 0 .75rem 1.5rem; } .layers dt { font-weight: 600; } .layers dd { margin-left: 1rem; }
"""

KINDS = {
    "attention": "attention",
    "cross_attention": "cross-attention",
    "feed_forward": "feed-forward",
    "moe": "experts",
}

LOOKS = 5
"""Passes that have a colour of their own; the others are told by name alone."""


EXACT = 1e-9
"""Relative squared error that is rounding: a block that is right by construction is not drawn as if it were off."""


@dataclass(frozen=True)
class _Form:
    """What a block became: the passes that rewrote it, in order, and the reasons of those that did not."""

    block: BlockFacts
    passes: tuple[str, ...]
    reasons: tuple[str, ...]


def section(blocks: Sequence[BlockFacts], passes: Sequence[PassReportFile], gates: Sequence[GateFacts] = ()) -> str:
    """Show every layer with its blocks; nothing without blocks. ``gates`` are those of linear memories, by path."""
    if not blocks:
        return ""
    order = list(dict.fromkeys(item.name for item in passes))
    numbers = sorted({block.layer for block in blocks})
    rows = "".join(f"<li>{_layer(layer, blocks, passes, order, gates)}</li>\n" for layer in numbers)
    looks = [*((name, _colour(index)) for index, name in enumerate(order)), ("as it was", "form")]
    legend = "".join(f'<span class="{look}">{escaped(name)}</span> ' for name, look in looks)
    told = f'<p class="legend">{legend}</p>\n<ol class="layers">\n{rows}</ol>'
    return f'<section aria-label="Layers"><h2>Layers</h2>\n{told}</section>\n'


def _layer(
    layer: int,
    blocks: Sequence[BlockFacts],
    passes: Sequence[PassReportFile],
    order: list[str],
    gates: Sequence[GateFacts],
) -> str:
    forms = [_form(block, passes) for block in blocks if block.layer == layer]
    chips = "".join(f'<span class="{_look(form, order)}">{escaped(_became(form))}</span>' for form in forms)
    told = "".join(
        f"<dt>{escaped(name)}</dt>" + "".join(f"<dd>{escaped(said)}</dd>" for said in lines)
        for name, lines in _known(layer, forms, passes)
        if lines
    )
    drawn = "".join(_pictures(layer, forms, passes, gates))
    return f"<details><summary><b>layer {layer}</b>{chips}</summary><dl>{told}</dl>{drawn}</details>"


def _pictures(
    layer: int, forms: Sequence[_Form], passes: Sequence[PassReportFile], gates: Sequence[GateFacts]
) -> Iterator[str]:
    """Yield what a layer's gates forget, and where in a sequence it is off."""
    paths = {form.block.path for form in forms}
    for one in gates:
        if one.path in paths:
            powers = range(min(one.shares), max(one.shares) + 1)
            bars = [charts.Bar(f"{2**power:,}", 100 * one.shares.get(power, 0.0), full=True) for power in powers]
            yield charts.bar_chart("Half-life of the gates, from so many tokens on: % of tokens and heads", bars)
    for item in passes:
        found = item.training.transfer.by_position.get(layer) if item.training and item.training.transfer else None
        line = charts.Line("trained", [(one.end, one.error) for one in found or [] if one.error > EXACT], dots=True)
        yield charts.line_chart("Error of the output up to a position", [line], "position", doubling=True)


def _form(block: BlockFacts, passes: Sequence[PassReportFile]) -> _Form:
    mine = (block.layer, block.kind)
    rewrote = [item for item in passes if any((site.layer, site.kind) == mine for site in item.sites)]
    kept = [site.kept for item in rewrote for site in item.sites if (site.layer, site.kind) == mine and site.kept]
    reasons = [
        f"{item.name}: {skip.code} {skip.reason}"
        for item in passes
        for skip in item.skipped
        if (skip.layer, skip.kind) == mine
    ]
    reasons += [f"key-value heads {', '.join(map(str, heads))} stay as they were" for heads in kept]
    return _Form(block, tuple(item.name for item in rewrote), tuple(reasons))


def _look(form: _Form, order: list[str]) -> str:
    return _colour(order.index(form.passes[-1]) if form.passes else LOOKS)


def _colour(index: int) -> str:
    return f"form s{index}" if index < LOOKS else "form"


def _became(form: _Form) -> str:
    kind = KINDS[form.block.kind]
    return f"{kind}: {', '.join(form.passes)}" if form.passes else f"{kind}: as it was"


def _known(layer: int, forms: Sequence[_Form], passes: Sequence[PassReportFile]) -> Iterator[tuple[str, Sequence[str]]]:
    """Yield what is known of a layer: its blocks as they were, and what each pass says of it."""
    for form in forms:
        block = form.block
        lines = [f"{shape_text(block)}; {form_text(block)}", _held(block), block.path, *form.reasons]
        yield f"{KINDS[block.kind]}, original", [line for line in lines if line]
    for item in passes:
        told = [fact for facts in item.of_layer(layer).values() for fact in _items(facts)]
        lines = [f"{name.replace('_', ' ')}: {_said(name, value)}" for name, value in told]
        yield item.spec, lines + list(_trained(item, layer))


def _held(block: BlockFacts) -> str:
    """Say how many parameters a block has, and what attention over all tokens holds of each in float32."""
    said = [f"{amount(block.parameters)} parameters"] if block.parameters else []
    if block.kind == "attention" and block.kv_heads and block.head_dim:
        kept = 4 * block.kv_heads * (block.head_dim + (block.value_dim or block.head_dim))
        most = f", of {block.window} at most" if block.window else ""
        said.append(f"a state of {size(kept)} a token{most}")
    return ", ".join(said)


def _said(name: str, value: object) -> str:
    if "bytes" in name and isinstance(value, int):
        return size(value)
    return amount(value) if name.endswith("_parameters") and isinstance(value, int) else brief(value)


def _items(facts: object) -> Sequence[tuple[str, object]]:
    return list(facts.items()) if isinstance(facts, Mapping) else []


def _trained(item: PassReportFile, layer: int) -> Iterator[str]:
    for row in training.layer_rows(item, layer):
        cells = zip(training.LAYERS[1:], row[1:], strict=True)
        yield "training: " + "; ".join(f"{name.removeprefix('>')} {said}" for name, said in cells if said != "-")
    if item.training is not None and (facts := item.training.branches) is not None:
        for _, carried, _, due, _ in branches.share_rows(facts, layer):
            yield f"the {facts.branches[0]} carries {carried} % of the mass, the original gives {due} %"
