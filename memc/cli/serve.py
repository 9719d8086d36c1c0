"""``memc serve``."""

from __future__ import annotations

from pathlib import Path

import click

from memc.cli import completing
from memc.cli.console import Console
from memc.cli.options import NATURAL, POSITIVE, declare, out_argument, threads_option
from memc.errors import MemcError


@declare(
    "serve",
    "memc serve out",
    "memc serve out --port 8080 --concurrent 2 --max-tokens 8192",
    "memc serve out --port 0 --json",
)
@out_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--name", metavar="MODEL", help="Name of the model in requests (default: OUT's own).")
@click.option("--concurrent", type=POSITIVE, default=1, show_default=True, metavar="N", help="Requests run at once.")
@click.option("--queue", type=NATURAL, default=16, show_default=True, metavar="N", help="Requests that may wait.")
@click.option("--max-tokens", type=POSITIVE, default=32768, show_default=True, help="Most of prompt and answer.")
@click.option("--max-new-tokens", type=POSITIVE, default=1024, show_default=True, help="Most of an answer.")
@click.option("--max-body", type=POSITIVE, default=1 << 20, show_default=True, metavar="BYTES", help="Of a request.")
@click.option("--keep", type=NATURAL, default=8, show_default=True, metavar="N", help="Conversations held for more.")
@click.option(
    "--bank",
    metavar="BANK",
    help="Fetch the blocks that each conversation belongs to.",
    shell_complete=completing.folders,
)
@click.option(
    "--api-key-file",
    metavar="FILE",
    help="Ask for the key that the file holds.  [default: no key]",
    shell_complete=completing.files,
)
@threads_option
def command(
    console: Console,
    out: str,
    host: str,
    port: int,
    name: str | None,
    concurrent: int,
    queue: int,
    max_tokens: int,
    max_new_tokens: int,
    max_body: int,
    keep: int,
    bank: str | None,
    api_key_file: str | None,
    threads: int | None,
) -> None:
    """Serve a converted model through OpenAI's HTTP interface, under /v1, until it is interrupted.

    Completions and chat, streamed or whole. A conversation whose state does not grow is kept for its next turn, which
    then runs only what is new; with a bank its first prompt settles what is fetched for it. Without --api-key-file
    whoever reaches the address can use it. /health, which asks for no key, tells whether it answers. Needs pip install
    'memc[serve]'.
    """
    try:
        from memc.serve import Limits, listen, run
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise MemcError("E602", f"{error.name} is not installed", next="pip install 'memc[serve]'") from None
    from memc import runtime
    from memc.bank import Bank
    from memc.bank.session import BankSession
    from memc.report.tools import ServeDocument
    from memc.serve.server import is_loopback

    key = _read_key(api_key_file) if api_key_file is not None else None
    limits = Limits(concurrent, queue, max_tokens, max_new_tokens, max_body, keep)
    with listen(host, port) as place:
        session = runtime.load(out, threads=threads, verify=True)
        if bank is not None:
            session = BankSession(session, Bank.open(bank, threads=threads))
        most = min(max_tokens, session.capacity or max_tokens)
        if warning := session.beyond_trained(most):
            console.warn(f"{warning}, and conversations may grow so long: --max-tokens says how long")
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{place.getsockname()[1]}/v1"
        model = name or Path(out).resolve().name
        if key is None and not is_loopback(host):
            console.warn(f"{host} can be reached by others, who need no key")

        def ready() -> None:
            if console.json:
                console.text(ServeDocument(artifact=out, url=url, model=model).to_json() + "\n")
            console.note(f"serving {model} on {url}; Ctrl-C stops")

        run(session, limits, model, place, ready, key=key)


def _read_key(path: str) -> str:
    """Return what a file holds, but for what ends its lines: of a command line others on the machine can read it."""
    try:
        key = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise MemcError("E200", f"the file of the API key cannot be read: {error}", path) from None
    if not key or not key.isascii() or any(char.isspace() for char in key):
        raise MemcError("E200", "an API key is one word of ASCII", path, "openssl rand -hex 32 > FILE makes one")
    return key
