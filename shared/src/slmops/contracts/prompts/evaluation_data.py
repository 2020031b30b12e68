"""Own texts and tasks of an evaluation: files that replace the bundled ones, and their check. Pure.

The same check runs in the console before anything is uploaded and in the service that takes the files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from slmops.contracts.errors import InvalidMessage
from slmops.contracts.model import ModelFile, collision, files_digest
from slmops.contracts.prompts.tasks import check_task
from slmops.contracts.prompts.texts import MAX_OVERLAP, decoded, grams, overlap, texts_in

FILES_LIMIT: Final = 64
FILE_LIMIT_BYTES: Final = 4 << 20
TOTAL_LIMIT_BYTES: Final = 16 << 20
QUESTIONS_LIMIT: Final = 1000
"""Of all tasks together: each question is asked of every variant."""
LEAST_EVALUATION_BYTES: Final = 256
"""A token has at least one byte, and an evaluation needs a window of 256 tokens."""
_NAMED: Final = {"texts": "evaluation text", "calibration": "calibration text", "tasks": "task"}


class EvaluationData(BaseModel):
    """Own texts and tasks. Each file is a blob, and its path is `texts/`, `calibration/` or `tasks/` and its name.

    Files of one kind replace the bundled ones of that kind. A kind without files means the bundled ones.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    texts: tuple[ModelFile, ...] = Field(default=(), description="Evaluation texts: fidelity is measured on them")
    calibration_texts: tuple[ModelFile, ...] = Field(default=(), description="Texts on which passes are calibrated")
    tasks: tuple[ModelFile, ...] = Field(default=(), description="Files of questions, one task each")

    @property
    def files(self) -> tuple[ModelFile, ...]:
        return (*self.texts, *self.calibration_texts, *self.tasks)

    @property
    def identity(self) -> str:
        """A digest of all files with their paths; empty without files."""
        return files_digest(self.files) if self.files else ""

    def replaced_by(self, other: EvaluationData | None) -> EvaluationData:
        """Returns the files of `other` for each kind that it has, and these for the rest."""
        fields = {name: value for name in type(self).model_fields if (value := getattr(other, name, ()))}
        return self.model_copy(update=fields)


def check_sizes(data: EvaluationData) -> None:
    """Checks number, sizes and names of the files before anybody reads them. Raises `InvalidMessage`."""
    files = data.files
    if len(files) > FILES_LIMIT:
        raise InvalidMessage(f"{len(files)} texts and tasks are given, {FILES_LIMIT} are allowed", fix="Join some.")
    for file in files:
        if file.size_bytes > FILE_LIMIT_BYTES:
            raise InvalidMessage(
                f"the file has {file.size_bytes} bytes, {FILE_LIMIT_BYTES} are allowed",
                where=file.path,
                fix="Use an excerpt: an evaluation reads about 1,500 tokens of it, a calibration about 260,000.",
            )
    if (total := sum(file.size_bytes for file in files)) > TOTAL_LIMIT_BYTES:
        raise InvalidMessage(
            f"texts and tasks have {total} bytes together, {TOTAL_LIMIT_BYTES} are allowed", fix="Use excerpts."
        )
    for kind, folder in (("texts", "texts"), ("calibration_texts", "calibration"), ("tasks", "tasks")):
        for file in getattr(data, kind):
            if PurePosixPath(file.path).parent.as_posix() != folder:
                raise InvalidMessage(f"the path of a {_NAMED[folder]} is not in {folder}/", where=file.path)
    _check_names(data)


def _check_names(data: EvaluationData) -> None:
    if both := collision(file.path for file in data.files):
        raise InvalidMessage(f"two files have the name {both[0]}", where=both[1], fix="Rename one of them.")
    names = [PurePosixPath(file.path).stem for file in data.tasks]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidMessage(f"several task files have the name {doubled[0]!r}", fix="Rename one of them.")


def check_data(data: EvaluationData, contents: Mapping[str, bytes]) -> None:
    """Checks everything that can be checked without a model; `contents` are the bytes of each file by its path.

    Raises `InvalidMessage`, which names file, line and field. Own evaluation and calibration texts must not overlap,
    and no text or question may occur twice.
    """
    check_sizes(data)
    texts = [(where, text) for file in data.texts for where, text in _texts(file.path, contents[file.path])]
    calibration = [
        (where, text) for file in data.calibration_texts for where, text in _texts(file.path, contents[file.path])
    ]
    _check_unique([*texts, *calibration])
    if texts and sum(len(text.encode()) for _, text in texts) < LEAST_EVALUATION_BYTES:
        raise InvalidMessage(
            f"the evaluation texts have fewer than {LEAST_EVALUATION_BYTES} bytes",
            where=texts[0][0],
            fix="Use at least 1,500 words.",
        )
    _check_overlap(texts, calibration)
    questions = 0
    for file in data.tasks:
        content = decoded(file.path, contents[file.path])
        questions += len(check_task(PurePosixPath(file.path).stem, content, file.path).questions)
    if questions > QUESTIONS_LIMIT:
        raise InvalidMessage(
            f"the tasks have {questions} questions, {QUESTIONS_LIMIT} are allowed",
            where=data.tasks[-1].path,
            fix="Use a sample: each question is asked of every variant.",
        )


def _texts(path: str, data: bytes) -> Iterator[tuple[str, str]]:
    """Yields each text with its place."""
    found = texts_in(path, data)
    lines = [number for number, line in enumerate(data.split(b"\n"), 1) if line.strip()] if len(found) > 1 else []
    for number, text in enumerate(found):
        yield (f"{path} line {lines[number]}" if lines else path), text


def _check_unique(placed: list[tuple[str, str]]) -> None:
    first: dict[str, str] = {}
    for where, text in placed:
        earlier = first.setdefault(text.strip(), where)
        if earlier != where:
            raise InvalidMessage(f"the text is the same as {earlier}", where=where, fix="Give each text once.")


def _check_overlap(texts: list[tuple[str, str]], calibration: list[tuple[str, str]]) -> None:
    """Compares the joined texts, as the optimizer does, and names the pair that shares most."""
    if not texts or not calibration:
        return
    share = overlap("\n\n".join(text for _, text in texts), "\n\n".join(text for _, text in calibration))
    if share <= MAX_OVERLAP:
        return
    seen = {gram: where for where, text in calibration for gram in grams(text)}
    shared = Counter((where, seen[gram]) for where, text in texts for gram in set(grams(text)) if gram in seen)
    most = shared.most_common(1)[0][0] if shared else (texts[0][0], calibration[0][0])
    raise InvalidMessage(
        f"{share:.1%} of the evaluation texts is in the calibration texts, more than {MAX_OVERLAP:.0%}; most of it in "
        f"{most[1]}",
        where=most[0],
        fix="A variant that was calibrated on a text looks better on it than it is: use other calibration texts.",
    )
