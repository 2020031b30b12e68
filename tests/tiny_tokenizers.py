"""Tokenizers of a few hundred tokens, one of each kind that the supported families use."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

BOS, EOS, PAD = range(3)
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_SPECIAL = ["<bos>", "<eos>", "<pad>", "<unk>"]
_WORDS = "the quick brown fox jumps over the lazy dog while a small gateway answers what is the capital of France"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def qwen() -> Tokenizer:
    """Byte-level BPE without BOS, as in Qwen and SmolLM2."""
    return _trained(pre_tokenizers.ByteLevel(add_prefix_space=False))


def llama3() -> Tokenizer:
    """Byte-level BPE; the post-processor adds BOS."""
    split = pre_tokenizers.Split(Regex(_LLAMA3), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _with_bos(_trained(pre_tokenizers.Sequence([split, bytes_only])))


def gemma() -> Tokenizer:
    """BPE over characters with a fallback to bytes; spaces are "▁"; the post-processor adds BOS."""
    tokenizer = Tokenizer(_characters())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _with_bos(tokenizer)


def llama2() -> Tokenizer:
    """As Gemma's, but a text begins with "▁". TinyLlama and Phi-3 have it."""
    tokenizer = gemma()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


FAMILIES: Mapping[str, tuple[str, Callable[[], Tokenizer], str | None]] = {
    "qwen": ("qwen2", qwen, None),
    "llama 3": ("llama", llama3, None),
    "gemma": ("gemma3_text", gemma, "GemmaTokenizer"),
    "gemma saved by another class": ("gemma3_text", gemma, None),
    "llama 2": ("llama", llama2, "LlamaTokenizer"),
    "phi 3": ("phi3", llama2, "LlamaTokenizer"),  # which transformers loads as it is in tokenizer.json
}
"""Family → architecture, tokenizer, and the class that its tokenizer_config.json names."""


def save_tokenizer(
    folder: Path, tokenizer: Tokenizer, kind: str | None = None, template: str | None = TEMPLATE
) -> None:
    """Replaces the tokenizer of a Hugging Face directory."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **named).save_pretrained(folder)
    if kind:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": kind}))
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


def _trained(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=310, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([_WORDS] * 50, trainer)
    return tokenizer


def _characters() -> models.BPE:
    tokens = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz.,'\n"]
    pairs = [("t", "h"), ("th", "e"), ("▁", "the"), ("a", "n"), ("▁", "▁"), ("▁▁", "▁▁"), ("i", "n")]
    tokens += [left + right for left, right in pairs]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return models.BPE(vocabulary, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True)


def _with_bos(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer
