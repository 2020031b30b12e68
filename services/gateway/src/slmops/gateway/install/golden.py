"""Golden prompts of an installed package, and how they are asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slmops.contracts.manifest import GOLDEN_PATH, MANIFEST_PATH, Manifest
from slmops.contracts.prompts.golden import GoldenPrompt, parse_golden
from slmops.contracts.prompts.prompt_format import PromptFormat, prompt_format
from slmops.gateway.serving.inference import ChatMessage, InferenceRequest


@dataclass(frozen=True, slots=True)
class GoldenPrompts:
    """The golden prompts of a package. `format` is the one with which the optimizer asked them."""

    prompts: tuple[GoldenPrompt, ...] = ()
    format: PromptFormat = PromptFormat.CHAT

    def request(self, prompt: GoldenPrompt) -> InferenceRequest:
        """Returns the greedy request for one prompt."""
        if self.format is PromptFormat.TEXT:
            return InferenceRequest(prompt=prompt.prompt, max_tokens=prompt.max_tokens, stream=False)
        message = ChatMessage(role="user", content=prompt.prompt)
        return InferenceRequest(messages=(message,), max_tokens=prompt.max_tokens, stream=False)


def read_golden(package: Path) -> GoldenPrompts:
    """Reads the golden prompts of an installed package. Raises `InvalidMessage`."""
    file, manifest = package / GOLDEN_PATH, package / MANIFEST_PATH
    return GoldenPrompts(
        prompts=parse_golden(file.read_text(encoding="utf-8")) if file.exists() else (),
        format=prompt_format(Manifest.decode(manifest.read_bytes()).annotations if manifest.exists() else {}),
    )
