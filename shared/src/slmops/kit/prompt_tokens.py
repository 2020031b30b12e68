"""Tokens of prompts with onnxruntime-genai's tokenizer, as transformers makes them, for the optimizer and the gateway.

Left alone, the runtime's tokenizer adds no special token, while transformers begins a text with the BOS token if
`tokenizer.json` says so. Without it, models such as Gemma answer nonsense. A chat template writes its own BOS.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

TEXT_PREFIX = "slmops_text_prefix"
"""A field that the optimizer adds to a package's `tokenizer_config.json`: what transformers puts before a text that
does not begin with it, but not before the text of a template."""

_WHOLE_TOOLS = "{# tool.function #}"
"""Put before a template when there are tools. Without these words, as in Llama 3's, the runtime shortens the tools: it
drops enums and required parameters, for example."""


class PromptTokenizer:
    """The tokenizer of the package in `folder`. `tokenizer` is an `onnxruntime_genai.Tokenizer`.

    Not for two threads at once: the runtime's tokenizer keeps the options of the last call.
    """

    def __init__(self, tokenizer: Any, folder: Path) -> None:
        self._tokenizer = tokenizer
        configuration = folder / "tokenizer_config.json"
        configured = json.loads(configuration.read_bytes()) if configuration.exists() else {}
        self._prefix = str(configured.get(TEXT_PREFIX, ""))
        stored = folder / "chat_template.jinja"
        template = stored.read_text(encoding="utf-8") if stored.exists() else configured.get("chat_template")
        self._with_tools = {"template_str": _WHOLE_TOOLS + template} if isinstance(template, str) else {}

    def text(self, text: str) -> list[int]:
        """Returns the tokens of a text, like transformers' `tokenizer(text)`."""
        needs_prefix = text and not text.startswith(self._prefix)
        return self._encode(self._prefix + text if needs_prefix else text, special=True)

    def chat(self, messages: Sequence[Mapping[str, object]]) -> list[int]:
        """Returns the tokens of messages and of the beginning of the answer, like transformers' `apply_chat_template`.

        Raises `RuntimeError` if the model has no chat template, or if it rejects the messages.
        """
        return self.part(self.render(messages))

    def render(self, messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]] = ()) -> str:
        """Returns the text of messages and of the beginning of the answer. Raises `RuntimeError` like `chat`.

        `tools`: functions in OpenAI's form, which the template shows to the model if it knows tools.
        """
        given = json.dumps(messages, ensure_ascii=False)
        offered = {"tools": json.dumps(tools, ensure_ascii=False), **self._with_tools} if tools else {}
        return str(self._tokenizer.apply_chat_template(given, add_generation_prompt=True, **offered))

    def part(self, text: str) -> list[int]:
        """Returns the tokens of a part of a prompt, without any that stand only at its beginning."""
        return self._encode(text, special=False)

    def _encode(self, text: str, *, special: bool) -> list[int]:
        self._tokenizer.update_options(add_special_tokens=str(special).lower())
        tokens: Iterable[int] = self._tokenizer.encode(text)
        return [int(token) for token in tokens]
