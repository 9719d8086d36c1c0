"""Text in and out of a session: the tokenizer, its special tokens, the chat template, and decoding piece by piece."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, processors

from memc.arguments import short
from memc.errors import MemcError
from memc.runtime.sampling import Sampling

Message = Mapping[str, Any]
"""One message of a conversation: ``role`` and ``content``, and whatever else its template reads."""

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# A text that two tokenizers hardly cut the same way unless they are one.
PROBE = "The quick brown fox, 12345 naïve Übergrößen; def f(x):\n\treturn x ** 2  # 日本語"
"""A text that tokenizers are told apart by."""

WITHOUT_CHAT = "leave out --chat (from Python chat=True; of memc serve ask /v1/completions)"
"""What to do where there is no chat template, or none that works."""

_CONTEXT = 6
_LONGEST = 64
_HELD = 16


class Text:
    """Tokenizer, chat template and generation defaults of an artifact's folder, each read when first needed."""

    def __init__(self, folder: Path) -> None:
        """Note the folder; nothing is read yet."""
        self.folder = folder

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ``MemcError``: E308 without ``tokenizer.json``, E302 when it does not parse."""
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            hint = "give token ids (as data a .npy file), or convert again from a source that has a tokenizer.json"
            raise MemcError("E308", "artifact has no tokenizer.json", str(self.folder), hint)
        try:
            tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises nothing narrower for a malformed file
            raise MemcError("E302", f"tokenizer does not parse: {error}", str(path), "convert again") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._explicit_ends(tokenizer)
        return tokenizer

    def _explicit_ends(self, tokenizer: Tokenizer) -> None:
        """Add the tokens that start and end a text where ``tokenizer_config.json`` asks, as transformers does."""
        if "add_bos_token" not in self.config and "add_eos_token" not in self.config:
            return
        ends: list[tuple[str, int] | None] = []
        for name in ("bos_token", "eos_token"):
            token = self.special.get(name)
            number = tokenizer.token_to_id(token) if token is not None else None
            wanted = self.config.get(f"add_{name}") and token is not None and number is not None
            ends.append((token, number) if wanted and token is not None and number is not None else None)
        start, end = ends
        single = [*([start[0]] if start else []), "$A", *([end[0]] if end else [])]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=list({e[0]: e for e in ends if e}.values())
        )

    @cached_property
    def config(self) -> dict[str, Any]:
        """``tokenizer_config.json``, empty when there is none."""
        return {**self._json("special_tokens_map.json"), **self._json("tokenizer_config.json")}

    @cached_property
    def generation(self) -> dict[str, Any]:
        """``generation_config.json``, empty when there is none."""
        return self._json("generation_config.json")

    @cached_property
    def special(self) -> dict[str, str]:
        """The special tokens by the names that templates use: ``bos_token``, ``eos_token`` and so on."""
        found = {name: self.config.get(name) for name in _SPECIAL}
        contents = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
        return {name: token for name, token in contents.items() if isinstance(token, str)}

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens that decoding leaves out."""
        return frozenset(n for n, token in self.tokenizer.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a text: of ``generation_config.json`` (one or several), else the tokenizer's ``eos_token``."""
        match self.generation.get("eos_token_id"):
            case int(one):
                return frozenset([one])
            case list(several) if all(isinstance(one, int) for one in several):
                return frozenset(several)
            case None:
                pass
            case other:
                where = str(self.folder / "generation_config.json")
                raise MemcError("E302", f"eos_token_id is {short(other)}", where, "write a token id, or a list of them")
        if "eos_token" not in self.special or not (self.folder / "tokenizer.json").is_file():
            return frozenset()
        number = self.tokenizer.token_to_id(self.special["eos_token"])
        return frozenset() if number is None else frozenset([number])

    @property
    def defaults(self) -> Sampling:
        """What ``generation_config.json`` asks of sampling; greedy when it does not say ``do_sample``."""
        config = self.generation
        if not config.get("do_sample"):
            return Sampling()
        temperature, top_k, top_p = (config.get(name) for name in ("temperature", "top_k", "top_p"))
        return Sampling(1.0 if temperature is None else temperature, top_k or None, 1.0 if top_p is None else top_p)

    def require_readable(self) -> None:
        """Read every file that there is, of which none has to be. Raises ``MemcError`` E302 that names one."""
        if (self.folder / "tokenizer.json").is_file():
            self.encode(PROBE)
        _ = self.config, self.stop_ids
        if (self.folder / "chat_template.jinja").is_file():
            self._template()
        try:
            _ = self.defaults
        except MemcError as error:
            where = str(self.folder / "generation_config.json")
            raise MemcError("E302", error.message, where, "correct it, or leave the file out") from error

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the token ids of a text, with the tokens that start and end a text when ``special``.

        Raises ``MemcError`` E200 for what is no text, or bytes that were none.
        """
        try:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special).ids
        except TypeError as error:
            raise MemcError("E200", "text is no UTF-8", repr(text)[:40], "give text in UTF-8") from error
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; special tokens are left out. Raises ``MemcError`` E200 for what is no id."""
        try:
            text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        except (TypeError, OverflowError) as error:
            hint = "give a list of whole numbers from 0 on"
            raise MemcError("E200", f"token ids cannot be decoded: {error}", repr(ids)[:40], hint) from error
        return text

    def cuts_like(self, other: Text) -> bool:
        """Tell whether another tokenizer cuts text the same way, by one text. Raises ``MemcError`` E308 without one."""
        return self.encode(PROBE) == other.encode(PROBE)

    def chat(self, messages: Sequence[Message]) -> str:
        """Render a conversation with the model's chat template, up to where the answer starts.

        The template runs in jinja2's immutable sandbox with what transformers gives it. Raises ``MemcError`` E208 when
        there is no template or it refuses the conversation.
        """
        template, path = self._template()
        try:
            return (
                _environment()
                .from_string(template)
                .render(
                    messages=[dict(message) for message in messages],
                    tools=None,
                    documents=None,
                    add_generation_prompt=True,
                    **self.special,
                )
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise MemcError("E208", f"chat template fails: {error}", path, WITHOUT_CHAT) from error

    def _template(self) -> tuple[str, str]:
        file = self.folder / "chat_template.jinja"
        if file.is_file():
            try:
                return file.read_text(encoding="utf-8"), str(file)
            except UnicodeError as error:
                raise MemcError("E302", "chat template is no UTF-8", str(file), "convert again") from error
        path = str(self.folder / "tokenizer_config.json")
        match self.config.get("chat_template"):
            case str(template):
                return template, path
            case [*several]:
                named = {entry.get("name"): entry.get("template") for entry in several if isinstance(entry, dict)}
                if isinstance(default := named.get("default"), str):
                    return default, path
        raise MemcError("E208", "artifact has no chat template", str(self.folder), WITHOUT_CHAT)

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        if not path.is_file():
            return {}
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise MemcError("E302", f"file does not parse: {error}", str(path), "convert again") from error
        if not isinstance(data, dict):
            raise MemcError("E302", "file holds no JSON object", str(path), "convert again")
        return data


class _Generation(jinja2.ext.Extension):
    """Render ``{% generation %} ... {% endgeneration %}``, which only marks the answer for training, as its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Return the nodes of the body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        # jinja2's own filter escapes HTML, which is not what a model was trained on.
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class TextStream:
    """Decode tokens one by one, so that the pieces joined are the text that follows the prompt.

    A piece is held back while its last character is incomplete (a character may be several tokens) and while it may be
    the beginning of a stop string. The last tokens of the prompt are decoded along with the first new ones: some
    tokenizers drop a leading space at the start of what they decode.
    """

    def __init__(self, text: Text, prompt: Sequence[int], stops: Iterable[str] = ()) -> None:
        """Start after the token ids of a prompt; ``stops`` are texts that end the stream and are left out."""
        self.text = text
        self.stops = tuple(stops)
        self.stopped = False
        self._ids = _context(text, prompt)
        # Tokens before _start are settled; those from _start to _read are out already and serve as context.
        self._start, self._read = 0, len(self._ids)
        self._held = ""

    def push(self, number: int) -> str:
        """Take one more token and return the text that is settled, often one word, sometimes nothing."""
        if self.stopped or number in self.text.special_ids:
            return ""
        self._ids.append(number)
        return self._emit(final=False)

    def finish(self) -> str:
        """Return what was held back; call it once, after the last token."""
        return "" if self.stopped else self._emit(final=True)

    def _emit(self, final: bool) -> str:
        before = self.text.decode(self._ids[self._start : self._read])
        after = self.text.decode(self._ids[self._start :])
        new = after[_shared(before, after) :]
        # No character takes more than a few tokens: past that the bytes are broken, and go out as they are.
        if not final and new.endswith("\ufffd") and len(self._ids) - self._read < _HELD:
            return ""
        if new:
            # A context that ends within a character is no place to start decoding from.
            if not before.endswith("\ufffd") or len(self._ids) - self._start > _LONGEST:
                self._start = self._read
            self._read = len(self._ids)
        return self._cut(self._held + new, final)

    def _cut(self, text: str, final: bool) -> str:
        found = [place for place in (text.find(stop) for stop in self.stops) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if final else max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _context(text: Text, prompt: Sequence[int]) -> list[int]:
    """Return the last few tokens of a prompt, from a place where no character is cut."""
    tail = [number for number in prompt[-2 * _LONGEST :] if number not in text.special_ids][-_LONGEST:]
    for size in range(_CONTEXT, len(tail) + 1):
        if not text.decode(tail[-size:]).startswith("\ufffd"):
            return tail[-size:]
    return tail[-_CONTEXT:]


def _shared(one: str, other: str) -> int:
    """Return the length of the longest common beginning of two texts."""
    if other.startswith(one):
        return len(one)
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that ``stop`` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
