"""Makes random models in a second, which every stage of the system accepts as models."""

from __future__ import annotations

import struct
from pathlib import Path

HIDDEN, LAYERS, HEADS, INTERMEDIATE, VOCABULARY = 64, 2, 2, 128, 320
_CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tiny_llama(folder: Path, seed: int = 0) -> Path:
    """Writes a Hugging Face directory: float32 safetensors, byte-level BPE tokenizer, chat template. About 0.4 MB.

    Its answers are random. Another `seed` gives other weights of the same shape. Both bundled recipes pass edge-small.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # spread logits, so that rounding seldom decides which token is first: int4 passes edge-small
        model.model.embed_tokens.weight.mul_(3)
    model.save_pretrained(folder)
    _save_tokenizer(folder)
    return folder


def make_tuned(folder: Path, base: Path) -> Path:
    """Copies the model of `base` as if trained a little: every weight changes by about a fiftieth of its usual size."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.02 * weight.std())
    model.save_pretrained(folder)
    for path in base.iterdir():
        if not (folder / path.name).exists():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3_text", "phi3")
_PARTICULAR = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 32},
    # Six layers, because only every sixth layer has full attention. The windows are shorter than the tests' texts.
    "gemma3_text": {"num_hidden_layers": 6, "head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32},
    "phi3": {"tie_word_embeddings": False, "sliding_window": 16},
}


def make_tiny(folder: Path, architecture: str, seed: int = 0, **settings: object) -> Path:
    """Writes a Hugging Face directory of one of `ARCHITECTURES` with grouped queries and no weight at its initial
    constant."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(seed)
    common = {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "initializer_range": 0.1,
    }
    config = CONFIG_MAPPING[architecture](**(common | _PARTICULAR[architecture] | settings))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # norms and biases, too: a model that ignores them must give other results
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    _save_tokenizer(folder)
    return folder


def _save_tokenizer(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(),
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=_CHAT,
    ).save_pretrained(folder)


def _tokenizer():  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = "the quick brown fox jumps over the lazy dog while a small gateway answers what is the capital of France"
    tokenizer.train_from_iterator([words] * 50, trainer)
    return tokenizer


def make_gguf(path: Path, architecture: str = "llama", rows: int = 400) -> Path:
    """Writes a well-formed GGUF file with a vocabulary and one float32 tensor `token_embd.weight` of `rows` × 8."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    metadata = text("general.architecture") + struct.pack("<I", 8) + text(architecture)
    metadata += text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
    metadata += text(f"{architecture}.block_count") + struct.pack("<II", 4, 0)
    metadata += text(f"{architecture}.embedding_length") + struct.pack("<II", 4, 8)
    metadata += text(f"{architecture}.context_length") + struct.pack("<II", 4, 64)
    table = text("token_embd.weight") + struct.pack("<IQQIQ", 2, 8, rows, 0, 0)
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 5) + metadata + table
    header += bytes(-len(header) % 32)
    path.write_bytes(header + b"".join(struct.pack("<8f", *[row] * 8) for row in range(rows)))
    return path
