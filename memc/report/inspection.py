"""The terminal view of a model: its blocks, near misses, and what a token costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from memc.report import facts as f
from memc.report import models as m
from memc.report.layout import Columns, lines, stack, table, text, titled
from memc.report.text import amount, layers, number, past_training, plain, size

WORK_OF_INPUT = "work for an input"


def inspect_view(document: m.InspectDocument, *, layer: int | None = None, why: bool = False) -> RenderableType:
    """Show a model: its blocks, equal layers folded into one row, and what it costs."""
    misses = document.near_misses if why or not document.blocks else []
    hidden = len(document.near_misses) - len(misses)
    hint = f"{hidden} near misses; --why explains them" if hidden else ""
    return stack(
        model_line(document.model),
        blocks_table(document.blocks, layer),
        titled("near misses", _misses(misses, layer)),
        cost_lines(document),
        lines([hint] if hint else []),
        lines((f"warning: {warning}" for warning in document.warnings), "yellow"),
    )


def model_line(model: f.ModelFacts) -> Text:
    """Name a model and its size."""
    facts = [plain(model.family), f"{amount(model.parameters)} parameters"]
    if model.vocab_size:
        facts.append(f"vocabulary {model.vocab_size}")
    if model.max_positions:
        facts.append(f"{model.max_positions} positions")
    if not model.decoder:
        facts.append(f"takes {plain(', '.join(model.inputs))}; no decoder, it cannot generate")
    return Text.assemble((plain(model.source), "bold"), "\n", ", ".join(facts))


def blocks_table(blocks: Sequence[f.BlockFacts], layer: int | None = None) -> Columns:
    """Show blocks; those that differ in nothing but their layer share a row."""
    chosen = [block for block in blocks if layer is None or block.layer == layer]
    folded: dict[tuple[str, ...], list[int]] = {}
    for block in chosen:
        path = block.path if layer is not None else ""
        folded.setdefault((block.kind, shape_text(block), form_text(block), path), []).append(block.layer)
    columns = ["layers", "block", "shape", "form"]
    rows = [(layers(where), kind, shape, form) for (kind, shape, form, _), where in folded.items()]
    if layer is None:
        return table(columns, rows)
    return table([*columns, "path"], [(*row, path) for row, (_, _, _, path) in zip(rows, folded, strict=True)])


def shape_text(block: f.BlockFacts) -> str:
    """Say how large a block is."""
    if block.kind in ("feed_forward", "moe"):
        return f"{block.width or '?'} -> {block.hidden or '?'}"
    heads = f"{block.heads or '?'} heads"
    if block.kv_heads and block.kv_heads != block.heads:
        heads += f", {block.kv_heads} kv"
    return f"{heads}, size {block.head_dim or '?'}"


def form_text(block: f.BlockFacts) -> str:
    """Say what a block computes, and why it is not raised."""
    facts: list[str] = []
    if block.kind in ("feed_forward", "moe"):
        facts += [block.activation or "", "gated" if block.gated else ""]
    else:
        span = block.window or block.mask_size
        facts.append((block.mask or "") + (f" {span}" if span else ""))
        facts.append("rotary" if block.positions == "rotary" else f"positions {block.positions or '?'}")
        facts.append(block.bias if block.bias not in (None, "none") else "")
        facts.append(f"softcap {number(block.softcap)}" if block.softcap else "")
        facts += ["qk norm" if block.qk_norm else "", "sink logits" if block.sink_logits else ""]
    said = ", ".join(fact for fact in facts if fact)
    if not block.raised:
        return f"{said}; not raised: {block.reason}"
    return f"{said} ({block.reason})" if block.reason else said


def _misses(misses: Sequence[f.NearMissFacts], layer: int | None) -> RenderableType | None:
    chosen = [miss for miss in misses if layer is None or miss.layer in (None, layer)]
    told = []
    for miss in chosen:
        told.append(f"{miss.path}: nearly {miss.nearest}, but {miss.reason}")
        told.append(f"    at {miss.source or 'an unknown line'} (node {miss.node})")
    return lines(told)


def cost_lines(document: m.InspectDocument) -> RenderableType:
    """Show work and state per token at some contexts."""
    contexts = sorted(document.state_bytes or document.flops_by_context)
    label = work_label(document.model)
    if not contexts or label == WORK_OF_INPUT:
        return text(f"{label}: {amount(document.flops_per_token, 'FLOP')}")
    flops = document.flops_by_context or dict.fromkeys(contexts[:1], document.flops_per_token)
    rows = [[label, *(amount(flops.get(context), "FLOP") for context in contexts)]]
    if document.state_bytes:
        rows.insert(0, ["state of a sequence", *(size(document.state_bytes[context]) for context in contexts)])
    if read := document.bytes_read_per_token:
        rows.insert(1, ["read for a token", *(size(read.get(context)) for context in contexts)])
    made = table(["at a context of", *(f">{context}" for context in contexts)], rows)
    return Group(made, *past_training_note(contexts, document.model))


def past_training_note(contexts: Iterable[int], model: f.ModelFacts | None) -> list[Text]:
    """Say which of the contexts are past what the model was trained on; nothing where none is."""
    note = past_training(contexts, model.max_positions if model is not None else None)
    return [text(note)] if note else []


def work_label(model: f.ModelFacts | None) -> str:
    """Name what the work is counted for: of a model that takes no tokens, one whole input."""
    tokens = model is None or not model.inputs or any(name.startswith("tokens ") for name in model.inputs)
    return "work for a token" if tokens else WORK_OF_INPUT
