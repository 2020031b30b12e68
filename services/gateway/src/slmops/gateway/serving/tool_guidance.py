"""Grammars that hold an answer to calls of tools, in the syntax of the runtime (Lark with JSON Schemas, llguidance)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

from slmops.gateway.serving.inference import Tool, ToolFormat, Tools
from slmops.gateway.serving.tool_calls import MARKERS

ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""The only layout of JSON with a schema. Otherwise a small model may fill its answer with spaces."""


def grammar(tools: Tools, form: ToolFormat, control: Mapping[str, int]) -> str | None:
    """Returns the grammar of the answer; None if the model may answer as it likes.

    `control` has the ids of the markers that are control tokens. Only such a token may stand there, never its text.
    """
    if not (tools.required or tools.strict or not tools.parallel):
        return None
    marker = MARKERS[form][0]
    called = [tool for tool in tools.offered if tool.name in tools.callable]
    rules = [_CALLS[form](bool(tools.parallel)), f"one: {' | '.join(f'call_{n}' for n, _ in enumerate(called))}"]
    rules += [f"{name}: {_symbol(text, control)}" for name, text in zip(("open", "close"), MARKERS[form], strict=False)]
    if form is ToolFormat.MISTRAL_V11:  # some of these models write an id, too
        call_id, arguments = _symbol("[CALL_ID]", control), _symbol("[ARGS]", control)
        rules.append(f"args: ({call_id} /[A-Za-z0-9]{{9}}/)? {arguments}")
    for number, tool in enumerate(called):
        rules += _rules(number, tool, form)
    return "\n".join([_start(tools, form, marker, control), *rules, ""])


def _start(tools: Tools, form: ToolFormat, marker: str, control: Mapping[str, int]) -> str:
    if tools.required:
        return "start: open calls" if form is not ToolFormat.LLAMA else "start: calls"
    if form is ToolFormat.LLAMA:  # an answer that begins like an object is a call
        return "start: FREE? | calls\nFREE: /[^{ \\n\\t](.|\\n)*/"
    free = _without(marker)
    if marker in control:
        return f"start: FREE? (open calls)?\nFREE: {free}"
    # A rule that ends with the marker: a terminal of free text would swallow the marker's beginning.
    return f"start: FREE? | lead calls\nFREE: {free}\nlead[lazy]: /(.|\\n)*{_pattern(marker)}/"


def _without(marker: str) -> str:
    return f"/(.|\\n)*/ & ~/(.|\\n)*{_pattern(marker)}(.|\\n)*/"


def _pattern(text: str) -> str:
    return re.escape(text).replace("/", "\\/")


_CALLS: Mapping[ToolFormat, Callable[[bool], str]] = {
    ToolFormat.HERMES: lambda many: "calls: one close" + (' ("\\n" open one close)*' if many else ""),
    ToolFormat.LLAMA: lambda many: "calls: one",  # its chat template knows one call at a time
    ToolFormat.MISTRAL: lambda many: "calls: / ?\\[/ one" + (' (", " one)*' if many else "") + ' "]"',
    ToolFormat.MISTRAL_V11: lambda many: "calls: one" + (" (open one)*" if many else ""),
}


def _rules(number: int, tool: Tool, form: ToolFormat) -> list[str]:
    schema = f"arguments_{number}: %json {json.dumps({**tool.parameters, 'x-guidance': ONE_LINE})}"
    key = "parameters" if form is ToolFormat.LLAMA else "arguments"
    before = f'{{"name": "{tool.name}", "{key}": '
    if form is ToolFormat.MISTRAL_V11:
        return [f"call_{number}: {_text(tool.name)} args arguments_{number}", schema]
    line = "\n" if form is ToolFormat.HERMES else ""
    return [f"call_{number}: {_text(line + before)} arguments_{number} {_text('}' + line)}", schema]


def _symbol(marker: str, control: Mapping[str, int]) -> str:
    return f"<[{control[marker]}]>" if marker in control else _text(marker)


def _text(text: str) -> str:
    """Returns a terminal for text, whose syntax is that of JSON for names of tools and punctuation."""
    return json.dumps(text)
