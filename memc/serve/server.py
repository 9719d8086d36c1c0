"""The process around the application: its socket, its signals, its end."""

from __future__ import annotations

import ipaddress
import signal
import socket
from collections.abc import Callable

import uvicorn

from memc.errors import MemcError
from memc.runtime import Session
from memc.serve.app import make_app
from memc.serve.engine import Limits

GRACE = 20
"""Seconds that running requests have to end once the server is told to stop."""

LOOPBACK_NAMES = frozenset(["localhost", "127.0.0.1", "::1"])


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket; port 0 takes any that is free. Raises ``MemcError`` E200 where that cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        raise MemcError("E200", f"cannot listen: {error}", f"{host}:{port}", "give another --host or --port") from None


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def run(
    session: Session,
    limits: Limits,
    name: str,
    place: socket.socket,
    on_ready: Callable[[], None] | None = None,
    *,
    key: str | None = None,
) -> None:
    """Serve until a signal asks to stop, then let what runs end within ``GRACE`` seconds.

    Requests have to bring the ``key``, if there is one. ``on_ready`` is called before the first request is taken.
    Raises ``MemcError`` E208 for an encoder.
    """
    host = place.getsockname()[0]
    hosts = LOOPBACK_NAMES | {host} if is_loopback(host) else None
    app = make_app(session, limits, name, hosts=hosts, key=key)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, ws="none", timeout_graceful_shutdown=GRACE
    )
    if on_ready is not None:
        on_ready()
    # uvicorn stops in order at either signal, then raises it anew: here both have been obeyed by then.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        uvicorn.Server(config).run(sockets=[place])
    except KeyboardInterrupt:
        pass
    finally:
        app.state.engine.abandon()  # a second signal ends the server before it could
        signal.signal(signal.SIGTERM, before)
