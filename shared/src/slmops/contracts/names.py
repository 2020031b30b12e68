"""The grammar of names. A name is a NATS subject token, a KV key and a path segment: it contains none of `. * > /`."""

from __future__ import annotations

import re
from typing import Annotated, NamedTuple

from pydantic import StringConstraints

from slmops.contracts.errors import InvalidName, InvalidVersion

NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
# Semantic Versioning 2.0.0 without build metadata ("+" is not allowed in an OCI tag).
VERSION_PATTERN = r"^(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z-]+(\.[0-9A-Za-z-]+)*)?$"
PUBLIC_USER_KEY = r"^U[A-Z2-7]{55}$"
"""The public nkey of a NATS user. It is a subject token too."""

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN, max_length=63)]
"""A model, gateway, blueprint, recipe or alias: at most 63 lowercase letters, digits and inner hyphens."""

Version = Annotated[str, StringConstraints(pattern=VERSION_PATTERN, max_length=64)]
"""An immutable version of a model: MAJOR.MINOR.PATCH, optionally `-prerelease`."""


class ModelRef(NamedTuple):
    """`name:version`."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name}:{self.version}"


def check_name(value: str, kind: str = "name") -> str:
    """Returns `value`. Raises `InvalidName`, whose fix lists the allowed characters."""
    if not re.fullmatch(NAME_PATTERN, value):
        raise InvalidName(
            f"{value!r} is not a valid {kind}",
            fix="Use 1 to 63 lowercase letters, digits and inner hyphens, for example 'smollm2'.",
        )
    return value


def check_version(value: str) -> str:
    """Returns `value`. Raises `InvalidVersion`."""
    if not re.fullmatch(VERSION_PATTERN, value) or len(value) > 64:
        raise InvalidVersion(
            f"{value!r} is not a valid version", fix="Use MAJOR.MINOR.PATCH, for example '1.0.0' or '1.1.0-rc.1'."
        )
    return value


def parse_model_ref(text: str) -> ModelRef:
    """Splits `smollm2:1.0.0` into name and version. Raises `InvalidName`, `InvalidVersion`."""
    name, sep, version = text.partition(":")
    if not sep:
        raise InvalidVersion(f"{text!r} has no version", fix="Write NAME:VERSION, for example 'smollm2:1.0.0'.")
    return ModelRef(check_name(name, "model name"), check_version(version))
