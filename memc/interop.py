"""Artifacts in other people's tools: a session as a model of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from memc.artifact import MANIFEST
from memc.errors import MemcError
from memc.runtime.session import Session
from memc.runtime.state import SessionState

Array = npt.NDArray[Any]

GENERATION = "generation_config.json"


class SessionConfig(PreTrainedConfig):  # type: ignore[misc]
    """What tools ask a configuration for: sizes of the vocabulary and of the longest sequence."""

    model_type = "memc"


class SessionCache:
    """What a batch of sequences remembers, where transformers keeps keys and values."""

    def __init__(self, session: Session, state: SessionState) -> None:
        """Wrap a session's state."""
        self.session = session
        self.state = state
        self.columns = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many columns of tokens, padding included, have been run."""
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows of a batch in another order, repeats allowed."""
        self.state = self.session.fork(self.state, beam_idx.tolist())


class SessionModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A session as a ``PreTrainedModel``: forward without gradients, and ``generate``, beams included.

    Runs where the session's backend does; tensors come and go on the CPU. It has no parameters, so that it is neither
    trained, nor saved, nor moved. Padding may be anywhere; it needs an ``attention_mask``. What has to take tokens back
    (assisted generation) is refused, since a state of constant size cannot.
    """

    config_class = SessionConfig
    main_input_name = "input_ids"
    _is_stateful = True

    def __init__(self, session: Session) -> None:
        """Wrap a session. Raises ``MemcError`` E208 for an encoder."""
        session.require_decoder()
        manifest = session.manifest
        others = [port.name for port in manifest.inputs if port.role == "other"]
        if others:
            raise MemcError("E208", f"transformers gives no {', '.join(others)}", str(session.folder))
        super().__init__(
            SessionConfig(
                vocab_size=manifest.vocab_size,
                max_position_embeddings=session.capacity or 1 << 20,
                architectures=[type(self).__name__],
                name_or_path=str(session.folder),
            )
        )
        self.loss_type = "ForCausalLM"
        self.session = session
        if (session.folder / GENERATION).is_file():
            self.generation_config = GenerationConfig.from_pretrained(session.folder)

    @property
    def device(self) -> torch.device:
        """Where tensors are taken and returned."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Type of the logits."""
        return torch.float32

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # its state is its own

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Refuse: the artifact is the folder with its ``memc.json``."""
        where = str(self.session.folder / MANIFEST)
        raise MemcError("E208", "an artifact is not saved by transformers", where, "copy its folder, or memc export")

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: SessionCache | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Cut off the columns that the cache has seen."""
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        mask = kwargs.get("attention_mask")
        return {
            "input_ids": input_ids[:, seen:],
            "attention_mask": mask[:, seen:] if mask is not None else None,
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache", True),
            "logits_to_keep": kwargs.get("logits_to_keep", 0),
        }

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: SessionCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run ``input_ids [B,T]`` after what the cache has seen, and return the logits ``[B,K,vocab]``.

        ``attention_mask`` is of these tokens, or of all that were run. ``logits_to_keep`` asks for the last columns
        alone, or for those listed; 0 for all. Raises ``MemcError`` E208 for what it does not take.
        """
        unknown = [name for name in ("inputs_embeds", "position_ids") if kwargs.get(name) is not None]
        if unknown:
            raise MemcError("E208", f"an artifact takes no {unknown[0]}", next="give input_ids and an attention_mask")
        batch, width = input_ids.shape
        cache = past_key_values or SessionCache(self.session, self.session.new_state(batch))
        tokens = np.ascontiguousarray(input_ids.numpy(force=True), np.int64)
        shown = np.ones((batch, width), bool)
        if attention_mask is not None:
            shown = attention_mask[:, -width:].numpy(force=True).astype(bool)
        keep = _kept(logits_to_keep, width)
        logits = torch.from_numpy(self._run(tokens, shown, cache, keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=cache if use_cache is not False else None
        )

    def _run(self, tokens: Array, shown: Array, cache: SessionCache, keep: Array) -> Array:
        """Run tokens that are ``shown [B,T]``, a chunk at a time, and return the logits of the columns to keep."""
        state, chunk, found = cache.state, self.session.chunk, []
        ends = state.lengths[:, None] + shown.cumsum(1)
        self.session.require_room(int(ends.max(initial=0)), state.capacity)
        positions = np.where(shown, ends - 1, -1)
        for start in range(0, tokens.shape[1], chunk):
            part = slice(start, start + chunk)
            wanted = keep[(keep >= start) & (keep < start + chunk)] - start
            columns = wanted if len(wanted) else np.zeros(1, np.int64)  # one must be named even when none is
            logits = self.session.runner.run(
                np.ascontiguousarray(tokens[:, part]),
                np.ascontiguousarray(positions[:, part]),
                state.run,
                columns,
                state.fetched,
            )
            found += [np.array(logits)] if len(wanted) else []
        state.lengths = ends[:, -1].astype(np.int64)
        cache.columns += tokens.shape[1]
        return np.concatenate(found, 1)


def _kept(logits_to_keep: int | Tensor, width: int) -> Array:
    """Return the columns whose logits are asked for."""
    columns = np.arange(width, dtype=np.int64)
    if isinstance(logits_to_keep, Tensor):
        listed: Array = columns[logits_to_keep.numpy(force=True)]
        return listed
    return columns[-logits_to_keep:] if logits_to_keep else columns
