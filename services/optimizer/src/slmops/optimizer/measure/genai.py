"""Runs a variant in onnxruntime-genai, the runtime of the gateways: answers and log-likelihoods of texts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slmops.contracts.manifest import ADAPTER_PATH
from slmops.kit.prompt_tokens import PromptTokenizer


class GenaiModel:
    """A genai folder, loaded into this process. Raises the library's errors, which are all `RuntimeError`."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime_genai as og

        self._model = og.Model(str(folder))
        self._adapters = og.Adapters(self._model) if (folder / ADAPTER_PATH).exists() else None
        if self._adapters:
            self._adapters.load(str(folder / ADAPTER_PATH), ADAPTER_PATH)
        self._tokenizer = og.Tokenizer(self._model)
        self._prompts = PromptTokenizer(self._tokenizer, folder)
        configured = json.loads((folder / "genai_config.json").read_bytes())["model"]
        self._context = int(configured["context_length"])
        self._window = int(configured["decoder"].get("sliding_window", {}).get("window_size", 0))
        self._end = frozenset(int(token) for token in self._tokenizer.eos_token_ids)

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, with BOS if the tokenizer adds one."""
        return self._prompts.text(text)

    def chat(self, question: str) -> list[int]:
        """Returns the tokens of a question in the model's chat template."""
        return self._prompts.chat([{"role": "user", "content": question}])

    def tokens(self, prompt: Sequence[int], count: int) -> Iterator[int]:
        """Yields exactly `count` greedy tokens after `prompt`. `min_length` keeps the model from ending earlier."""
        length = len(prompt) + count
        generator = self._start(prompt, length, min_length=length)
        for _ in range(count):
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    def answer(self, prompt: Sequence[int], max_tokens: int) -> Iterator[str]:
        """Yields the greedy answer so far to the tokens `prompt` after each new token, until the model ends it.

        Yields nothing if the prompt does not fit into the context.
        """
        count = min(max_tokens, self._context - len(prompt))
        if not prompt or count <= 0:
            return
        generator, stream = self._start(prompt, len(prompt) + count), self._tokenizer.create_stream()
        text = ""
        for _ in range(count):
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token in self._end:
                return
            text += stream.decode(token)
            yield text

    def log_likelihoods(self, context: str, continuations: Sequence[str]) -> list[float]:
        """Returns the natural log-likelihood of each continuation after `context`; NaN if the model has none.

        The context is processed once: before each continuation the cache is rewound to the end of the context. The last
        token of a continuation is not processed, because nothing follows it.
        """
        start = self.encode(context)
        tails = [self.encode(context + continuation)[len(start) :] for continuation in continuations]
        length = len(start) + max(map(len, tails))
        if not start or not all(tails) or length > self._context:
            return [float("nan")] * len(tails)
        generator = self._start(start, length)
        first = _log_softmax(generator.get_output("logits")[0, -1:])
        scores = []
        for tail in tails:
            log_probs = first
            if len(tail) > 1:
                generator.append_tokens(tail[:-1])
                log_probs = np.concatenate([first, _log_softmax(generator.get_output("logits")[0])])
                generator = self._rewind(generator, start, length)
            scores.append(float(log_probs[np.arange(len(tail)), tail].sum()))
        return scores

    def _start(self, prompt: Sequence[int], length: int, min_length: int = 0) -> Any:
        """Returns a greedy generator that has processed `prompt`, with room for `length` tokens in total."""
        import onnxruntime_genai as og

        params = og.GeneratorParams(self._model)
        capacity = max(length, self._window)  # the runtime fails if the cache is smaller than the sliding window
        params.set_search_options(do_sample=False, min_length=min_length, max_length=capacity)
        generator = og.Generator(self._model, params)
        if self._adapters:
            generator.set_active_adapter(self._adapters, ADAPTER_PATH)
        generator.append_tokens(list(prompt))
        return generator

    def _rewind(self, generator: Any, start: Sequence[int], length: int) -> Any:
        try:
            generator.rewind_to(len(start))
        except RuntimeError:  # the context is longer than a sliding window, which no longer holds its beginning
            return self._start(start, length)
        return generator


def _log_softmax(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Computes log-softmax over the last axis. A NaN makes its whole row NaN."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    found: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found
