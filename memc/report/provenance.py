"""Where a result comes from: what it was made of, by what, into what, on what, and how to make it again."""

from __future__ import annotations

from memc.report import models as m


def facts(done: m.ConvertDocument) -> list[tuple[str, str]]:
    """Return names and values of what has to be equal for an equal result, and the command that repeats it.

    Empty where nothing is known of it, as in the report of an older conversion.
    """
    versions = ", ".join(f"{name} {number}" for name, number in done.versions.items())
    threads = "the machine's choice" if done.threads is None else str(done.threads)
    at = done.measured.at if done.measured is not None else ""
    found = [
        ("source digest", done.model.digest if done.model is not None else ""),
        ("versions", versions),
        ("seed", str(done.seed)),
        ("threads", threads),
        ("machine", done.machine),
        *((f"{op} lowered to", how) for op, how in sorted(done.forms.items())),
        ("finished", at),
        ("to repeat it", done.command),
    ]
    return [(name, value) for name, value in found if value] if done.machine else []
