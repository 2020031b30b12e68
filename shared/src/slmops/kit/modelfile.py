"""What a model file or directory says about itself, read without loading a weight.

Formats: GGUF v2 and v3 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) and a Hugging Face directory with
safetensors (https://huggingface.co/docs/safetensors/index#format). GGUF headers are read here, not by
`gguf.GGUFReader`: that takes seconds for a vocabulary, and does not check that the file holds what its header promises.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from slmops.contracts.errors import InvalidModel, NotAModel, TruncatedModel, UnsupportedArchitecture

GGUF_ARCHITECTURES = frozenset({"llama", "qwen2", "qwen3", "gemma3", "phi3"})
"""`general.architecture` of what the optimizer can read and build."""
HF_ARCHITECTURES = frozenset({"llama", "qwen2", "qwen3", "gemma3", "gemma3_text", "phi3"})
"""`model_type` in config.json of the same."""

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_SAFETENSORS_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class ModelFacts:
    """`size_bytes` is the file's, or that of all files in the directory."""

    architecture: str
    parameters: int
    size_bytes: int
    format: Literal["gguf", "hf"]


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's place in the file. `shape` is in GGUF order: the contiguous dimension first."""

    name: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


def inspect(source: Path) -> ModelFacts:
    """Facts of a GGUF file or Hugging Face directory that the optimizer can take; every tensor lies inside its file.

    Raises `NotAModel`, `TruncatedModel`, `UnsupportedArchitecture`, `InvalidModel`.
    """
    if source.is_dir():
        return _inspect_directory(source)
    if not source.is_file():
        raise NotAModel("there is no such file or directory", where=str(source), fix="Check the path.")
    metadata, tensors = read_gguf(source)
    architecture = _supported(str(metadata.get("general.architecture")), GGUF_ARCHITECTURES, source)
    if "tokenizer.ggml.tokens" not in metadata:
        raise InvalidModel(
            "the file holds no tokenizer", where=str(source), fix="Convert the model again with its vocabulary."
        )
    return ModelFacts(architecture, sum(math.prod(t.shape) for t in tensors), source.stat().st_size, "gguf")


def read_gguf(path: Path) -> tuple[dict[str, Any], list[GgufTensor]]:
    """Metadata (an array is given as its length) and the tensor table, offsets from the start of the file.

    Raises `NotAModel`, `TruncatedModel`, `InvalidModel`.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise NotAModel(
                "this is neither a GGUF file nor a Hugging Face directory",
                where=str(path),
                fix="Give a .gguf file, or a directory with config.json, tokenizer.json and *.safetensors.",
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _GgufHeader(data, path).read()


class _GgufHeader:
    """A cursor over the header that never reads past the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.position = data, path, 4

    def read(self) -> tuple[dict[str, Any], list[GgufTensor]]:
        version = self.scalar("<I")
        if version not in (2, 3):
            raise InvalidModel(
                f"GGUF version {version} is not supported", where=str(self.path), fix="Convert it to version 3."
            )
        tensor_count, metadata_count = self.scalar("<Q"), self.scalar("<Q")
        metadata = {}
        for _ in range(metadata_count):
            key = self.string()
            metadata[key] = self.value(self.scalar("<I"))
        table = [self.tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self.invalid(f"its alignment is {alignment!r}")
        start = -(-self.position // alignment) * alignment
        return metadata, [self.placed(start, *row) for row in table]

    def invalid(self, what: str) -> InvalidModel:
        return InvalidModel(f"the GGUF header is damaged: {what}", where=str(self.path), fix="Download the file again.")

    def skip(self, size_bytes: int) -> int:
        """Advance, and give the position before."""
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

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, rank = self.string(), self.scalar("<I")
        if not 1 <= rank <= 4:
            raise self.invalid(f"tensor {name!r} has {rank} dimensions")
        return name, tuple(self.scalar("<Q") for _ in range(rank)), self.scalar("<I"), self.scalar("<Q")

    def placed(self, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # brings numpy: only where it is needed

        if kind not in set(GGMLQuantizationType):
            raise self.invalid(f"tensor {name!r} is of unknown type {kind}")
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        tensor = GgufTensor(name, shape, start + offset, math.prod(shape) // block * block_bytes)
        if tensor.offset + tensor.size_bytes > len(self.data):
            raise TruncatedModel(
                f"tensor {name!r} ends at byte {tensor.offset + tensor.size_bytes:,}, the file at {len(self.data):,}",
                where=str(self.path),
                fix="Download the file again.",
            )
        return tensor


def _inspect_directory(folder: Path) -> ModelFacts:
    config = _json_object(folder / "config.json")
    architecture = _supported(str(config.get("model_type")), HF_ARCHITECTURES, folder)
    for name, fix in (
        ("tokenizer.json", "Save the tokenizer there: AutoTokenizer.from_pretrained(…).save_pretrained(DIRECTORY)."),
        (
            "tokenizer_config.json",
            "Save the tokenizer there: AutoTokenizer.from_pretrained(…).save_pretrained(DIRECTORY).",
        ),
    ):
        if not (folder / name).is_file():
            raise InvalidModel(f"the directory has no {name}", where=str(folder), fix=fix)
    parameters = sum(_safetensors_parameters(path) for path in _weight_files(folder))
    size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return ModelFacts(architecture, parameters, size_bytes, "hf")


def _supported(architecture: str, known: frozenset[str], where: Path) -> str:
    if architecture not in known:
        raise UnsupportedArchitecture(
            f"the architecture {architecture!r} is not supported",
            where=str(where),
            fix="Use a model of one of: " + ", ".join(sorted(known)) + ".",
        )
    return architecture


def _json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise NotAModel(
            f"the directory has no {path.name}",
            where=str(path.parent),
            fix="Give a .gguf file or a Hugging Face directory.",
        )
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise InvalidModel(f"{path.name} is not JSON", where=str(path), fix="Download the model again.") from error
    if not isinstance(found, dict):
        raise InvalidModel(f"{path.name} holds no object", where=str(path), fix="Download the model again.")
    return found


def _weight_files(folder: Path) -> Iterator[Path]:
    index = folder / "model.safetensors.index.json"
    names = sorted(set(_json_object(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise InvalidModel(
                f"the directory has no {name}",
                where=str(folder),
                fix="Only safetensors weights are read: convert or complete it.",
            )
        yield folder / name


def _safetensors_parameters(path: Path) -> int:
    """Number of values, after a check that the file is exactly as long as its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) == 8 and length > _MAX_SAFETENSORS_HEADER:
            raise InvalidModel("this is no safetensors file", where=str(path), fix="Download the model again.")
        header = file.read(length)
    if len(prefix) < 8 or len(header) < length:
        raise TruncatedModel(
            f"the file ends inside its header, after {size:,} bytes", where=str(path), fix="Download it again."
        )
    try:
        tensors = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        end = 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
        parameters: int = sum(math.prod(entry["shape"]) for entry in tensors)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InvalidModel(
            "the safetensors header is damaged", where=str(path), fix="Download the model again."
        ) from error
    if size < end:
        raise TruncatedModel(
            f"the weights end at byte {end:,}, the file at {size:,}", where=str(path), fix="Download it again."
        )
    return parameters
