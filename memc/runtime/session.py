"""Session: a loaded artifact. Logits, states that go on where they were left, generation; numpy only."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, overload

import numpy as np
import numpy.typing as npt

from memc.arguments import MOST_THREADS, path_of, short, whole_number, whole_numbers
from memc.artifact import Manifest, beyond_trained, read_manifest
from memc.backend import Runner
from memc.errors import MemcError
from memc.plugins import load_plugin
from memc.runtime.generate import Conversation, GenerateOptions, Generation, generate, one_prompt, stream
from memc.runtime.inputs import Array, Fetched, fetched_inputs, named_inputs
from memc.runtime.rows import I64, Ids, columns, full_rows, id_rows, require_list
from memc.runtime.state import F32, SessionState
from memc.runtime.state_file import read_state, write_state
from memc.runtime.text import Text

if TYPE_CHECKING:
    from memc.interop import SessionModel
    from memc.report.models import ReportDocument

CHUNK = 256


def load(out: str | Path, *, threads: int | None = None, verify: bool = False, chunk: int = CHUNK) -> Session:
    """Load the artifact in folder ``out``.

    ``threads`` of the backend, None for its own choice; ``verify`` checks the digest of every file that is read;
    ``chunk`` is the number of tokens per call when a longer sequence is run, fewer where the artifact's calls have to
    be shorter. Raises ``MemcError``: E309 no artifact, E402 a digest differs, E202 or E602 the backend is unknown or
    missing, E200 ``out`` is no path, or ``threads`` or ``chunk`` out of range.
    """
    if threads is not None:
        whole_number("threads", threads, 1, MOST_THREADS)
    whole_number("chunk", chunk)
    folder = path_of("out", out)
    manifest = read_manifest(folder, verify=verify, unread="program")
    runner: Runner = load_plugin("memc.backends", manifest.backend)().load(folder, manifest, threads)
    return Session(folder, manifest, runner, chunk=chunk)


class Session:
    """A loaded artifact, ready to run.

    Long inputs run ``chunk`` tokens at a time and only the logits that are asked for are computed, so a prompt of any
    length takes the memory of one chunk. Nothing here imports torch.
    """

    def __init__(self, folder: Path, manifest: Manifest, runner: Runner, *, chunk: int = CHUNK) -> None:
        """Wrap what ``load`` loaded."""
        self.folder = folder
        self.manifest = manifest
        self.runner = runner
        self.chunk = min(chunk, manifest.longest_call or chunk)
        self.text = Text(folder)
        self._told = False

    @property
    def capacity(self) -> int | None:
        """Most tokens that one sequence may have, None for no limit."""
        return self.manifest.capacity

    def report(self) -> ReportDocument:
        """Return the report of the artifact, shown as a page in a notebook. Raises ``MemcError`` E309 without one."""
        from memc.report.read import read_report

        return read_report(self.folder)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text. Raises ``MemcError`` E308 without a tokenizer."""
        return self.text.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens left out. Raises ``MemcError`` E308 without a tokenizer."""
        return self.text.decode(ids)

    def logits(self, ids: Ids | None = None, **inputs: npt.ArrayLike) -> F32:
        """Return the logits ``[B,T,vocab]`` float32 of every token, from an empty state.

        T is the longest row's length; past a shorter row's end the logits are 0. Of an encoder it is the model's first
        output, whatever that is. What a model takes beside tokens, or instead of them, is given by name:
        ``logits(ids, decoder_tokens=...)``, ``logits(pixel_values=...)``; ``manifest.inputs`` lists the names. What is
        fetched is zero where it is not given.

        Raises ``MemcError``: E205 an empty row, E206 a row past the capacity, E208 an input is missing, E200 an id
        outside the vocabulary or an input of another name, type or shape.
        """
        if ids is None or not self.manifest.decoder:
            return self._whole(ids, inputs)
        rows = id_rows(ids, self.manifest, self.folder)
        longest = max(map(len, rows))
        pieces = [piece for _, piece in self.logit_chunks(rows, inputs=inputs)]
        out = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)
        blank = np.arange(longest) >= np.array([[len(row)] for row in rows])
        if blank.any():
            out = out.copy()
            out[blank] = 0
        return out

    def logit_chunks(
        self, ids: Ids, *, chunk: int | None = None, inputs: Mapping[str, npt.ArrayLike] | None = None
    ) -> Iterator[tuple[int, F32]]:
        """Yield ``(start, logits [B,C,vocab])`` for one chunk of columns after the other, from an empty state.

        The memory is that of one chunk; what stands at padded columns is undefined. An encoder runs whole, in one
        piece, as does a model with further ``inputs`` of each token, given by name. Raises as ``logits`` does.
        """
        if not self.manifest.decoder:
            yield 0, self._whole(ids, inputs or {})
            return
        rows = full_rows(ids, self.manifest, self.folder)
        longest = max(map(len, rows))
        named = named_inputs(self.manifest, inputs or {}, {"B": len(rows), "T": longest})
        self.require_room(longest, self.capacity)
        self._tell_beyond_trained(longest)
        whole = any("T" in port.shape for port in self.manifest.inputs if port.name in named)
        width = longest if whole else min(chunk or self.chunk, self.manifest.longest_call or longest)
        state = self.runner.new_state(len(rows), longest)
        zeros = np.zeros(len(rows), np.int64)
        for start in range(0, longest, width):
            tokens, positions = columns(rows, zeros, start, min(start + width, longest))
            yield start, self.runner.run(tokens, positions, state, None, named)

    def _whole(self, ids: Ids | None, inputs: Mapping[str, npt.ArrayLike]) -> F32:
        """Run a model that cannot be run in pieces: rows of one length together, for it knows no padding."""
        if ids is None:
            sizes: dict[str, int] = {}
            named = named_inputs(self.manifest, inputs, sizes)
            self.require_room(max(sizes.get("T", 0), sizes.get("U", 0)), self.capacity)
            return self.runner.run(None, None, self.runner.new_state(sizes.get("B", 1)), None, named)
        rows = full_rows(ids, self.manifest, self.folder)
        lengths = np.array([len(row) for row in rows])
        longest = int(lengths.max())
        named = named_inputs(self.manifest, inputs, {"B": len(rows), "T": longest})
        self.require_room(longest, self.capacity)
        if named and (lengths != longest).any():
            raise MemcError("E200", f"rows of {lengths.tolist()} tokens: with further inputs all must be equally long")
        out: F32 | None = None
        for length in np.unique(lengths):
            chosen = np.flatnonzero(lengths == length)
            tokens, positions = columns([rows[i] for i in chosen], np.zeros(len(chosen), np.int64), 0, int(length))
            part = self.runner.run(tokens, positions, self.runner.new_state(len(chosen), longest), None, named)
            if len(chosen) == len(rows):
                return part
            by_token = self.manifest.outputs[0].shape[1:2] in (["T"], ["K"])
            if out is None:
                out = np.zeros((len(rows), *([longest] if by_token else part.shape[1:2]), *part.shape[2:]), np.float32)
            out[chosen, : part.shape[1]] = part
        assert out is not None
        return out

    def new_state(self, batch: int = 1, capacity: int | None = None, *, fetched: Fetched | None = None) -> SessionState:
        """Make the state of ``batch`` sequences that have seen nothing.

        ``capacity`` is how many tokens growing states have room for; None for all that the artifact allows. ``fetched``
        is held with the sequences, and zero where it is not given. Raises ``MemcError``: E208 for an encoder, E206 when
        the artifact allows fewer, E200 for numbers out of range and for a fetched input of another name, type or shape.
        """
        self.require_decoder()
        whole_number("batch", batch)
        if capacity is not None:
            self.require_room(whole_number("capacity", capacity), self.capacity)
        given = fetched_inputs(self.manifest, fetched or {}, batch)
        run = self.runner.new_state(batch, capacity)
        return SessionState(self.runner, run, np.zeros(batch, np.int64), None, self._limit(capacity), given)

    def fetch(self, rows: Sequence[I64]) -> Fetched:
        """Return what sequences that start with these tokens are given beside them: nothing without a bank."""
        return {}

    def prefill(self, ids: Ids, state: SessionState, *, fetched: Fetched | None = None) -> F32:
        """Run the tokens of each row, of any lengths, after what ``state`` has seen; advance it in place.

        What is ``fetched`` takes the place of what the state holds, from here on. Returns the logits ``[B,vocab]`` of
        each row's last token. A row without tokens stays as it is. Raises ``MemcError``: E205 a row has no token and
        has seen none, E206 a row gets past the capacity, E200 another session's state, wrong number of rows, an id
        outside the vocabulary, or a fetched input of another name, type or shape.
        """
        self.require_own(state)
        rows = id_rows(ids, self.manifest, self.folder)
        if len(rows) != state.batch:
            raise MemcError("E200", f"{len(rows)} rows of tokens for a state of {state.batch} sequences")
        sizes = np.array([len(row) for row in rows])
        total = state.lengths + sizes
        if not total.all():
            raise MemcError("E205", f"row {int(total.argmin())} has no tokens")
        reached = int(total[sizes > 0].max(initial=0))
        self.require_room(reached, state.capacity)
        self._tell_beyond_trained(reached)
        state.fetched = {**state.fetched, **fetched_inputs(self.manifest, fetched or {}, state.batch)}
        longest = int(sizes.max())
        for start in range(0, longest, self.chunk):
            stop = min(start + self.chunk, longest)
            tokens, positions = columns(rows, state.lengths, start, stop)
            ending = np.flatnonzero((sizes > start) & (sizes <= stop))
            # Only the columns in which a row ends are wanted; one must be named even when none is.
            keep = np.unique(sizes[ending] - 1 - start) if len(ending) else np.zeros(1, np.int64)
            logits = self.runner.run(tokens, positions, state.run, keep, state.fetched)
            if state.last is None:
                state.last = np.zeros((state.batch, logits.shape[2]), np.float32)
            state.last[ending] = logits[ending, np.searchsorted(keep, sizes[ending] - 1 - start)]
        state.lengths = total
        assert state.last is not None
        return state.last.copy()

    def step(
        self,
        ids: npt.NDArray[np.integer] | Sequence[int],
        state: SessionState,
        *,
        fetched: Fetched | None = None,
    ) -> F32:
        """Run one token of each row, ``ids [B]``, and advance ``state``; -1 leaves a row as it is.

        ``fetched`` and what is raised are as with ``prefill``. Returns the logits ``[B,vocab]`` of each row's last
        token.
        """
        require_list(ids)
        return self.prefill([[] if number == -1 else [number] for number in ids], state, fetched=fetched)

    @overload
    def generate(
        self,
        prompt: str | list[int] | Conversation,
        *,
        state: SessionState | None = None,
        fetched: Fetched | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]] | list[Conversation],
        *,
        state: SessionState | None = None,
        fetched: Fetched | None = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Generation]: ...

    def generate(
        self,
        prompt: str | list[int] | Conversation | list[str] | list[list[int]] | list[Conversation],
        *,
        state: SessionState | None = None,
        fetched: Fetched | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation | list[Generation]:
        """Continue a prompt, or each of a list of prompts as one batch; the options are in ``GenerateOptions``.

        A prompt is a text, a list of token ids, or with ``chat`` a text of the user or a list of messages. With
        ``state`` the prompts go on from what it has seen and it is advanced in place; the last token drawn is never
        fed to it. ``fetched`` is as with ``prefill``, a row for each prompt. Returns one ``Generation`` for one prompt,
        a list for a list. Raises ``MemcError``: E205 empty prompt, E206 prompt and new tokens past the capacity, E208
        the artifact is an encoder or has no chat template, E308 text without a tokenizer, E200 an option out of range
        or a fetched input that does not fit, E403 logits that are not finite.
        """
        if one_prompt(prompt):
            return generate(self, [prompt], state, options, fetched)[0]
        return generate(self, prompt, state, options, fetched)

    def stream(
        self,
        prompt: str | list[int] | Conversation,
        *,
        state: SessionState | None = None,
        fetched: Fetched | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Iterator[str]:
        """Yield the text that ``generate`` would return, piece by piece as it is drawn. Raises as ``generate`` does."""
        return stream(self, prompt, state, options, fetched)

    def as_transformers(self) -> SessionModel:
        """Return a ``PreTrainedModel`` that runs this session, with ``generate``; needs torch and transformers.

        Raises ``MemcError`` E208 for an encoder.
        """
        from memc.interop import SessionModel

        return SessionModel(self)

    def fork(self, state: SessionState, rows: list[int] | None = None) -> SessionState:
        """Return an independent copy of a state, or of some of its rows, in this order, repeats allowed.

        What is fetched goes with its row. Raises ``MemcError`` E200 for another session's state, and for a row that it
        does not have.
        """
        self.require_own(state)
        chosen = list(range(state.batch)) if rows is None else whole_numbers("rows", rows, 0)
        if not chosen or max(chosen) >= state.batch:
            has = f"give rows from 0 to {state.batch - 1}"
            raise MemcError("E200", f"rows are {chosen}, of a state of {state.batch} sequences", next=has)
        run = state.run.copy() if rows is None else state.run.select(chosen)
        last = None if state.last is None else state.last[chosen]
        rows_of = {name: array[chosen] for name, array in state.fetched.items()}
        fetched = fetched_inputs(self.manifest, rows_of, len(chosen))
        return SessionState(self.runner, run, state.lengths[chosen], last, state.capacity, fetched)

    def save(self, state: SessionState, path: str | Path) -> None:
        """Write a state, and what is fetched, to one safetensors file, with the digest of this artifact.

        The file is whole or not there. Raises ``MemcError``: E502 when it cannot be written, E200 for another session's
        state and what is no path.
        """
        self.require_own(state)
        arrays = {f"state.{name}": array for name, array in state.run.arrays().items()}
        arrays |= {f"fetched.{name}": array for name, array in state.fetched.items()}
        arrays["lengths"] = state.lengths
        if state.last is not None:
            arrays["last"] = state.last
        write_state(path, self.manifest, arrays)

    def load_state(self, path: str | Path, capacity: int | None = None) -> SessionState:
        """Read a state that ``save`` wrote, with room for ``capacity`` tokens (None: all that the artifact allows).

        Raises ``MemcError``: E309 when the file is missing or holds no state, E402 when it was changed or another
        artifact made it, E206 when the capacity is less than what it has seen, E200 for what is no path.
        """
        arrays = read_state(path, self.manifest)
        self.require_decoder()
        lengths = arrays["lengths"]
        limit = self._limit(capacity)
        self.require_room(int(lengths.max()), limit)
        held = _below(arrays, "state.")
        fetched = fetched_inputs(self.manifest, _below(arrays, "fetched."), len(lengths))
        run = self.runner.restore(held, capacity)
        return SessionState(self.runner, run, lengths, arrays.get("last"), limit, fetched)

    def beyond_trained(self, tokens: int) -> str:
        """Return the warning of a sequence of so many tokens, empty where the model was trained on as many."""
        trained = self.manifest.trained_positions
        return "" if trained is None or tokens <= trained else beyond_trained(f"{tokens} tokens are", trained)

    def _tell_beyond_trained(self, tokens: int) -> None:
        """Warn Python callers, once a session; commands say it in a line of their own."""
        if not self._told and (warning := self.beyond_trained(tokens)):
            self._told = True
            warnings.warn(warning, stacklevel=3)

    def _limit(self, capacity: int | None) -> int | None:
        """Return the capacity of a state: the room allocated counts only where a state grows."""
        grows = any(state.grows is not None for state in self.manifest.states)
        return capacity if grows and capacity is not None else self.capacity

    def require_own(self, state: SessionState) -> None:
        """Raise ``MemcError`` E200 for what is no state, or one that another session made."""
        if not isinstance(state, SessionState):
            hint = "give what new_state, fork or load_state returned"
            raise MemcError("E200", f"state is {short(state)}", str(self.folder), hint)
        if state.runner is not self.runner:
            hint = "to go on here, save it there and load_state it here"
            raise MemcError("E200", "the state is another session's", str(self.folder), hint)

    def require_decoder(self) -> None:
        """Raise ``MemcError`` E208 when the artifact is an encoder, which has no next token."""
        if not self.manifest.decoder:
            hint = "use Session.logits from Python"
            raise MemcError("E208", f"{self.manifest.family} is no decoder: it cannot generate", str(self.folder), hint)

    def require_room(self, tokens: int, capacity: int | None) -> None:
        """Raise ``MemcError`` E206 for more tokens of a row than there is room for; None is no limit."""
        if capacity is not None and tokens > capacity:
            hint = f"memc convert MODEL -o OUT --context {tokens}, or a shorter input"
            raise MemcError("E206", f"{tokens} tokens are past the capacity of {capacity}", str(self.folder), hint)


def _below(arrays: Mapping[str, npt.NDArray[Any]], prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
