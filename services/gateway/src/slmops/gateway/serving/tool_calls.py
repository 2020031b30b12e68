"""Finds the calls of tools in an answer, in the formats in which the families of models write them.

The result does not depend on how the answer is split into pieces: a piece of text is decided about only when no further
text could change the decision. Whatever is not a complete call of an offered tool stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from slmops.gateway.serving.inference import ToolCall, ToolFormat

MARKERS: Mapping[ToolFormat, tuple[str, ...]] = {
    ToolFormat.HERMES: ("<tool_call>", "</tool_call>"),
    ToolFormat.LLAMA: ("<|python_tag|>",),
    ToolFormat.MISTRAL: ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    ToolFormat.MISTRAL_V11: ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
}
"""The texts around calls. The first one begins a call. The tokenizer may have a control token for each."""

Text = str
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_SPACE = re.compile(r"\s*")
_BETWEEN = re.compile(r"[\s;]*")
_NAMED = re.compile(r"([\w.-]+)(?:\[CALL_ID\][\w-]*)?(?:\[ARGS\])?\s*")
_ENDS = frozenset("}]>")
"""A piece without any of these characters ends no call."""


@dataclass(frozen=True, slots=True)
class _Read:
    """What a text begins with: calls, or text if there are none. `characters` belong to it."""

    calls: tuple[ToolCall, ...]
    characters: int


_Reader = Callable[[str, Collection[str], bool], _Read | None]
"""Reads the beginning of a text at a possible call: `(text, names of the tools, whether the text is complete)`.
None: only more text decides."""


class ToolCallParser:
    """Splits an answer into text and calls of `names`. White space beside a call is dropped.

    Each piece that could end a call costs an attempt to parse the call so far.
    """

    def __init__(self, form: ToolFormat, names: Collection[str]) -> None:
        self._open, self._names, self._read = MARKERS[form][0], names, _READERS[form]
        self._llama = form is ToolFormat.LLAMA
        self._bare = _SPACE if self._llama else None
        """What may precede a call without a marker here; None: there can be no such call."""
        self._held, self._space = "", ""
        self._in_call = self._after_call = False

    def feed(self, piece: str) -> tuple[Text, tuple[ToolCall, ...]]:
        """Returns the text and the calls that are now final."""
        self._held += piece
        if self._in_call and not _ENDS & set(piece):
            return "", ()
        return self._decide(final=False)

    def finish(self) -> tuple[Text, tuple[ToolCall, ...]]:
        """Returns what is left at the end of the answer."""
        text, calls = self._decide(final=True)
        space, self._space = ("" if self._after_call else self._space), ""
        return text + space, calls

    def _decide(self, *, final: bool) -> tuple[Text, tuple[ToolCall, ...]]:
        text, calls = "", tuple[ToolCall, ...]()
        self._in_call, begins = False, True
        while begins:
            before, begins = self._next_call(final)
            text += self._show(before)
            read = self._read(self._held, self._names, final) if begins else None
            if read is None:
                self._in_call = begins and "{" in self._held
                break
            if read.calls:
                self._end_call(read.characters)
                calls += read.calls
            else:
                text += self._show(read.characters)
        return text, calls

    def _next_call(self, final: bool) -> tuple[int, bool]:
        """Returns how much of the held text certainly precedes the next call, and whether one may begin there."""
        if self._bare:
            before = len(self._bare.match(self._held).group())  # type: ignore[union-attr]
            if before == len(self._held) and not final:
                return 0, False
            if self._held[before : before + 1] == "{":
                if self._after_call:  # what is between calls belongs to neither
                    self._held, before = self._held[before:], 0
                return before, True
        found = self._held.find(self._open)
        if found >= 0:
            return found, True
        return len(self._held) - (0 if final else _overlap(self._held, self._open)), False

    def _show(self, characters: int) -> Text:
        """Takes text from the held one. White space at its end is kept back, because a call may follow."""
        text, self._held = self._space + self._held[:characters], self._held[characters:]
        if self._after_call:
            text = text.lstrip()
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            self._after_call, self._bare = False, None
        return shown

    def _end_call(self, characters: int) -> None:
        self._held, self._space, self._after_call = self._held[characters:], "", True
        self._bare = _BETWEEN if self._llama else None


def _hermes(text: str, names: Collection[str], final: bool) -> _Read | None:
    opened, closed = MARKERS[ToolFormat.HERMES]
    begin = _skip(text, len(opened))
    if begin == len(text):
        return _waits(text, final)
    value, end = _value(text, begin) if text[begin] == "{" else (None, 0)
    if not end:
        return _not_a_call(text, begin, closed, final)
    after = _skip(text, end)
    if text.startswith(closed, after):
        return _Read(_calls([value], names), after + len(closed))
    if closed.startswith(text[after:]):  # perhaps the beginning of the end
        return _Read(_calls([value], names), len(text)) if final else None
    return _Read((), end)


def _not_a_call(text: str, begin: int, closed: str, final: bool) -> _Read | None:
    """Reads up to the first end of a call that is not inside a string."""
    if text[begin] != "{":
        return _Read((), begin)
    for found in re.finditer(re.escape(closed), text[begin:]):
        if '"' not in _STRING.sub("", text[begin : begin + found.start()]):
            return _Read((), begin + found.end())
    return _waits(text, final)


def _llama(text: str, names: Collection[str], final: bool) -> _Read | None:
    [marker] = MARKERS[ToolFormat.LLAMA]
    marked = len(marker) if text.startswith(marker) else 0
    begin = _skip(text, marked)
    if begin == len(text):
        return _waits(text, final)
    value, end = _value(text, begin) if text[begin] == "{" else (None, 0)
    if end:
        return _Read(_calls([value], names), end)
    inside = _skip(text, begin + 1)
    possible = text[begin] == "{" and text[inside : inside + 1] in ("", '"')
    return _waits(text, final) if possible else _Read((), begin + 1)


def _mistral(text: str, names: Collection[str], final: bool) -> _Read | None:
    marker, *others = MARKERS[ToolFormat.MISTRAL]
    begin = _skip(text, len(marker))
    if begin == len(text):
        return _waits(text, final)
    if text[begin] in "[{":
        value, end = _value(text, begin)
        return _Read(_calls(value if text[begin] == "[" else [value], names), end) if end else _waits(text, final)
    named = _NAMED.match(text, begin)
    if named is None:
        return _Read((), begin)
    rest = text[named.end() : named.end() + max(map(len, others))]
    if not rest or any(other.startswith(rest) for other in others):
        return _waits(text, final)
    if rest[0] != "{":
        return _Read((), named.end())
    value, end = _value(text, named.end())
    return _Read(_calls([{"name": named[1], "arguments": value}], names), end) if end else _waits(text, final)


_READERS: Mapping[ToolFormat, _Reader] = {
    ToolFormat.HERMES: _hermes,
    ToolFormat.LLAMA: _llama,
    ToolFormat.MISTRAL: _mistral,
    ToolFormat.MISTRAL_V11: _mistral,
}


def _waits(text: str, final: bool) -> _Read | None:
    """Reads everything as text if nothing follows; otherwise only more text decides."""
    return _Read((), len(text)) if final else None


def _skip(text: str, at: int) -> int:
    """Returns the position of the first character from `at` that is not white space."""
    return at + len(_SPACE.match(text[at:]).group())  # type: ignore[union-attr]


def _overlap(text: str, marker: str) -> int:
    """Returns the length of the longest end of `text` that is the beginning of `marker`, and not all of it."""
    lengths = range(min(len(marker) - 1, len(text)), 0, -1)
    return next((length for length in lengths if marker.startswith(text[-length:])), 0)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


# Models write line breaks in strings as they are.
_DECODER = json.JSONDecoder(strict=False, parse_constant=_no_constant)


def _value(text: str, at: int) -> tuple[Any, int]:
    """Returns the JSON value that begins at `at` and its end; the end is 0 if it is not valid or not complete."""
    try:
        return _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        return None, 0


def _calls(values: Iterable[Any], names: Collection[str]) -> tuple[ToolCall, ...]:
    """Returns the calls; none if one of them is not valid."""
    calls = tuple(map(partial(_call, names=names), values))
    return tuple(call for call in calls if call) if all(calls) else ()


def _call(value: Any, names: Collection[str]) -> ToolCall | None:
    inner = value.get("function", value) if isinstance(value, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(inner, dict) or not isinstance(name, str) or name not in names:
        return None
    arguments = inner.get("arguments", inner.get("parameters")) or {}
    if isinstance(arguments, str):  # a JSON text in a JSON text
        arguments, end = _value(arguments, 0)
        arguments = arguments if end else None
    return ToolCall(name, _json(arguments)) if isinstance(arguments, dict) else None


def _json(arguments: Mapping[str, Any]) -> str:
    text = json.dumps(arguments, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: valid as an escape only
        return json.dumps(arguments)
    return text
