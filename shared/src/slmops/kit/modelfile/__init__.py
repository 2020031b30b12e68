"""Reads facts about a model file or directory without loading weights.

gguf     one GGUF file, in any quantization
hf       a Hugging Face directory: config.json, tokenizer.json, *.safetensors
onnx     an onnxruntime-genai folder: genai_config.json, the graph with its data, tokenizer.json
adapter  a LoRA by PEFT: adapter_config.json, adapter_model.safetensors, and its base model in `base/`
"""

from __future__ import annotations

from pathlib import Path

from slmops.contracts.errors import InvalidModel, NotAModel
from slmops.kit.modelfile.adapter import BASE, adapter_base, adapter_facts, is_adapter
from slmops.kit.modelfile.facts import Facts, Format, ModelFacts, chat_template
from slmops.kit.modelfile.gguf import GgufTensor, gguf_facts, read_gguf
from slmops.kit.modelfile.huggingface import hf_facts
from slmops.kit.modelfile.onnx import onnx_facts

__all__ = [
    "BASE",
    "Format",
    "GgufTensor",
    "ModelFacts",
    "adapter_base",
    "chat_template",
    "inspect",
    "is_adapter",
    "read_gguf",
]


def inspect(source: Path, base: Path | None = None) -> ModelFacts:
    """Returns the facts of a model that the optimizer can read. Checks that its tensors are complete and inside their
    files.

    `base` is the path of an adapter's base if it is not in the adapter's folder. Raises `NotAModel`, `TruncatedModel`,
    `UnsupportedArchitecture`, `InvalidModel`.
    """
    if is_adapter(source):
        base = base or adapter_base(source)
        return adapter_facts(source, base, _facts(base)).model
    if base is not None:
        raise InvalidModel(
            "only an adapter can have a base",
            where=str(source),
            fix="Omit --base, or give the adapter's directory as PEFT saved it.",
        )
    return _facts(source).model


def _facts(source: Path) -> Facts:
    if (source / "genai_config.json").is_file():
        return onnx_facts(source)
    if source.is_dir():
        return hf_facts(source)
    if not source.is_file():
        raise NotAModel("the file or directory does not exist", where=str(source), fix="Check the path.")
    return gguf_facts(source)
