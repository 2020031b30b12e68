"""The evaluation report of a variant: everything needed to measure it again, stored as a blob."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from slmops.contracts.descriptor import Digest, digest_of
from slmops.contracts.errors import InvalidMessage, NotFound
from slmops.contracts.evaluation import Evaluation
from slmops.contracts.model import ModelFile
from slmops.contracts.prompts.golden import GoldenPrompt, dump_golden
from slmops.contracts.prompts.prompt_format import PromptFormat
from slmops.contracts.prompts.tasks import Task
from slmops.contracts.recipe import Recipe
from slmops.kit.objects.store import digest_of_path
from slmops.optimizer.measure.bootstrap import METHOD
from slmops.optimizer.measure.evaluate import Reference
from slmops.optimizer.measure.texts import Text
from slmops.optimizer.recipes.pipeline import TOOLS


class Source(BaseModel):
    """A text or a task; `digest` is of its bytes. Of own ones `files` are the blobs from which it was read.

    `texts` is the number of texts that were joined, or of the task's questions; `tokens` are those of the whole text.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    digest: Digest
    texts: int | None = None
    tokens: int | None = None
    files: tuple[ModelFile, ...] = ()


class Report(BaseModel):
    """The evaluation of `variant_files`, which `recipe` made from `reference_files`.

    Fidelity was measured on `windows` times `window_tokens` tokens of `evaluation_text`: the first ones of the bundled
    text, evenly spread windows of an own text.
    """

    model_config = ConfigDict(frozen=True)

    recipe: Recipe
    evaluation: Evaluation
    reference_files: tuple[ModelFile, ...]
    """The version as it was registered; the reference was read from these files."""
    variant_files: tuple[ModelFile, ...]
    evaluation_text: Source
    windows: int
    window_tokens: int
    calibration_text: Source | None
    """The text on which its passes may have been calibrated."""
    tasks: tuple[Source, ...]
    golden: Digest | None
    seed: int
    """The random seed of the passes and of the intervals."""
    prompt_format: PromptFormat = PromptFormat.CHAT
    """How the golden prompts were asked, and how gateways must ask them."""
    intervals: str = METHOD
    tools: dict[str, str]
    """The versions of the tools, by distribution."""


def report(
    recipe: Recipe,
    evaluation: Evaluation,
    variant: Path,
    against: Reference,
    *,
    reference_files: Sequence[ModelFile],
    calibration: Text | None,
    tasks: Sequence[Task],
    golden: Sequence[GoldenPrompt],
    seed: int,
    prompt_format: PromptFormat = PromptFormat.CHAT,
) -> Report:
    """Builds a report; reads the folder `variant` to compute digests.

    `tasks`, `golden` and `seed` are those with which `evaluate` was called.
    """
    return Report(
        recipe=recipe,
        evaluation=evaluation,
        reference_files=tuple(reference_files),
        variant_files=files_of(variant),
        evaluation_text=source_of(against.text, tokens=against.text_tokens),
        windows=len(against.tokens),
        window_tokens=against.tokens.shape[1],
        calibration_text=source_of(calibration) if calibration else None,
        tasks=tuple(map(source_of, tasks)),
        golden=digest_of(dump_golden(tuple(golden)).encode()) if golden else None,
        seed=seed,
        prompt_format=prompt_format,
        tools=tool_versions(),
    )


def read_report(path: Path) -> Report:
    """Reads a report. Raises `NotFound` and `InvalidMessage`."""
    try:
        return Report.model_validate_json(path.read_bytes())
    except OSError as error:
        raise NotFound(f"the report cannot be read: {error.strerror}", where=str(path)) from error
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        raise InvalidMessage(
            f"this is not an evaluation report: {'.'.join(map(str, first['loc'])) or 'JSON'}: {first['msg']}",
            where=str(path),
            fix="Use the evaluation.json of a package, or the variant's report.",
        ) from error


def files_of(path: Path) -> tuple[ModelFile, ...]:
    """Returns a file, or all files below a folder, with their digests."""
    base = path.parent if path.is_file() else path
    found = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return tuple(_file(file, base) for file in found)


def tool_versions() -> dict[str, str]:
    return {tool: version(tool) for tool in TOOLS}


def source_of(of: Text | Task, files: Sequence[ModelFile] = (), tokens: int | None = None) -> Source:
    count = of.count if isinstance(of, Text) else len(of.questions)
    return Source(name=of.name, digest=of.digest, texts=count, tokens=tokens, files=tuple(files))


def _file(path: Path, base: Path) -> ModelFile:
    digest, size_bytes = digest_of_path(path)
    return ModelFile(path=path.relative_to(base).as_posix(), digest=digest, size_bytes=size_bytes)
