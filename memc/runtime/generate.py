"""Generation: the loop that draws tokens, row by row of a batch, and what it returns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeGuard

import numpy as np

from memc.arguments import LARGEST_SEED, whole_number, whole_numbers
from memc.errors import MemcError
from memc.plugins import did_you_mean
from memc.runtime.inputs import Fetched, fetched_inputs
from memc.runtime.rows import require_list
from memc.runtime.sampling import Sampler, Sampling
from memc.runtime.text import Text, TextStream

if TYPE_CHECKING:
    from memc.runtime.session import Session
    from memc.runtime.state import SessionState

Conversation = list[dict[str, str]]
"""Messages with ``role`` and ``content``."""

MAX_NEW_TOKENS = 128


class GenerateOptions(TypedDict, total=False):
    """Options of ``Session.generate`` and ``Session.stream``; greedy when nothing is said."""

    max_new_tokens: int
    """Most tokens drawn for each prompt, 128 by default."""
    temperature: float | None
    """0, the default, takes the likeliest token; above, see ``memc.runtime.sampling.Sampling``."""
    top_k: int | None
    top_p: float | None
    seed: int | None
    """Row r of a batch draws with ``seed + r``; None takes a fresh one, which the result names."""
    stop: str | int | Sequence[str | int] | None
    """Texts and token ids that end a row, beside those of the model's generation config."""
    chat: bool
    """Render prompts with the model's chat template."""
    model_defaults: bool
    """Take temperature, top-k and top-p that are not given from the model's generation config."""
    on_text: Callable[[int, str], None] | None
    """Called with the row and each new piece of its text as soon as it is settled."""


@dataclass(frozen=True)
class Timing:
    """Tokens and wall-clock seconds of a whole batch. The first new token of a row comes out of prefill."""

    prefill_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Prompt tokens per second."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds > 0 else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """New tokens per second, drawing included; None when there was nothing to decode."""
        return self.decode_tokens / self.decode_seconds if self.decode_tokens and self.decode_seconds > 0 else None


@dataclass(frozen=True)
class Generation:
    """What was generated for one prompt.

    ``ids`` are all tokens drawn, the one that ended the row included. ``text`` follows on the prompt's text, without
    special tokens and without what ended the row; None when the artifact has no tokenizer. ``timing`` and
    ``state_bytes`` and ``fetched_bytes`` are of the whole batch, ``seed`` of this row.
    """

    text: str | None
    ids: list[int]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    seed: int
    timing: Timing
    state_bytes: int
    fetched_bytes: int


def one_prompt(prompt: Any) -> TypeGuard[str | list[int] | Conversation]:
    """Tell one prompt from a list of them. Raises ``MemcError`` E205 for an empty list, E200 for what is neither."""
    if isinstance(prompt, str):
        return True
    require_list(prompt)
    if len(prompt) == 0:
        raise MemcError("E205", "the prompt is empty", next="give at least one token")
    return isinstance(prompt[0], (int, np.integer, dict))


def generate(
    session: Session,
    prompts: Sequence[Any],
    state: SessionState | None,
    options: GenerateOptions,
    fetched: Fetched | None = None,
) -> list[Generation]:
    """Run the loop to its end; see ``Session.generate``."""
    run = Run(session, prompts, state, options, fetched)
    notify = options.get("on_text")
    for row, piece in run.pieces():
        if notify is not None and piece:
            notify(row, piece)
    return run.results()


def stream(
    session: Session,
    prompt: Any,
    state: SessionState | None,
    options: GenerateOptions,
    fetched: Fetched | None = None,
) -> Iterator[str]:
    """Check everything at once, then return the pieces as they come; see ``Session.stream``."""
    if not one_prompt(prompt):
        raise MemcError("E200", "stream takes one prompt", next="call generate with on_text for several")
    run = Run(session, [prompt], state, options, fetched)
    _ = session.text.tokenizer  # pieces of text need one, whatever the prompt is
    notify = options.get("on_text")

    def pieces() -> Iterator[str]:
        for row, piece in run.pieces():
            if piece:
                if notify is not None:
                    notify(row, piece)
                yield piece

    return pieces()


@dataclass
class _Row:
    """One prompt of the batch, while it is being continued."""

    stream: TextStream | None
    ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish: Literal["stop", "length"] | None = None

    def take(self, token: int, stop_ids: frozenset[int], limit: int) -> str:
        """Note a token that was drawn and return the text that it settles."""
        self.ids.append(token)
        ends = token in stop_ids
        piece = self.stream.push(token) if self.stream is not None and not ends else ""
        if ends or (self.stream is not None and self.stream.stopped):
            self.finish = "stop"
        elif len(self.ids) == limit:
            self.finish = "length"
        if self.finish is not None and self.stream is not None:
            piece += self.stream.finish()
            # What was held back for an incomplete character may end in a stop string after all.
            self.finish = "stop" if self.stream.stopped else self.finish
        self.pieces.append(piece)
        return piece


class Run:
    """One call of ``generate``, for callers that look between two tokens. It is checked whole when it is made."""

    def __init__(
        self,
        session: Session,
        prompts: Sequence[Any],
        state: SessionState | None,
        options: GenerateOptions,
        fetched: Fetched | None = None,
    ) -> None:
        """Check prompts and options and allocate the state; raises as ``Session.generate`` does."""
        session.require_decoder()
        if unknown := sorted(options.keys() - GenerateOptions.__annotations__.keys()):
            hint = did_you_mean(unknown[0], GenerateOptions.__annotations__)
            raise MemcError("E200", f"generate has no option {unknown[0]!r}", next=hint)
        if state is not None:
            session.require_own(state)
        self.session = session
        self.limit = whole_number("max_new_tokens", options.get("max_new_tokens", MAX_NEW_TOKENS))
        sampling = _sampling(session.text, options)
        seed = options.get("seed")
        drawn = int(np.random.SeedSequence().generate_state(1)[0])
        self.seed = drawn if seed is None else whole_number("seed", seed, 0, LARGEST_SEED)
        self.sampler = Sampler(sampling, self.seed, len(prompts))
        stops, stop_ids = _stops(options.get("stop"))
        self.stop_ids = session.text.stop_ids | stop_ids
        fresh = [True] * len(prompts) if state is None else [length == 0 for length in state.lengths.tolist()]
        if len(fresh) != len(prompts):
            raise MemcError("E200", f"{len(prompts)} prompts for a state of {len(fresh)} sequences")
        chat = options.get("chat", False)
        self.prompts = [_ids(session.text, prompt, chat, new) for prompt, new in zip(prompts, fresh, strict=True)]
        self.fetched = fetched_inputs(session.manifest, fetched or {}, len(prompts))
        self.state = self._state(state)
        if stops:
            _ = session.text.tokenizer  # a stop text needs one
        readable = (session.folder / "tokenizer.json").is_file()
        self.rows = [_Row(TextStream(session.text, ids, stops) if readable else None) for ids in self.prompts]
        self.prefill_seconds = self.decode_seconds = 0.0

    def _state(self, state: SessionState | None) -> SessionState:
        """Return the state to run on, with room for the prompts and the new tokens."""
        seen = [0] * len(self.prompts) if state is None else state.lengths.tolist()
        capacity = self.session.capacity if state is None else state.capacity
        prompt, needed = max(
            (n + len(ids), n + len(ids) + self.limit) for n, ids in zip(seen, self.prompts, strict=True)
        )
        if capacity is not None and needed > capacity:
            what = f"prompt of {prompt} tokens and {self.limit} new ones make {needed}, past the capacity of {capacity}"
            hint = f"memc convert MODEL -o OUT --context {needed}, or a shorter prompt, or a smaller --max-new-tokens"
            raise MemcError("E206", what, str(self.session.folder), hint)
        return self.session.new_state(len(self.prompts), needed) if state is None else state

    def pieces(self) -> Iterator[tuple[int, str]]:
        """Run, yielding ``(row, piece of text)`` for every token drawn; a piece that is held back is empty.

        What is not asked for is not run: whoever stops here stops the model.
        """
        began = time.perf_counter()
        logits = self.session.prefill(self.prompts, self.state, fetched=self.fetched)
        self.prefill_seconds = time.perf_counter() - began
        while True:
            began = time.perf_counter()
            drawn = [-1 if r.finish else self.sampler.draw(i, logits[i]) for i, r in enumerate(self.rows)]
            self.decode_seconds += time.perf_counter() - began
            for index, (row, token) in enumerate(zip(self.rows, drawn, strict=True)):
                if token >= 0:
                    yield index, row.take(token, self.stop_ids, self.limit)
            if all(row.finish for row in self.rows):
                return
            began = time.perf_counter()
            fed = [-1 if row.finish else token for row, token in zip(self.rows, drawn, strict=True)]
            logits = self.session.step(fed, self.state)
            self.decode_seconds += time.perf_counter() - began

    def results(self) -> list[Generation]:
        """Return what came of each prompt, after the last piece."""
        timing = Timing(
            sum(map(len, self.prompts)),
            self.prefill_seconds,
            sum(len(row.ids) - 1 for row in self.rows),
            self.decode_seconds,
        )
        return [
            Generation(
                text=None if row.stream is None else "".join(row.pieces),
                ids=row.ids,
                finish_reason=row.finish or "length",
                prompt_tokens=len(prompt),
                seed=self.seed + index,
                timing=timing,
                state_bytes=self.state.bytes,
                fetched_bytes=self.state.fetched_bytes,
            )
            for index, (row, prompt) in enumerate(zip(self.rows, self.prompts, strict=True))
        ]


def _sampling(text: Text, options: GenerateOptions) -> Sampling:
    base = text.defaults if options.get("model_defaults", False) else Sampling()
    temperature, top_k, top_p = options.get("temperature"), options.get("top_k"), options.get("top_p")
    return Sampling(
        base.temperature if temperature is None else temperature,
        base.top_k if top_k is None else top_k,
        base.top_p if top_p is None else top_p,
    )


def _stops(stop: str | int | Sequence[str | int] | None) -> tuple[list[str], frozenset[int]]:
    single = isinstance(stop, str) or not isinstance(stop, Iterable)
    several: list[Any] = [] if stop is None else [stop] if single else list(stop)  # type: ignore[arg-type]
    texts = [one for one in several if isinstance(one, str)]
    if "" in texts:
        raise MemcError("E200", "a stop text is empty", next="leave it out")
    return texts, frozenset(whole_numbers("stop", [one for one in several if not isinstance(one, str)], 0))


def _ids(text: Text, prompt: Any, chat: bool, fresh: bool) -> list[int]:
    """Return the token ids of one prompt; a text that goes on from an earlier one gets no starting tokens."""
    if not isinstance(prompt, str):
        require_list(prompt)
    if len(prompt) == 0:
        raise MemcError("E205", "the prompt is empty", next="give at least one token")
    if isinstance(prompt, str):
        if not chat:
            ids = text.encode(prompt, special=fresh)
        else:
            ids = text.encode(text.chat([{"role": "user", "content": prompt}]), special=False)
    elif isinstance(prompt[0], dict):
        if not chat:
            raise MemcError("E200", "messages need the chat template", next="give chat=True")
        ids = text.encode(text.chat(prompt), special=False)
    else:
        if chat:
            raise MemcError("E200", "chat takes a text or messages, not token ids", next="leave out chat")
        ids = whole_numbers("prompt", prompt, 0)
    if not ids:
        raise MemcError("E205", "the prompt has no tokens", next="give a prompt that the tokenizer knows")
    return ids
