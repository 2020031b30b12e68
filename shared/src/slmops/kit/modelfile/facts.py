"""The facts of a model, and functions that read and check its JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from slmops.contracts.errors import InvalidModel, NotAModel, UnsupportedArchitecture

Format = Literal["gguf", "hf", "onnx", "adapter"]
Shape = tuple[int, ...]
MAX_POSITIONS = 1 << 21
T = TypeVar("T")


@dataclass(frozen=True)
class ModelFacts:
    """`size_bytes` is the size of the file, or of all files in the directory; for an adapter it includes the base."""

    architecture: str
    parameters: int
    size_bytes: int
    format: Format


@dataclass(frozen=True)
class Facts:
    """`shapes` of the parameters by Hugging Face's names, [rows, columns]; empty if the model cannot have adapters."""

    model: ModelFacts
    shapes: Mapping[str, Shape]


def supported(architecture: object, known: frozenset[str], where: Path) -> str:
    """Returns `architecture` if it is known. Raises `UnsupportedArchitecture`."""
    if not isinstance(architecture, str) or architecture not in known:
        raise UnsupportedArchitecture(
            f"the architecture {architecture!r} is not supported",
            where=str(where),
            fix="Use a model of one of: " + ", ".join(sorted(known)) + ".",
        )
    return architecture


def damaged(what: str, where: Path, fix: str = "Download the model again.") -> InvalidModel:
    return InvalidModel(what, where=str(where), fix=fix)


def json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises `NotAModel` if the file does not exist, `InvalidModel` if it holds anything else."""
    if not path.is_file():
        raise NotAModel(
            f"the directory has no {path.name}",
            where=str(path.parent),
            fix="Give a .gguf file or a Hugging Face directory.",
        )
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise damaged(f"{path.name} is not JSON", path) from error
    if not isinstance(found, dict):
        raise damaged(f"{path.name} is not a JSON object", path)
    return found


def value(found: Mapping[str, Any], key: str, kind: type[T], where: Path) -> T:
    """Returns the value of `key`. Raises `InvalidModel` if it is absent or of another type."""
    held = found.get(key)
    if not isinstance(held, kind) or isinstance(held, bool):
        raise damaged(f"{where.name} has {key} = {held!r}, not {kind.__name__}", where)
    return held


def check_positions(found: object, where: Path) -> None:
    """Raises `InvalidModel` for a missing or absurd context length, because tables of that length are allocated."""
    if not isinstance(found, int) or isinstance(found, bool) or not 1 <= found <= MAX_POSITIONS:
        raise damaged(f"the context length is {found!r}; allowed are 1 to {MAX_POSITIONS:,}", where)


def check_tokenizer(folder: Path) -> None:
    """Raises `InvalidModel` if `tokenizer.json` or `tokenizer_config.json` is absent or not JSON."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise damaged(
                f"the directory has no {name}",
                folder,
                "Save the tokenizer there: AutoTokenizer.from_pretrained(…).save_pretrained(DIRECTORY).",
            )
        json_object(folder / name)


def inside(folder: Path, name: object) -> Path:
    """Returns the path of a file that another file of `folder` names. Raises `InvalidModel` for a path outside it."""
    if not isinstance(name, str) or not name or Path(name).name != name or "\\" in name:
        raise damaged(f"the model names a file {name!r}, which is not a file name in its folder", folder)
    if not (folder / name).is_file():
        raise damaged(f"the directory has no {name}", folder, "Add the file, or download the model again.")
    return folder / name


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
