"""The sides of ``cpu.py``: each runs in a process of its own and does what it is told, one line of JSON at a time.

A side is asked to ``prefill`` a prompt and then for bursts of decoded tokens, all from that same context.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from memc.machine import peak_rss_bytes


class Side(Protocol):
    """What a side can do; times are of the wall, in seconds."""

    def prefill(self, prompt: list[int], room: int) -> float:
        """Run a prompt from nothing, keep its state and return the seconds; ``room`` tokens will follow it."""

    def burst(self, tokens: int) -> float:
        """Decode some tokens greedily after the prompt and return the seconds of one."""

    @property
    def state_bytes(self) -> int | None:
        """Bytes of the state, where the side tells."""


class Memc:
    """An artifact, through ``Session``; what a burst adds to a constant state stays in it."""

    def __init__(self, folder: str, threads: int) -> None:
        """Load it."""
        from memc.runtime.session import load

        self.session = load(folder, threads=threads)

    def prefill(self, prompt: list[int], room: int) -> float:
        """See ``Side``."""
        self.state = self.session.new_state(1, len(prompt) + room)
        began = time.perf_counter()
        self.logits = self.session.prefill(prompt, self.state)
        return time.perf_counter() - began

    def burst(self, tokens: int) -> float:
        """See ``Side``."""
        began = time.perf_counter()
        for _ in range(tokens):
            self.logits = self.session.step([int(self.logits[0].argmax())], self.state)
        return (time.perf_counter() - began) / tokens

    @property
    def state_bytes(self) -> int:
        """See ``Side``."""
        return self.state.bytes


class LlamaCpp:
    """llama.cpp through ``xllamacpp``'s server, greedy, with the timings that it reports itself."""

    def __init__(self, gguf: str, threads: int, room: int, *, prompt_threads: int | None = None) -> None:
        """Load the file with a context of ``room`` tokens."""
        import xllamacpp

        options = xllamacpp.CommonParams()
        options.model.path = gguf
        options.n_ctx, options.n_parallel, options.n_gpu_layers = room, 1, 0
        options.cpuparams.n_threads, options.cpuparams_batch.n_threads = threads, prompt_threads or threads
        self.server = xllamacpp.Server(options)

    def _complete(self, tokens: int) -> dict[str, float]:
        asked = {"prompt": self.prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": True}
        answer = self.server.handle_completions(asked)
        timings: dict[str, float] = (json.loads(answer) if isinstance(answer, str) else answer)["timings"]
        return timings

    def prefill(self, prompt: list[int], room: int) -> float:
        """See ``Side``."""
        self.prompt = prompt
        return self._complete(1)["prompt_ms"] / 1e3

    def burst(self, tokens: int) -> float:
        """See ``Side``."""
        return self._complete(tokens)["predicted_per_token_ms"] / 1e3

    state_bytes = None


class GenAI:
    """``onnxruntime-genai`` on a folder that its own builder made, greedy."""

    def __init__(self, folder: str, threads: int) -> None:
        """Load it."""
        import onnxruntime_genai

        self.genai = onnxruntime_genai
        config = onnxruntime_genai.Config(folder)
        options = {"session_options": {"intra_op_num_threads": threads, "inter_op_num_threads": 1}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self.model = onnxruntime_genai.Model(config)

    def prefill(self, prompt: list[int], room: int) -> float:
        """See ``Side``."""
        params = self.genai.GeneratorParams(self.model)
        params.set_search_options(max_length=len(prompt) + room, do_sample=False)
        self.generator = self.genai.Generator(self.model, params)
        self.length = len(prompt)
        began = time.perf_counter()
        self.generator.append_tokens(prompt)
        return time.perf_counter() - began

    def burst(self, tokens: int) -> float:
        """See ``Side``."""
        began = time.perf_counter()
        for _ in range(tokens):
            self.generator.generate_next_token()
        seconds = time.perf_counter() - began
        self.generator.rewind_to(self.length)
        return seconds / tokens

    state_bytes = None


class Transformers:
    """``transformers`` in float32, ``generate`` on a ``DynamicCache``."""

    def __init__(self, gguf: str, attention: str, threads: int) -> None:
        """Load the file, dequantised."""
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        path = Path(gguf)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation=attention
        ).eval()

    def prefill(self, prompt: list[int], room: int) -> float:
        """See ``Side``."""
        from transformers import DynamicCache

        self.ids = self.torch.tensor([prompt + prompt[-1:]])
        self.cache = DynamicCache()
        began = time.perf_counter()
        with self.torch.inference_mode():
            self.model(self.ids[:, :-1], past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - began

    def burst(self, tokens: int) -> float:
        """See ``Side``."""
        began = time.perf_counter()
        with self.torch.inference_mode():
            self.model.generate(
                self.ids,
                attention_mask=self.torch.ones_like(self.ids),
                past_key_values=self.cache,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
        seconds = time.perf_counter() - began
        self.cache.crop(self.ids.shape[1] - 1 - self.cache.get_seq_length())
        return seconds / tokens

    @property
    def state_bytes(self) -> int:
        """See ``Side``."""
        return sum(t.nbytes for layer in self.cache.layers for t in (layer.keys, layer.values))


def open_side(kind: str, source: str, threads: int, room: int) -> Side:
    """Load a side: ``memc`` and ``genai`` with a folder, ``llama.cpp``, ``sdpa`` or ``eager`` with a GGUF file."""
    match kind:
        case "memc":
            return Memc(source, threads)
        case "llama.cpp":
            return LlamaCpp(source, threads, room)
        case "genai":
            return GenAI(source, threads)
        case _:
            return Transformers(source, kind, threads)


def main() -> None:
    """Serve requests on stdin until it closes; answers go to what was stdout, anything else to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    kind, source, threads, room = sys.argv[1:]
    began = time.perf_counter()
    side = open_side(kind, source, int(threads), int(room))
    answer: dict[str, Any] = {"load_s": time.perf_counter() - began}
    print(json.dumps(answer), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        cpu = time.process_time()
        match request:
            case {"prefill": prompt, "room": int(more)}:
                answer = {"wall": side.prefill(prompt, more), "cpu": time.process_time() - cpu}
            case {"burst": int(tokens)}:
                answer = {"wall": side.burst(tokens), "cpu": (time.process_time() - cpu) / tokens}
        answer |= {"state_bytes": side.state_bytes, "peak_rss_bytes": peak_rss_bytes()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
