"""How a model is asked. Chosen when a version is read, and written in the manifest, so that all ask in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

PROMPT_FORMAT = "io.slmops.prompt-format"
"""The annotation of a package's manifest."""


class PromptFormat(StrEnum):
    """Chat: messages in the model's chat template. Text: the prompt itself, because the model has no chat template."""

    CHAT = "chat"
    TEXT = "text"


def prompt_format(annotations: Mapping[str, str]) -> PromptFormat:
    """Returns the format that a manifest names. Packages from before the annotation were asked with messages, and so
    are those with a format that this release does not know."""
    return PromptFormat.TEXT if annotations.get(PROMPT_FORMAT) == PromptFormat.TEXT else PromptFormat.CHAT
