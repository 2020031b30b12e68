"""The facts of a model, and functions that read and check its JSON files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from slmops.contracts.errors import InvalidModel, NotAModel, UnsupportedArchitecture
from slmops.contracts.json_lines import RepeatedKey, loads

Format = Literal["gguf", "hf", "onnx", "adapter"]
Shape = tuple[int, ...]
MAX_POSITIONS = 1 << 21
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
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
    """`shapes` of the parameters by Hugging Face's names, [rows, columns]; empty if the model cannot have adapters.

    `classes` are the model's classes in transformers, `names` its ids on a hub; both may be unknown, then empty.
    """

    model: ModelFacts
    shapes: Mapping[str, Shape]
    classes: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()


_ENCODER_DECODERS = frozenset(
    {"bart", "blenderbot", "encoder-decoder", "led", "longt5", "m2m_100", "marian", "mbart", "mt5", "mvp", "nllb-moe"}
    | {"pegasus", "prophetnet", "switch_transformers", "t5", "t5encoder", "t5gemma", "umt5", "whisper"}
)


def supported(architecture: object, known: frozenset[str], where: Path, *, encoder_decoder: bool = False) -> str:
    """Returns `architecture` if it is known. Raises `UnsupportedArchitecture`."""
    if encoder_decoder or (isinstance(architecture, str) and architecture in _ENCODER_DECODERS):
        raise UnsupportedArchitecture(
            f"{architecture} is an encoder-decoder, and only decoders can be served",
            where=str(where),
            fix="Use a model of one of: " + ", ".join(sorted(known)) + ".",
        )
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
        found = loads(path.read_bytes())
    except RepeatedKey as error:
        raise damaged(f"{path.name} is ambiguous: {error}", path, "Remove one of them.") from error
    except ValueError as error:
        raise damaged(f"{path.name} is not JSON: {str(error)[:100]}", path) from error
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


def check_tokenizer(folder: Path, rows: int | None = None) -> None:
    """Raises `InvalidModel` if `tokenizer.json` or `tokenizer_config.json` is absent or not JSON, or if text or the
    chat template may become a token beyond the `rows` of the embedding."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise damaged(
                f"the directory has no {name}",
                folder,
                "Save the tokenizer there: AutoTokenizer.from_pretrained(…).save_pretrained(DIRECTORY).",
            )
        json_object(folder / name)
    if rows is not None:
        _check_ids(folder, rows)


def _check_ids(folder: Path, rows: int) -> None:
    """An added token that no template mentions, such as Gemma's image token, may lie beyond the embedding: the
    optimizer removes it."""
    tokenizer, template = json_object(folder / "tokenizer.json"), chat_template(folder) or ""
    for token, number in _vocabulary(tokenizer).items():
        if isinstance(number, int) and number >= rows:
            raise _beyond(token, number, rows, folder)
    for added in tokenizer.get("added_tokens") or ():
        number, token = added.get("id", 0), str(added.get("content", ""))
        if isinstance(number, int) and number >= rows and token in template:
            raise _beyond(token, number, rows, folder)


def _vocabulary(tokenizer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the ids by token. Unigram models list their tokens in the order of their ids."""
    found = (tokenizer.get("model") or {}).get("vocab") or {}
    return {str(entry[0]): number for number, entry in enumerate(found)} if isinstance(found, list) else found


def _beyond(token: str, number: int, rows: int, folder: Path) -> InvalidModel:
    return damaged(
        f"the tokenizer has the token {token[:50]!r} with id {number:,}, but the embedding has {rows:,} rows",
        folder / "tokenizer.json",
        "Use the tokenizer that belongs to these weights.",
    )


def chat_template(folder: Path) -> str | None:
    """Returns the chat template of a tokenizer's folder, the default one if there are several; None without one."""
    file, configuration = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    found = json_object(configuration).get("chat_template") if configuration.is_file() else None
    if isinstance(found, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def inside(folder: Path, name: object) -> Path:
    """Returns the path of a file that another file of `folder` names. Raises `InvalidModel` for a path outside it."""
    if not isinstance(name, str) or not name or Path(name).name != name or "\\" in name:
        raise damaged(f"the model names a file {name!r}, which is not a file name in its folder", folder)
    if not (folder / name).is_file():
        raise damaged(f"the directory has no {name}", folder, "Add the file, or download the model again.")
    return folder / name


def hub_ids(found: Iterable[object]) -> list[str]:
    """Returns those that look like the id of a model on a hub, `owner/name`, and not like a path."""
    return [text for text in found if isinstance(text, str) and _HUB_ID.fullmatch(text)]


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
