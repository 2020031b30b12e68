"""Reads from a variant's evaluation report how the variant was made. Pure.

The optimizer writes the report. Fields that are not declared here are ignored. Missing facts are left out of the
package.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import InvalidMessage
from slmops.contracts.model import ModelFile
from slmops.contracts.recipe import PassSpec, Recipe

_LICENCES = frozenset({"LICENSE", "LICENCE", "COPYING", "NOTICE"})
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?$", re.DOTALL | re.MULTILINE)
# SPDX spells these names differently from model cards.
_SPDX = {
    name.lower(): name
    for name in (
        *("Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MPL-2.0", "Unlicense", "CC0-1.0"),
        *("CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "CC-BY-NC-ND-4.0"),
    )
}
_MIXED = ("upgraded_share", "matmul_mixed_precision")
"""Parameters of `quantize` and options of `build` that give some weights more bits."""
_MODEL_TYPE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_LICENCE_NAME = re.compile(r"^license:[ \t]*([A-Za-z0-9.+-]{1,64})[ \t]*\r?$", re.MULTILINE)


class Text(BaseModel):
    """A text or a file of questions."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    digest: Digest


class Evidence(BaseModel):
    """The facts of an evaluation report that the documents of a package repeat.

    `reference_files` are the files of the version as it was registered; `tools` maps distributions to their versions.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    recipe: dict[str, JsonValue] = Field(default_factory=dict)
    reference_files: tuple[ModelFile, ...] = ()
    evaluation_text: Text | None = None
    calibration_text: Text | None = None
    tasks: tuple[Text, ...] = ()
    seed: int | None = None
    prompt_format: str | None = Field(default=None, description="How the model is asked; see `PromptFormat`")
    tools: dict[str, str] = Field(default_factory=dict)
    licence: str | None = Field(default=None, exclude=True, description="Licence named by the version's model card")
    family: str | None = Field(default=None, exclude=True, description="`model_type` of the variant's config.json")
    base: Digest | None = Field(default=None, exclude=True, description="Package that an adapter belongs to")

    @classmethod
    def decode(cls, report: bytes) -> Evidence:
        """Parses a report. Raises `InvalidMessage`."""
        try:
            return cls.model_validate_json(report)
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "JSON"
            raise InvalidMessage(f"the evaluation report is invalid at {where}: {first['msg']}") from error

    @property
    def anchored_on(self) -> Digest | None:
        """The digest of the variant whose quantization grids this one uses."""
        try:
            return Recipe.model_validate(self.recipe).anchored_on
        except ValidationError:
            return None

    @property
    def spdx(self) -> str | None:
        """The licence as an SPDX expression: `LicenseRef-NAME` if SPDX does not list it."""
        if not self.licence:
            return None
        return spdx_id(self.licence) or f"LicenseRef-{self.licence.replace('+', '-')}"

    @property
    def precision(self) -> str | None:
        """The type of the weights, such as `int4`; `mixed` if some have more bits. None: the recipe does not say."""
        found = [_precision(step.params) for step in self._passes if step.pass_ in ("quantize", "build")]
        return found[-1] if found else None

    @property
    def _passes(self) -> tuple[PassSpec, ...]:
        try:
            return Recipe.model_validate(self.recipe).passes
        except ValidationError:
            return ()

    @property
    def licences(self) -> tuple[ModelFile, ...]:
        """Licence and notice files of the version and of an adapter's base, sorted by path."""
        found = (file for file in self.reference_files if is_licence(file.path))
        return tuple(sorted(found, key=lambda file: file.path))

    @property
    def card(self) -> ModelFile | None:
        """The version's own model card."""
        return next((file for file in self.reference_files if file.path == "README.md"), None)

    @property
    def texts(self) -> dict[str, Text]:
        """The calibration and evaluation texts and the tasks, by their use."""
        named = {"calibration": self.calibration_text, "evaluation": self.evaluation_text}
        return {use: text for use, text in named.items() if text} | {f"task {task.name}": task for task in self.tasks}


def _precision(params: Mapping[str, JsonValue]) -> str | None:
    options = params.get("options")
    stated = {**params, **options} if isinstance(options, dict) else params
    if any(stated.get(name) for name in _MIXED):
        return "mixed"
    bits, precision = params.get("bits"), params.get("precision")
    return f"int{bits}" if isinstance(bits, int) else precision if isinstance(precision, str) else None


def spdx_id(licence: str) -> str | None:
    """Returns SPDX's spelling of a licence of a model card, such as `Apache-2.0`; None if we do not know it."""
    return _SPDX.get(licence.lower())


def family_of(config: bytes) -> str | None:
    """Returns `model_type` of a Hugging Face `config.json`; None if the file does not have one."""
    try:
        found = json.loads(config)
    except (ValueError, RecursionError):
        return None
    kind = found.get("model_type") if isinstance(found, dict) else None
    return kind if isinstance(kind, str) and _MODEL_TYPE.fullmatch(kind) else None


def licence_name(card: str) -> str | None:
    """Returns the `license` field of a Hugging Face model card's front matter; None if there is no such field."""
    front = _FRONT_MATTER.search(card)
    found = _LICENCE_NAME.search(front[1]) if front else None
    return found[1] if found else None


def is_licence(path: str) -> bool:
    """Returns whether a path is a licence or notice file, such as `LICENSE`, `NOTICE.txt` or `base/COPYING`."""
    return PurePosixPath(path).stem.upper() in _LICENCES
