"""Reads GGUF v2 and v3 files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

`gguf.GGUFReader` is not used for headers: it takes seconds for a vocabulary and does not check that the file contains
everything that its header describes.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops.contracts.errors import InvalidModel, NotAModel, TruncatedModel, UnsupportedArchitecture
from slmops.kit.modelfile.facts import Facts, ModelFacts, Shape, check_positions, damaged, hub_ids, supported
from slmops.kit.modelfile.rope import check_scaling

ARCHITECTURES = frozenset({"llama", "qwen2", "qwen3", "gemma3", "phi3"})
"""Values of `general.architecture` that the optimizer can read and build."""

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
_PAGES = ("general.repo_url", "general.source.repo_url")
"""Keys with the page of the model that the file was converted from."""

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9

_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA_NORMS = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI = {name: _NAMES[name] for name in ("attn_norm", "attn_output", "ffn_norm", "ffn_down")}
_LAYER: Mapping[str, Mapping[str, str]] = {
    "llama": _NAMES,
    "qwen2": _NAMES,
    "qwen3": _NAMES | _QK_NORMS,
    "gemma3": _NAMES | _QK_NORMS | _GEMMA_NORMS,
    "phi3": _PHI | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
}
"""The matrices and norms of a layer: GGUF name → Hugging Face name."""
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ROPE_FREQS = "rope_freqs.weight"
"""Llama 3's scaled angles. The optimizer computes them from the configuration."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's place in the file, and its `ggml_type`. `shape` is in GGUF order: the contiguous dimension first."""

    name: str
    shape: Shape
    offset: int
    size_bytes: int
    kind: int


def gguf_facts(path: Path) -> Facts:
    """Returns the facts of a GGUF file. Raises `NotAModel`, `TruncatedModel`, `UnsupportedArchitecture`,
    `InvalidModel`."""
    metadata, tensors = read_gguf(path)
    architecture = supported(metadata.get("general.architecture"), ARCHITECTURES, path)
    _check_whole(metadata, path)
    check_scaling(hf_architecture(architecture), rope_scaling(architecture, metadata), path)
    check_positions(metadata.get(f"{architecture}.context_length"), path)
    shapes = _shapes(architecture, metadata, tensors, path)
    facts = ModelFacts(architecture, sum(math.prod(t.shape) for t in tensors), path.stat().st_size, "gguf")
    pages = (str(metadata.get(key, "")) for key in _PAGES)
    names = hub_ids(page.removeprefix("https://huggingface.co/") for page in pages)
    return Facts(facts, shapes, classes=frozenset({_CLASSES[architecture]}), names=frozenset(names))


def _check_whole(metadata: Mapping[str, Any], path: Path) -> None:
    if metadata.get("general.type", "model") != "model":
        raise damaged(
            f"the file's type is {metadata['general.type']!r}, not 'model'",
            path,
            "Give the model file. Adapters must be in PEFT's format.",
        )
    if metadata.get("split.count", 0) not in (0, 1):
        raise damaged(
            f"the file is one of {metadata['split.count']} parts", path, "Join them: llama-gguf-split --merge."
        )
    if "tokenizer.ggml.tokens" not in metadata:
        raise damaged("the file has no tokenizer", path, "Convert the model again with its vocabulary.")


def rope_scaling(architecture: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the kind of a file's rotary scaling and its factor, as in `rope_parameters` of a config.json."""
    kind = metadata.get(f"{architecture}.rope.scaling.type", "none")
    factor = metadata.get(f"{architecture}.rope.scaling.factor", metadata.get(f"{architecture}.rope.scale_linear"))
    if kind == "none" and f"{architecture}.rope.scale_linear" in metadata:  # files from before 2024
        kind = "linear"
    if kind in ("none", "linear") and factor in (None, 0, 1):
        return {"rope_type": "default"}
    return {"rope_type": "default" if kind == "none" else kind, "factor": factor}


def hf_architecture(architecture: str) -> str:
    """Returns the `model_type` of config.json for a `general.architecture`."""
    return "gemma3_text" if architecture == "gemma3" else architecture


def hf_names(architecture: str, layers: int) -> dict[str, str]:
    """Returns the tensors of a model: GGUF name → Hugging Face name. All are required except `output.weight`."""
    known = {f"{short}.weight": f"{long}.weight" for short, long in _OUTSIDE.items()}
    for layer in range(layers):
        for short, long in _LAYER[architecture].items():
            known[f"blk.{layer}.{short}.weight"] = f"model.layers.{layer}.{long}.weight"
        if architecture == "qwen2":
            for x in "qkv":
                known[f"blk.{layer}.attn_{x}.bias"] = f"model.layers.{layer}.self_attn.{x}_proj.bias"
    return known


def _shapes(
    architecture: str, metadata: Mapping[str, Any], tensors: Sequence[GgufTensor], path: Path
) -> dict[str, Shape]:
    """Returns the shapes. Checks that every tensor belongs to the architecture and no layer misses a tensor."""
    layers, width = (metadata.get(f"{architecture}.{key}") for key in ("block_count", "embedding_length"))
    if not isinstance(layers, int) or not isinstance(width, int):
        raise damaged(f"the header has block_count = {layers!r}, embedding_length = {width!r}", path)
    present = {tensor.name: tensor.shape for tensor in tensors}
    if layers > len(present):
        raise damaged(f"the header names {layers:,} layers, but the file has {len(present)} tensors", path)
    known = hf_names(architecture, layers)
    if missing := [name for name in known if name.startswith("blk.") and name not in present]:
        raise damaged(f"tensor {missing[0]!r} and {len(missing) - 1} others are missing", path)
    if strange := sorted(present.keys() - known.keys() - {ROPE_FREQS}):
        raise UnsupportedArchitecture(
            f"tensor {strange[0]!r} is not part of a known {architecture} model",
            where=str(path),
            fix="Give the model's Hugging Face directory, or another model.",
        )
    embedding = present.get("token_embd.weight", (0, 0))
    if embedding[0] != width:
        raise damaged(f"the file has no embedding with {width} values per token", path)
    if (tokens := metadata["tokenizer.ggml.tokens"]) > math.prod(embedding[1:]):
        raise damaged(
            f"the tokenizer has {tokens:,} tokens, but the embedding has {math.prod(embedding[1:]):,} rows", path
        )
    return {known[name]: tuple(reversed(shape)) for name, shape in present.items() if name in known}


def read_gguf(path: Path) -> tuple[dict[str, Any], list[GgufTensor]]:
    """Returns the metadata (arrays as their length) and the tensor table with offsets from the start of the file.

    Raises `NotAModel`, `TruncatedModel`, `InvalidModel`.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise NotAModel(
                "the path is neither a GGUF file nor a Hugging Face directory",
                where=str(path),
                fix="Give a .gguf file, or a directory with config.json, tokenizer.json and *.safetensors.",
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(data, path).read()


class _Header:
    """A cursor over the header that never reads past the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.position = data, path, 4

    def read(self) -> tuple[dict[str, Any], list[GgufTensor]]:
        version = self.scalar("<I")
        if version in (2 << 24, 3 << 24):
            raise damaged(
                "the file is big-endian, and only little-endian GGUF files can be read",
                self.path,
                "Convert it: gguf-convert-endian FILE little.",
            )
        if version not in (2, 3):
            raise damaged(f"GGUF version {version} is not supported", self.path, "Convert it to version 3.")
        tensor_count, metadata_count = self.scalar("<Q"), self.scalar("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(metadata_count):
            key = self.string()
            if key in metadata:
                raise self.invalid(f"the key {key!r} occurs twice")
            metadata[key] = self.value(self.scalar("<I"))
        table = [self.tensor() for _ in range(tensor_count)]
        if len({row[0] for row in table}) < len(table):
            raise self.invalid("two tensors have the same name")
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self.invalid(f"the alignment is {alignment!r}")
        start = -(-self.position // alignment) * alignment
        tensors = [self.placed(start, *row) for row in table]
        self.check_places(tensors, start, alignment)
        return metadata, tensors

    def check_places(self, tensors: Sequence[GgufTensor], start: int, alignment: int) -> None:
        """Checks that every tensor begins at a multiple of the alignment, after the one before it."""
        end, before = start, ""
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            if (tensor.offset - start) % alignment:
                raise self.invalid(f"tensor {tensor.name!r} does not begin at a multiple of {alignment} bytes")
            if tensor.offset < end:
                raise self.invalid(f"tensors {before!r} and {tensor.name!r} overlap")
            end, before = tensor.offset + tensor.size_bytes, tensor.name

    def invalid(self, what: str) -> InvalidModel:
        return damaged(f"the GGUF header is damaged: {what}", self.path, "Download the file again.")

    def skip(self, size_bytes: int) -> int:
        """Advances the cursor and returns the previous position."""
        before, self.position = self.position, self.position + size_bytes
        if self.position > len(self.data):
            raise TruncatedModel(
                f"the file ends inside its header, after {len(self.data):,} bytes",
                where=str(self.path),
                fix="Download the file again.",
            )
        return before

    def scalar(self, form: str) -> Any:
        return struct.unpack_from(form, self.data, self.skip(struct.calcsize(form)))[0]

    def string(self) -> str:
        length = self.scalar("<Q")
        start = self.skip(length)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise self.invalid("a string is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(self.scalar("<I"), self.scalar("<Q"))
        if kind not in _SCALARS:
            raise self.invalid(f"metadata of unknown type {kind}")
        return self.scalar(_SCALARS[kind])

    def array(self, kind: int, length: int) -> int:
        if kind in _SCALARS:
            self.skip(length * struct.calcsize(_SCALARS[kind]))
        elif kind == _STRING:
            for _ in range(length):  # a vocabulary: skipped, not decoded, for speed
                self.skip(self.scalar("<Q"))
        else:
            raise self.invalid(f"an array of type {kind}")
        return length

    def tensor(self) -> tuple[str, Shape, int, int]:
        name, rank = self.string(), self.scalar("<I")
        if not 1 <= rank <= 4:
            raise self.invalid(f"tensor {name!r} has {rank} dimensions")
        return name, tuple(self.scalar("<Q") for _ in range(rank)), self.scalar("<I"), self.scalar("<Q")

    def placed(self, start: int, name: str, shape: Shape, kind: int, offset: int) -> GgufTensor:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # imports numpy, so import it late

        if kind not in set(GGMLQuantizationType):
            raise self.invalid(f"tensor {name!r} is of unknown type {kind}")
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if shape[0] % block:
            raise self.invalid(f"tensor {name!r} has rows of {shape[0]} values in blocks of {block}")
        tensor = GgufTensor(name, shape, start + offset, math.prod(shape) // block * block_bytes, kind)
        if tensor.offset + tensor.size_bytes > len(self.data):
            raise TruncatedModel(
                f"tensor {name!r} ends at byte {tensor.offset + tensor.size_bytes:,}, the file at {len(self.data):,}",
                where=str(self.path),
                fix="Download the file again.",
            )
        return tensor
