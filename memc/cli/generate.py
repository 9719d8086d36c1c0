"""``memc generate``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from memc.cli import completing
from memc.cli.console import Console
from memc.cli.options import NATURAL, POSITIVE, declare, out_argument, seed_option, threads_option
from memc.errors import MemcError
from memc.report.text import number, size

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from memc.report.models.banks import BankUse
    from memc.runtime import Session


@declare(
    "generate",
    'memc generate out --prompt "Gravity is"',
    'memc generate out --chat --prompt "Why is the sky blue?" --temperature 0.7 --seed 1',
    'memc generate out --prompt "Once upon a time" --bank bank --json',
)
@out_argument
@click.option("--prompt", required=True, metavar="TEXT", help="Text to go on from.")
@click.option("--max-new-tokens", type=POSITIVE, default=128, show_default=True, metavar="N", help="Most new tokens.")
@click.option("--temperature", type=click.FloatRange(min=0), help="0 takes the likeliest token.")
@click.option("--top-k", type=NATURAL, help="Draw from the k likeliest tokens.")
@click.option("--top-p", type=click.FloatRange(0, 1), help="Draw from the likeliest tokens that make up p.")
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template.")
@click.option(
    "--bank",
    metavar="BANK",
    help="Fetch the blocks that the prompt belongs to.",
    shell_complete=completing.folders,
)
@click.option("--deny", multiple=True, metavar="N.N...", help="Cluster of the bank that is never read, nor below it.")
@click.option("--generic", is_flag=True, help="Fetch the generic block for a prompt that is like nothing in the bank.")
@seed_option
@threads_option
def command(
    console: Console,
    out: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    chat: bool,
    bank: str | None,
    deny: tuple[str, ...],
    generic: bool,
    seed: int | None,
    threads: int | None,
) -> None:
    """Continue a prompt with a converted model.

    The text goes to stdout as it is drawn; tokens per second and bytes of state go to stderr, and of a bank which
    clusters were used and what fetching them took.
    """
    if bank is None and (deny or generic):
        raise MemcError("E200", "--deny and --generic go with --bank", next="add --bank BANK")
    if not prompt.strip():
        raise MemcError("E205", "the prompt is empty", "--prompt", "give at least one word")
    from memc import runtime
    from memc.report.models import GenerateDocument

    session = runtime.load(out, threads=threads, verify=True)
    fetched, use = (None, None) if bank is None else _fetch(session, bank, prompt, deny, generic, threads)
    if use is not None:
        console.note(use.line())
    elif any(port.role == "fetched" for port in session.manifest.inputs):
        console.note("no bank was given: nothing is fetched, and the model answers as it would without one")
    result = session.generate(
        prompt,
        fetched=fetched,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        chat=chat,
        on_text=None if console.json else lambda row, piece: console.text(piece),
    )
    if console.json:
        document = GenerateDocument(
            artifact=out,
            prompt=prompt,
            text=result.text or "",
            prompt_tokens=result.prompt_tokens,
            new_tokens=len(result.ids),
            stopped=result.finish_reason,
            seed=result.seed,
            prefill_tokens_per_s=result.timing.prefill_tokens_per_s,
            decode_tokens_per_s=result.timing.decode_tokens_per_s,
            state_bytes=result.state_bytes,
            fetched_bytes=result.fetched_bytes,
            bank=use,
        )
        console.text(document.to_json() + "\n")
    else:
        console.text("\n")
    if warning := session.beyond_trained(result.prompt_tokens + len(result.ids)):
        console.warn(warning)
    rates = f"prefill {number(result.timing.prefill_tokens_per_s)}, decode {number(result.timing.decode_tokens_per_s)}"
    counts = f"{result.prompt_tokens} + {len(result.ids)} tokens"
    console.note(f"{counts}; {rates} tokens/s; state {size(result.state_bytes)}; seed {result.seed}")


def _fetch(
    session: Session, folder: str, prompt: str, deny: tuple[str, ...], generic: bool, threads: int | None
) -> tuple[dict[str, npt.NDArray[np.float32]], BankUse]:
    from memc.bank import Bank
    from memc.bank.session import fetch_for, require_bank

    opened = Bank.open(folder, deny=deny, generic=generic, threads=threads)
    require_bank(session.manifest, session.folder, opened)
    fetched, (use,) = fetch_for(opened, [prompt])
    return fetched, use
