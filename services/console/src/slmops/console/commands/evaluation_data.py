"""Own texts and tasks of `slmops optimize` and `slmops model push`: reads, checks and uploads the files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from slmops.console.commands.uploading import OnProgress, Source, StoreWait, upload
from slmops.contracts.commands import UploadData
from slmops.contracts.descriptor import digest_of
from slmops.contracts.errors import Denied, InvalidMessage, NotFound
from slmops.contracts.model import ModelFile
from slmops.contracts.prompts.evaluation_data import FILE_LIMIT_BYTES, EvaluationData, check_data
from slmops.kit.bus.client import BusClient

Texts = Annotated[
    list[Path] | None,
    typer.Option(
        "--texts",
        metavar="FILE",
        help='Measure fidelity on your own text: a text file, or a .jsonl file with {"text": …} per line. Repeatable.',
        show_default=False,
    ),
]
CalibrationTexts = Annotated[
    list[Path] | None,
    typer.Option(
        "--calibration-texts",
        metavar="FILE",
        help="Calibrate on your own text, which must not contain the text of --texts. Repeatable.",
        show_default=False,
    ),
]
Tasks = Annotated[
    list[Path] | None,
    typer.Option(
        "--tasks",
        metavar="FILE",
        help='Measure accuracy on your own questions: {"question": …, "choices": […], "answer": 0} or '
        '{"prompt": …, "answer": …} per line. Each file is a task. Repeatable.',
        show_default=False,
    ),
]


@dataclass(frozen=True)
class OwnData:
    """Checked texts and tasks. `paths` are the local files by their path in `data`."""

    data: EvaluationData
    paths: Mapping[str, Path]

    @property
    def sources(self) -> list[Source]:
        return [Source(self.paths[file.path], file) for file in self.data.files]


def read_data(
    texts: Sequence[Path] | None, calibration: Sequence[Path] | None, tasks: Sequence[Path] | None
) -> OwnData | None:
    """Reads and checks the files of the options; None without any.

    Raises `NotFound`, `Denied`, and `InvalidMessage` with file, line and field.
    """
    if not (texts or calibration or tasks):
        return None
    kinds = {"texts": texts, "calibration": calibration, "tasks": tasks}
    placed = [(f"{folder}/{path.name}", path) for folder, given in kinds.items() for path in given or ()]
    named = dict(placed)
    if len(named) < len(placed):
        name = next(name for name, _ in placed if [other for other, _ in placed].count(name) > 1)
        raise InvalidMessage(f"two files have the name {named[name].name}", fix="Rename one of them.")
    contents = {name: _read(path) for name, path in named.items()}
    files = {
        name: ModelFile(path=name, digest=digest_of(content), size_bytes=len(content))
        for name, content in contents.items()
    }
    data = EvaluationData(
        texts=tuple(file for name, file in files.items() if name.startswith("texts/")),
        calibration_texts=tuple(file for name, file in files.items() if name.startswith("calibration/")),
        tasks=tuple(file for name, file in files.items() if name.startswith("tasks/")),
    )
    try:
        check_data(data, contents)
    except InvalidMessage as error:
        raise InvalidMessage(
            _local(error.what, named), where=_local(error.where or "", named), fix=error.fix
        ) from error
    return OwnData(data, named)


async def upload_data(client: BusClient, own: OwnData, on_progress: OnProgress, store: StoreWait) -> str:
    """Uploads the files that the store lacks; returns the upload's id.

    Raises `StoreUnreachable`, `Unreachable`, `DigestMismatch`.
    """
    ticket = await store.waited_for(lambda: client.request(UploadData(files=own.data.files)))
    await upload(own.sources, ticket.urls, on_progress, store, client.verify)
    return ticket.upload


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(FILE_LIMIT_BYTES + 1)  # the check refuses a larger file
    except PermissionError as error:
        raise Denied("no permission to read the file", where=str(path), fix="Check its permissions.") from error
    except OSError as error:
        raise NotFound(f"the file cannot be read: {error.strerror}", where=str(path), fix="Check the path.") from error


def _local(text: str, named: Mapping[str, Path]) -> str:
    """Returns an error's text with local paths."""
    for name, path in named.items():
        text = text.replace(name, str(path))
    return text
