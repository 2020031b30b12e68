"""Pushes a model: checks and hashes local files, uploads the missing ones, registers the version.

Registration is the last step and a single command, so an interrupted push never leaves a partial version in a list.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from slmops.console.commands.evaluation_data import OwnData
from slmops.console.commands.uploading import OnProgress, StoreWait, hash_files, upload
from slmops.contracts.commands import BeginUpload, RegisterVersion, VersionView
from slmops.contracts.errors import Denied, InvalidMessage, InvalidModel, NotFound
from slmops.contracts.model import FilePath, collision
from slmops.contracts.names import check_name, check_version
from slmops.contracts.permissions import ANSWER_WITHIN
from slmops.contracts.prompts.golden import GOLDEN_FILE, check_golden
from slmops.kit.bus.client import BusClient
from slmops.kit.modelfile import BASE, ModelFacts, adapter_base, inspect, is_adapter
from slmops.kit.modelfile.listing import check_links
from slmops.kit.tracing import span

# The registry reads all files again to verify them. This is the rate of an object store on a slow disk.
_VERIFIED_BYTES_PER_S = 20_000_000
_HF_SUFFIXES = frozenset({".json", ".safetensors", ".txt", ".model", ".jinja", ".md"})
_HF_NAMES = frozenset({"LICENSE", "NOTICE"})
_ONNX_SUFFIXES = frozenset({".onnx", ".data", ".onnx_data"})
_PATH: TypeAdapter[str] = TypeAdapter(FilePath)


def ignore_progress(step: str, done: int, of: int) -> None:
    """Does nothing."""


async def push(
    client: BusClient,
    path: Path,
    name: str,
    version: str,
    golden: Path | None = None,
    on_progress: OnProgress = ignore_progress,
    base: Path | None = None,
    store: StoreWait | None = None,
    own: OwnData | None = None,
) -> VersionView:
    """Pushes a model in any format that `inspect` knows. Pushing the same files again changes nothing.

    Files that the store already has, such as those of an adapter's base, are not uploaded. Waits for an object store
    that does not answer, and resumes when it does. Raises what `check` raises before the first byte is sent; after that
    `StoreUnreachable`, `Unreachable`, `AlreadyExists`, `DigestMismatch`.
    """
    store = store or StoreWait()
    facts = await asyncio.to_thread(check, path, name, version, golden, base)
    named = named_files(path, base) | ({GOLDEN_FILE: golden} if golden else {})
    named |= own.paths if own else {}
    with span("hash", size_bytes=facts.size_bytes):
        sources = await hash_files(named, on_progress)
    everything = {source.file.path: source.file for source in sources}
    md5 = {source.file.digest: source.md5 for source in sources}
    begin = BeginUpload(model=name, version=version, files=tuple(everything.values()), md5=md5)
    ticket = await store.waited_for(lambda: client.request(begin))
    with span("upload", files=len(ticket.urls)):
        await upload(sources, ticket.urls, on_progress, store, client.verify)
    on_progress("verify", 0, facts.size_bytes)
    prompts = everything.pop(GOLDEN_FILE, None)
    beside = own.paths if own else {}
    registration = RegisterVersion(
        model=name,
        version=version,
        upload=ticket.upload,
        format=facts.format,
        architecture=facts.architecture,
        files=tuple(file for path, file in everything.items() if path not in beside),
        golden=prompts,
        data=own.data if own else None,
    )
    hashing = timedelta(seconds=60 + facts.size_bytes / _VERIFIED_BYTES_PER_S)
    timeout = min(ANSWER_WITHIN, hashing + store.limit)
    return await store.waited_for(lambda: client.request(registration, timeout=timeout))


def check(path: Path, name: str, version: str, golden: Path | None, base: Path | None = None) -> ModelFacts:
    """Checks everything that can be checked without a network.

    Raises `InvalidName`, `InvalidVersion`, `NotFound`, `Denied`, `NotAModel`, `TruncatedModel`,
    `UnsupportedArchitecture`, `InvalidModel`, and `InvalidMessage` with the line of a bad golden prompt.
    """
    check_name(name, "model name")
    check_version(version)
    try:
        for given in (path, base):
            if given and not given.exists():
                raise NotFound("there is no such file or directory", where=str(given), fix="Check the path.")
        if golden:
            _check_golden(golden)
        for given in (path, base):
            if given and given.is_dir():
                check_links(given, _is_part(given))
        facts = inspect(path, base)
        _check_names(named_files(path, base))
        return facts
    except PermissionError as error:
        raise Denied(
            "no permission to read the file", where=str(error.filename), fix="Check its permissions."
        ) from error


def _check_names(paths: Iterable[str]) -> None:
    """Raises `InvalidModel` for file names with control characters, and for two that differ only in case."""
    named = [*paths]
    for path in named:
        try:
            _PATH.validate_python(path)
        except ValidationError as error:
            fix = "Rename the file."
            what = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise InvalidModel(f"a file cannot be in a version: {what}", fix=fix) from error
    if both := collision(named):
        raise InvalidModel(f"{both[0]} and {both[1]} cannot be in one folder everywhere", fix="Rename one of them.")


def _check_golden(path: Path) -> None:
    try:
        prompts = check_golden(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise NotFound("there is no such file", where=str(path), fix="Check the path given to --golden.") from error
    except UnicodeDecodeError as error:
        raise InvalidMessage("the file of golden prompts is not UTF-8 text", where=str(path)) from error
    except InvalidMessage as error:
        where = (error.where or "").replace(GOLDEN_FILE, str(path), 1)
        raise InvalidMessage(error.what, where=where, fix=error.fix) from error
    if not prompts:
        raise InvalidMessage("the file contains no golden prompts", where=str(path), fix="Write one per line.")


def named_files(path: Path, base: Path | None = None) -> dict[str, Path]:
    """Returns the files of a version by their path in it. The files of an adapter's base are under `base/`."""
    found = {file.name: file for file in model_files(path)}
    if is_adapter(path):
        found |= {f"{BASE}/{file.name}": file for file in model_files(base or adapter_base(path))}
    return found


def model_files(path: Path) -> list[Path]:
    """Returns the files of a model: a GGUF file itself; of a directory the configuration, tokenizer, weights, licence.

    ONNX files count as weights only beside a `genai_config.json`, because a Hugging Face directory may contain an ONNX
    export in addition to its own weights.
    """
    if path.is_file():
        return [path]
    is_part = _is_part(path)
    return sorted(file for file in path.iterdir() if file.is_file() and is_part(file))


def _is_part(folder: Path) -> Callable[[Path], bool]:
    suffixes = _HF_SUFFIXES | (_ONNX_SUFFIXES if (folder / "genai_config.json").is_file() else frozenset())
    return lambda file: not file.name.startswith(".") and (file.suffix in suffixes or file.stem in _HF_NAMES)
