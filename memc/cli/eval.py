"""``memc eval``."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from memc.cli.console import Console
from memc.cli.options import POSITIVE, declare, out_argument, threads_option
from memc.cli.sessions import open_session
from memc.errors import MemcError

if TYPE_CHECKING:
    from memc.evaluate.perplexity import PerplexityResult
    from memc.report.models import EvalDocument, EvalSide


@declare(
    "eval",
    "memc eval out --text book.txt",
    "memc eval out --text book.txt --against dense --context 2048",
    "memc eval out --text notes.jsonl --against ./my-model --json",
)
@out_argument
@click.option("--text", required=True, metavar="FILE", help="Text file, or .jsonl with a text on each line.")
@click.option("--context", type=POSITIVE, default=512, show_default=True, metavar="N", help="Tokens of each window.")
@click.option("--tokens", type=POSITIVE, metavar="N", help="Most tokens of the text to use.")
@click.option("--against", metavar="OUT|MODEL", help="Compare with another artifact or model, the reference.")
@threads_option
def command(
    console: Console, out: str, text: str, context: int, tokens: int | None, against: str | None, threads: int | None
) -> None:
    """Measure how well a converted model predicts a text, and how far it is from another.

    OUT may also be a model, which is then taken as it is. Divergences are of OUT from what it is compared against.
    """
    if context < 2:
        raise MemcError("E200", "a window has at least 2 tokens", "--context", "give 2 or more")
    from memc.data import read_documents
    from memc.report.listings import eval_view

    next(iter(read_documents(text)))  # an unusable text is told before a model is loaded
    with ExitStack() as stack:
        document = _measure(console, stack, out, text, context, tokens, against, threads)
    console.show(document, lambda: eval_view(document))


def _measure(
    console: Console,
    stack: ExitStack,
    out: str,
    text: str,
    context: int,
    tokens: int | None,
    against: str | None,
    threads: int | None,
) -> EvalDocument:
    from memc.data import tokenize
    from memc.evaluate.perplexity import compare, perplexity
    from memc.report.models import EvalDocument

    a = open_session(out, console, stack, threads=threads)
    a.require_decoder()
    ids = tokenize([text], a.text.tokenizer, limit=tokens)
    if against is None:
        with console.step(f"predicting {len(ids)} tokens"):
            side = _side(out, perplexity(a, ids, context))
        return EvalDocument(sides={"a": side}, text=text, window=context)
    b = open_session(against, console, stack, threads=threads)
    if b.encode(TOKENIZER_PROBE) != a.encode(TOKENIZER_PROBE):
        raise MemcError("E208", "the two have different tokenizers: their perplexities do not compare", against)
    with console.step(f"predicting {len(ids)} tokens with both"):
        result = compare(a, b, ids, context)
    return EvalDocument(
        sides={"a": _side(out, result.a), "b": _side(against, result.b)},
        text=text,
        window=context,
        kl_mean=result.kl_mean,
        kl_p99=result.kl_p99,
        top1_agreement=result.top1_agreement,
        ratio=result.ratio,
    )


TOKENIZER_PROBE = "The quick brown fox, 12345 naïve Übergrößen; def f(x):\n\treturn x ** 2  # 日本語"
"""A text that two tokenizers hardly cut the same way unless they are one."""


def _side(source: str, result: PerplexityResult) -> EvalSide:
    from memc.report.models import EvalSide, PositionBucket

    buckets = [
        PositionBucket(start=b.start, end=b.stop, perplexity=b.perplexity, tokens=b.tokens) for b in result.by_position
    ]
    return EvalSide(source=source, perplexity=result.perplexity, tokens=result.tokens, by_position=buckets)
