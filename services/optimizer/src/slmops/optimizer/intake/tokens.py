"""Makes the packaged tokenizer return the same tokens as transformers, from text and from messages.

The figures of a variant are measured on tokens by transformers, so they do not show a tokenizer that differs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from slmops.contracts.errors import InvalidModel, OptimizationFailed
from slmops.kit.modelfile import chat_template
from slmops.kit.prompt_tokens import TEXT_PREFIX, PromptTokenizer

Messages = Sequence[Mapping[str, str]]

_TEXTS = (
    "The capital of France is Paris.",
    "the quick brown fox jumps over the lazy dog",
    "  Two  spaces,\ta tab,\n\nan empty line and a trailing space ",
    "I'm sure they'll say that we've seen it, WON'T they?",
    "In 1989, 1234567 of 3.14159 cost $2,500.00 (50%).",
    "def add(a: int, b: int) -> int:\n    return a + b  # sum\n",
    "Ünïcödé: naïve café, Straße, œuvre, Привет мир, γειά σου",
    "你好，世界。こんにちは世界。안녕하세요. שלום مرحبا नमस्ते",
    "emoji 😀👩‍👩‍👧 and signs → ≤ ∑ € ½ №",
    '{"role": "user", "content": [1, 2.5, null, true]}',
)
_QUESTION: Messages = [{"role": "user", "content": "What is the capital of France?"}]
_CONVERSATIONS: Sequence[Messages] = (
    _QUESTION,
    [*_QUESTION, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "  And of Spain?\n"}],
    [{"role": "system", "content": "Answer briefly."}, *_QUESTION],
)


def adapt_tokenizer(hf_dir: Path, exported: Path) -> None:
    """Checks the tokenizer of the genai folder `exported` against that of `hf_dir`, and rewrites it if that helps.

    Raises `InvalidModel` for a chat template that fails, `OptimizationFailed` if the tokens differ.
    """
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(hf_dir, local_files_only=True, trust_remote_code=False)
    expected = list(_expected(reference, hf_dir))
    _drop_empty_template(exported / "tokenizer_config.json")
    difference = _difference(expected, exported)
    if difference is None:
        return
    for _ in _rewritten(exported):
        if _difference(expected, exported) is None:
            return
    raise OptimizationFailed(
        difference,
        where=str(hf_dir),
        fix="The runtime does not support this tokenizer or chat template; report both files.",
    )


def _drop_empty_template(configuration: Path) -> None:
    """Removes a `chat_template` of null, with which the runtime does not load."""
    content = json.loads(configuration.read_bytes())
    if content.get("chat_template", "") is None:
        del content["chat_template"]
        configuration.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


def _rewritten(exported: Path) -> Iterator[None]:
    """Writes the files in one way after the other that suits some kind of tokenizer."""
    paths = exported / "tokenizer.json", exported / "tokenizer_config.json"
    before = [path.read_bytes() for path in paths]
    for rewrite in _REWRITES:
        for path, content in zip(paths, rewrite(*map(json.loads, before)) or (), strict=False):
            path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
        yield


Files = tuple[dict[str, Any], dict[str, Any]]
"""The contents of tokenizer.json and tokenizer_config.json."""


def _by_bytes(model: dict[str, Any], configuration: dict[str, Any]) -> Files | None:
    """The runtime merges across words only for a few classes, although `tokenizer.json` says so for others too."""
    if not model["model"].get("byte_fallback"):
        return None
    return model, configuration | {"tokenizer_class": "GemmaTokenizer"}


def _with_prefix(model: dict[str, Any], configuration: dict[str, Any]) -> Files | None:
    """Llama 2's kind: a word begins with "▁", and so does a text, but not the text after a special token. The runtime
    begins that one with "▁", too. Therefore it gets a tokenizer that never does, and `PromptTokenizer` the prefix."""
    before = model.get("pre_tokenizer") or {}
    if not model["model"].get("byte_fallback") or before.get("type") != "Metaspace" or model.get("normalizer"):
        return None
    mark = before.get("replacement", "▁")
    normalizer = {"type": "Replace", "pattern": {"String": " "}, "content": mark}
    # A decoder that strips the prefix tells the runtime to add it.
    parts = [part for part in (model.get("decoder") or {}).get("decoders", ()) if part["type"] != "Strip"]
    decoder = {"type": "Sequence", "decoders": parts} if parts else model.get("decoder")
    prefix = {} if before.get("prepend_scheme") == "never" else {TEXT_PREFIX: " "}
    return (
        model | {"normalizer": normalizer, "pre_tokenizer": None, "decoder": decoder},
        configuration | {"tokenizer_class": "GemmaTokenizer", "add_prefix_space": False} | prefix,
    )


_REWRITES: Sequence[Callable[[dict[str, Any], dict[str, Any]], Files | None]] = (_by_bytes, _with_prefix)


def _expected(reference: Any, hf_dir: Path) -> Iterator[tuple[str | Messages, list[int]]]:
    """Yields texts, and the conversations that the template accepts, with their tokens by transformers.

    The template must accept a single question, or nobody can ask.
    """
    for text in _TEXTS:
        yield text, list(reference(text)["input_ids"])
    for messages in _CONVERSATIONS if chat_template(hf_dir) is not None else ():
        try:
            found = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except Exception as error:  # whatever the template's own code raises
            if messages is not _QUESTION:
                continue
            raise InvalidModel(
                f"the chat template rejects a question: {type(error).__name__}: {str(error)[:200]}",
                where=str(hf_dir),
                fix="Correct chat_template.jinja, or remove it: then the model is asked without a template.",
            ) from error
        yield messages, list(found["input_ids"])


def _difference(expected: Sequence[tuple[str | Messages, list[int]]], exported: Path) -> str | None:
    """Returns the first difference as a sentence; None if there is none."""
    import onnxruntime_genai as og

    tokenizer = PromptTokenizer(og.Tokenizer(og.Model(str(exported))), exported)
    for given, tokens in expected:
        what = f"the text {given!r}" if isinstance(given, str) else f"a conversation of {len(given)} messages"
        try:
            found = tokenizer.text(given) if isinstance(given, str) else tokenizer.chat(given)
        except RuntimeError as error:
            return f"the runtime makes no tokens of {what}: {str(error)[:200]}"
        if found != tokens:
            start = next((n for n, (a, b) in enumerate(zip(tokens, found, strict=False)) if a != b), 0)
            parts = f"{found[start : start + 5]} instead of {tokens[start : start + 5]}"
            return f"the runtime makes other tokens of {what} than transformers: {parts} from position {start}"
    return None
