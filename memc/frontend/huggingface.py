"""Hugging Face models from their configuration alone: the module with fake parameters, and its natural inputs."""

from __future__ import annotations

import inspect
import json
import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memc.arguments import LARGEST
from memc.artifact import MANIFEST, sha256
from memc.errors import MemcError
from memc.frontend.names import fit
from memc.frontend.source import Captured, refuse_pickled, side_files
from memc.frontend.trace import Port, capture_failure, make_parameters_fake, trace
from memc.prepare import HALF
from memc.program import ModelInfo, Program
from memc.weights import Weights, open_safetensors

TOKENS = Port("tokens", "tokens", torch.int64, ("B", "T"))
POSITIONS = Port("positions", "positions", torch.int64, ("B", "T"))
SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
"""What every model that has it has at least one of, by the names that transformers gives all configurations."""

DECODER_TOKENS = Port("decoder_tokens", "other", torch.int64, ("B", "U"))


def read_config(folder: Path, *, remote_code: bool) -> dict[str, Any]:
    """Read ``config.json`` of a model folder.

    Raises ``MemcError``: E301 when there is none, E302 when it is no JSON object, E304 when it names remote code and
    ``remote_code`` is not set, or when there is none but a pickled checkpoint.
    """
    path = folder / "config.json"
    if not path.is_file():
        refuse_pickled((file.name for file in folder.glob("*")), str(folder))
        raise MemcError("E301", "no config.json in the model's folder", str(folder), "give a Hugging Face model folder")
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        hint = "make the file readable"
        raise MemcError("E302", f"config.json cannot be read: {error.strerror}", str(path), hint) from error
    except (ValueError, RecursionError) as error:
        raise MemcError("E302", f"config.json does not parse: {error}", str(path), "get the model again") from error
    if not isinstance(config, dict):
        raise MemcError("E302", "config.json is not a JSON object", str(path), "get the model again")
    if config.get("auto_map") and not remote_code:
        hint = "read that code, then pass --remote-code; or remove auto_map to use the architecture of transformers"
        raise MemcError("E304", "model wants to run its own Python code (auto_map)", str(path), hint)
    return config


def load_config(folder: Path, *, remote_code: bool) -> Any:
    """Return the transformers configuration object of a folder; raises ``MemcError`` E305 for an unknown one."""
    from transformers import AutoConfig

    raw = read_config(folder, remote_code=remote_code)
    where = str(folder / "config.json")
    try:
        with _unheard():
            return AutoConfig.from_pretrained(folder, trust_remote_code=remote_code, local_files_only=True)
    except (ValueError, KeyError) as error:
        kind = raw.get("model_type")
        hint = "transformers must know the model_type; for other models use python:package.module:factory"
        raise MemcError("E305", f"unknown architecture {kind!r}", where, hint) from error
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise MemcError("E302", f"configuration does not validate: {reason}", where, "correct config.json") from error


@contextmanager
def _unheard() -> Iterator[None]:
    """Have transformers print nothing of its own: what stops it is raised, and told in one line."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def model_class(config: Any, where: str) -> Any:
    """Return the class that a configuration asks for: of its ``architectures``, else by what it says of itself."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    names = getattr(config, "architectures", None) or []
    if names:
        found = getattr(transformers, names[0], None)
        if found is None and not getattr(config, "auto_map", None):
            raise MemcError("E305", f"unknown architecture {names[0]!r}", where, "transformers has no such class")
        if found is not None:
            return found
    kind = config.model_type
    masked = kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if getattr(config, "is_encoder_decoder", False):
        return transformers.AutoModelForSeq2SeqLM
    if kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not masked:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModel


def build(config: Any, where: str, *, dtype: torch.dtype, remote_code: bool = False) -> nn.Module:
    """Build the model that a configuration describes, on SDPA unless the class refuses it, experts as plain ATen.

    Raises ``MemcError``: E305 for an unknown architecture or a configuration that its class does not take, E302 for
    sizes that no model has.
    """
    _check_sizes(config, where)
    cls = model_class(config, where)
    keywords: dict[str, Any] = {"dtype": dtype, "experts_implementation": "batched_mm"}
    if hasattr(cls, "from_config"):
        make = cls.from_config
        keywords["trust_remote_code"] = remote_code
    else:
        make = cls._from_config
    with warnings.catch_warnings(), _unheard():
        warnings.simplefilter("ignore")
        try:
            try:
                module = make(config, attn_implementation="sdpa", **keywords)
            except (ValueError, ImportError):
                module = make(config, attn_implementation="eager", **keywords)
        except Exception as error:
            raise capture_failure(error, where, "correct config.json") from error
    built: nn.Module = module.eval()
    return built


def _check_sizes(config: Any, where: str) -> None:
    """Raise ``MemcError`` E302 for a size below 1, from which transformers may build a model without layers."""
    part = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in SIZES:
        value = getattr(part, name, None)
        if isinstance(value, int) and not 1 <= value <= LARGEST:
            raise MemcError("E302", f"configuration says {name} = {value}", where, "correct config.json")


def build_empty(config: Any, where: str, *, dtype: torch.dtype, remote_code: bool = False) -> nn.Module:
    """Build the model with fake parameters of ``dtype`` on cpu and real buffers; see :func:`build`."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        module: Any = build(config, where, dtype=dtype, remote_code=remote_code)
    module.tie_weights()
    make_parameters_fake(module)
    built: nn.Module = module
    return built


def trace_model(module: nn.Module, info: ModelInfo) -> Program:
    """Trace a Hugging Face module, parameters fake or real, on the inputs that are natural to it."""
    config: Any = module.config
    taken = inspect.signature(module.forward).parameters
    main = getattr(module, "main_input_name", "input_ids")
    constants: dict[str, Any] = {"use_cache": False} if "use_cache" in taken else {}
    decoder = is_decoder(module)
    ports: list[Port] = []
    arguments: list[str | None] = []
    if main == "pixel_values":
        size = config.image_size if isinstance(config.image_size, int | list | tuple) else 224
        height, width = (size, size) if isinstance(size, int) else size
        ports.append(Port("pixel_values", "other", torch.float32, ("B", config.num_channels, height, width)))
        arguments.append("pixel_values")
    elif main == "input_ids":
        ports.append(TOKENS)
        arguments.append("input_ids")
    else:
        hint = "capture it with python:package.module:factory and example inputs"
        raise MemcError("E305", f"{type(module).__name__} takes {main!r} as its main input", info.source, hint)
    if decoder:
        ports.append(POSITIONS)
        arguments.append("position_ids" if "position_ids" in taken else None)
    if getattr(config, "is_encoder_decoder", False):
        ports.append(DECODER_TOKENS)
        arguments.append("decoder_input_ids")
    limit = min((n for n in (info.max_positions, fix_frequencies(module)) if n is not None), default=None)
    return trace(module, ports, arguments, replace(info, decoder=decoder, max_positions=limit), constants=constants)


def fix_frequencies(module: Any) -> int | None:
    """Have rotary embeddings keep the frequencies of short calls; return the tokens up to which they did so anyway.

    ``longrope`` and ``dynamic`` choose them by the last position of a call, so that the pieces of a sequence would be
    rotated in other ways than the whole. None where no embedding does that.
    """
    limits = []
    for part in module.modules():
        kinds = getattr(part, "rope_type", None)
        by_layer = kinds if isinstance(kinds, dict) else {None: kinds}
        for layer, kind in by_layer.items():
            if kind == "longrope":
                scaling = part.config.rope_parameters if layer is None else part.config.rope_parameters[layer]
                limits.append(int(scaling["original_max_position_embeddings"]))
            elif kind is not None and "dynamic" in kind:
                limits.append(int(part.original_max_seq_len))
            else:
                continue
            part.rope_type = "default" if layer is None else {**part.rope_type, layer: "default"}
    return min(limits, default=None)


def is_decoder(module: nn.Module) -> bool:
    """Tell whether a module is a causal language model: its class is what transformers loads as one."""
    from transformers.models.auto import modeling_auto as auto

    config: Any = module.config
    name = type(module).__name__
    causal = name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or name.endswith(("ForCausalLM", "LMHeadModel"))
    masked = config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    return causal and not masked and not getattr(config, "is_encoder_decoder", False)


def model_info(config: Any, source: str, digest: str) -> ModelInfo:
    """Collect what the configuration says and no graph holds."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    limit = limit or getattr(text, "max_seq_len", None)
    limit = None if isinstance(limit, int) and limit < 1 else limit  # how some say that there is none
    return ModelInfo(source, digest, config.model_type, getattr(text, "vocab_size", None), limit)


def capture_folder(
    folder: Path, source: str, *, remote_code: bool, weights: bool, float32_below: float = 0
) -> Captured:
    """Capture a local Hugging Face folder: its configuration, and the header of its checkpoint if ``weights``."""
    if (folder / MANIFEST).is_file():  # whose configuration is that of the model it was made from
        hint = f"give the model that it was made from; memc report {shlex.quote(str(folder))} shows what is in it"
        raise MemcError("E301", "an artifact of memc is no model", str(folder), hint)
    raw = read_config(folder, remote_code=remote_code)
    config = load_config(folder, remote_code=remote_code)
    checkpoint = open_weights(folder) if weights else None
    dtype = checkpoint.main_dtype if checkpoint else (config.dtype or torch.float32)
    module = build_empty(config, source, dtype=dtype, remote_code=remote_code)
    if dtype in HALF and 4 * sum(parameter.numel() for parameter in module.parameters()) < float32_below:
        module = build_empty(config, source, dtype=torch.float32, remote_code=remote_code)
    if checkpoint is not None:
        checkpoint = fit(checkpoint, module)
    digest = checkpoint.digest if checkpoint else sha256(folder / "config.json")
    program = trace_model(module, model_info(config, source, digest))
    return Captured(program, checkpoint, raw, side_files(folder))


def open_weights(folder: Path) -> Weights:
    """Open a folder's safetensors; raises ``MemcError`` E304 for a pickled checkpoint and E301 when there is none."""
    found = open_safetensors(folder)
    if found is not None:
        return found
    refuse_pickled((path.name for path in folder.iterdir()), str(folder))
    raise MemcError("E301", "no *.safetensors in the model's folder", str(folder), "download the weights")
