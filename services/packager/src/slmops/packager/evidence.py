"""What a variant's evaluation report says of its making, as far as a package tells it on. Pure.

The report is the optimizer's own: we take from it what we know, and what it does not say is left out of the package.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import InvalidMessage
from slmops.contracts.model import ModelFile
from slmops.contracts.recipe import Recipe

_LICENCES = frozenset({"LICENSE", "LICENCE", "COPYING", "NOTICE"})
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?$", re.DOTALL | re.MULTILINE)
_LICENCE_NAME = re.compile(r"^license:[ \t]*([A-Za-z0-9.+-]{1,64})[ \t]*\r?$", re.MULTILINE)


class Text(BaseModel):
    """A text or a file of questions."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    digest: Digest


class Evidence(BaseModel):
    """`reference_files` are the version's, as it was registered; `tools` versions by distribution."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    recipe: dict[str, JsonValue] = Field(default_factory=dict)
    reference_files: tuple[ModelFile, ...] = ()
    evaluation_text: Text | None = None
    calibration_text: Text | None = None
    tasks: tuple[Text, ...] = ()
    seed: int | None = None
    tools: dict[str, str] = Field(default_factory=dict)
    licence: str | None = Field(default=None, exclude=True, description="Its name in the version's model card")
    base: Digest | None = Field(default=None, exclude=True, description="Package that an adapter was published beside")

    @classmethod
    def decode(cls, report: bytes) -> Evidence:
        """Raises `InvalidMessage`."""
        try:
            return cls.model_validate_json(report)
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "JSON"
            raise InvalidMessage(f"the evaluation report cannot be read: {where}: {first['msg']}") from error

    @property
    def anchored_on(self) -> Digest | None:
        """The variant on whose grids this one was quantized."""
        try:
            return Recipe.model_validate(self.recipe).anchored_on
        except ValidationError:
            return None

    @property
    def licences(self) -> tuple[ModelFile, ...]:
        """Licence and notice of the version, and of an adapter's base, in the order of their paths."""
        found = (file for file in self.reference_files if is_licence(file.path))
        return tuple(sorted(found, key=lambda file: file.path))

    @property
    def card(self) -> ModelFile | None:
        """The version's own model card."""
        return next((file for file in self.reference_files if file.path == "README.md"), None)

    @property
    def texts(self) -> dict[str, Text]:
        """What it learned from and was measured on, by what it was for."""
        named = {"calibration": self.calibration_text, "evaluation": self.evaluation_text}
        return {use: text for use, text in named.items() if text} | {f"task {task.name}": task for task in self.tasks}


def licence_name(card: str) -> str | None:
    """`license: apache-2.0` of a Hugging Face model card's front matter; None if it names none."""
    front = _FRONT_MATTER.search(card)
    found = _LICENCE_NAME.search(front[1]) if front else None
    return found[1] if found else None


def is_licence(path: str) -> bool:
    """`LICENSE`, `NOTICE.txt`, `base/COPYING` …"""
    return PurePosixPath(path).stem.upper() in _LICENCES
