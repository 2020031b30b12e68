"""Finds out whether a chat template shows tools to the model, and how its model writes calls: by rendering a call."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256

from slmops.gateway.serving.inference import ToolCall, ToolFormat
from slmops.gateway.serving.tool_calls import ToolCallParser

Render = Callable[[Sequence[Mapping[str, object]], Sequence[Mapping[str, object]]], str]
"""Returns the text of messages and tools. Raises `RuntimeError` if the template rejects them."""

_NAME, _ARGUMENTS = "probe_of_tools", {"probe_argument": "probe value"}
_SCHEMA = {"type": "object", "properties": {"probe_argument": {"type": "string", "description": "A probe."}}}
_TOOL = {"type": "function", "function": {"name": _NAME, "description": "A probe.", "parameters": _SCHEMA}}
_ASKED = {"role": "user", "content": "probe"}
_CALLED = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "probe0001", "type": "function", "function": {"name": _NAME, "arguments": _ARGUMENTS}}],
}
_ANSWERED = {"role": "tool", "name": _NAME, "tool_call_id": "probe0001", "content": "probe"}


def find_format(render: Render) -> ToolFormat | None:
    """Returns the format in which the template writes a call of an earlier answer, which is what the model learned.

    None: the template ignores tools, or writes calls in a format that is not known here.
    """
    try:
        if _NAME not in render([_ASKED], [_TOOL]):
            return None
        asked, written = render([_ASKED], []), render([_ASKED, _CALLED, _ANSWERED], [])
    except RuntimeError:
        return None
    # A call without a marker is one only if the answer begins with it.
    answers: dict[ToolFormat, str] = {form: written for form in ToolFormat if form is not ToolFormat.LLAMA}
    if written.startswith(asked):
        answers[ToolFormat.LLAMA] = written.removeprefix(asked)
    form = next((form for form, answer in answers.items() if _has_call(form, answer)), None)
    by_name = form is ToolFormat.MISTRAL and f'"{_NAME}"' not in written
    return ToolFormat.MISTRAL_V11 if by_name else form


def _has_call(form: ToolFormat, answer: str) -> bool:
    parser = ToolCallParser(form, (_NAME,))
    return ToolCall(_NAME, json.dumps(_ARGUMENTS)) in parser.feed(answer)[1] + parser.finish()[1]


def call_id(form: ToolFormat | None, client_id: str) -> str:
    """Returns the id of a call for the template. Those of Mistral accept only nine letters and digits."""
    short = form in (ToolFormat.MISTRAL, ToolFormat.MISTRAL_V11) and not (len(client_id) == 9 and client_id.isalnum())
    return sha256(client_id.encode()).hexdigest()[:9] if short else client_id
