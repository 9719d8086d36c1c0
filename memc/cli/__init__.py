"""The command line: one file a command, one console, one table of errors. Only what a command needs is imported."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``memc`` with ``argv`` (default: the process's) and return its exit code."""
    from memc.cli.app import run

    return run(argv)
