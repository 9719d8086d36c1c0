"""Models of the Hugging Face hub: download, or the local cache, through ``huggingface_hub``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from memc.errors import MemcError
from memc.frontend.source import PICKLED, refuse_pickled

_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_SMALL = ["*.json", "*.jinja", "LICENSE*", "README.md"]


def is_hub_id(text: str) -> bool:
    """Tell whether ``text`` has the form ``organisation/name`` or ``organisation/name@revision``."""
    return _ID.fullmatch(text) is not None and not text.startswith(".")


def download(text: str, *, remote_code: bool, weights: bool, beside: Sequence[str] = ()) -> Path:
    """Return the local snapshot of a hub id; without ``weights`` only its small files are fetched.

    ``beside`` are patterns of further files, in folders of the repository too.
    ``HF_HOME``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE`` mean what they mean to ``huggingface_hub``.

    Raises ``MemcError`` E301 when the hub or the cache does not have the model or cannot be reached, E304 when the hub
    has but pickled checkpoints of it.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    match = _ID.fullmatch(text)
    assert match is not None
    patterns = [*_SMALL, *(["*.safetensors"] if weights else []), *(["*.py"] if remote_code else [])]
    try:
        folder = snapshot_download(
            match["repo"], revision=match["revision"], allow_patterns=patterns, ignore_patterns=["*/*"]
        )
        if beside:
            snapshot_download(match["repo"], revision=match["revision"], allow_patterns=list(beside))
    except GatedRepoError as error:
        hint = "accept its licence on huggingface.co and set HF_TOKEN"
        raise MemcError("E301", f"model {text!r} is gated", next=hint) from error
    except RepositoryNotFoundError as error:
        raise MemcError("E301", f"the hub has no model {text!r}, or it is private", next="set HF_TOKEN") from error
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        hint = "download it once with a connection, or give a local folder"
        raise MemcError("E301", f"model {text!r} is not in the local cache and {why}", next=hint) from error
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        hint = "check the revision and the connection"
        raise MemcError("E301", f"model {text!r} cannot be downloaded: {reason}", next=hint) from error
    if weights and not any(Path(folder).glob("*.safetensors")):
        refuse_pickled(_pickled(match["repo"], match["revision"]), text)
    return Path(folder)


def _pickled(repo: str, revision: str | None) -> list[str]:
    """Return the names of the pickled checkpoints that the hub has, none where it cannot be asked."""
    from huggingface_hub import snapshot_download

    try:
        files = snapshot_download(
            repo, revision=revision, allow_patterns=list(PICKLED), ignore_patterns=["*/*"], dry_run=True
        )
    except (OSError, ValueError):
        return []
    return [file.filename for file in files]
