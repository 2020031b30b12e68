"""Calls of tools are found in answers of every supported format, however the answer is split into pieces."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from slmops.gateway.serving.inference import ToolCall, ToolFormat
from slmops.gateway.serving.tool_calls import ToolCallParser

HERMES, LLAMA, MISTRAL, V11 = ToolFormat
NAMES = ("weather", "time")


def split(form: ToolFormat, *pieces: str) -> tuple[str, list[tuple[str, Any]]]:
    """Returns the text and the calls with their arguments."""
    parser, text, calls = ToolCallParser(form, NAMES), "", tuple[ToolCall, ...]()
    for piece in pieces:
        shown, found = parser.feed(piece)
        text, calls = text + shown, calls + found
    shown, found = parser.finish()
    return text + shown, [(call.name, json.loads(call.arguments)) for call in calls + found]


ROME = ("weather", {"city": "Rome"})
BODY = '{"name": "weather", "arguments": {"city": "Rome"}}'


@pytest.mark.parametrize(
    ("form", "answer", "text", "calls"),
    [
        (HERMES, f"<tool_call>\n{BODY}\n</tool_call>", "", [ROME]),
        (HERMES, f"Let me see.\n\n<tool_call>{BODY}</tool_call>\n", "Let me see.", [ROME]),
        (HERMES, f"<tool_call>{BODY}</tool_call>\n<tool_call>\n{BODY}\n</tool_call>", "", [ROME, ROME]),
        (HERMES, f"a <tool_call>{BODY}</tool_call> b ", "ab ", [ROME]),
        (HERMES, f"<tool_call>{BODY}", "", [ROME]),  # the model ended its turn
        (HERMES, f"<tool_call>{BODY}</tool_", "", [ROME]),
        (HERMES, '<tool_call>{"arguments": {}, "name": "time"}</tool_call>', "", [("time", {})]),
        (HERMES, '<tool_call>{"name": "time"}</tool_call>', "", [("time", {})]),
        (HERMES, '<tool_call>{"name": "time", "arguments": null}</tool_call>', "", [("time", {})]),
        (
            HERMES,
            '<tool_call>{"name": "time", "arguments": "{\\"zone\\": 1}"}</tool_call>',
            "",
            [("time", {"zone": 1})],
        ),
        (
            HERMES,
            '<tool_call>{"name": "time", "arguments": {"a": "</tool_call> é漢😀\n\\""}}</tool_call>',
            "",
            [("time", {"a": '</tool_call> é漢😀\n"'})],
        ),
        (LLAMA, '{"name": "weather", "parameters": {"city": "Rome"}}', "", [ROME]),
        (LLAMA, f" \n{BODY}", "", [ROME]),
        (LLAMA, f"<|python_tag|>{BODY}; {BODY}", "", [ROME, ROME]),
        (LLAMA, f"I call: <|python_tag|>{BODY}", "I call:", [ROME]),
        (LLAMA, f'{{"type": "function", "function": {BODY}}}', "", [ROME]),
        (LLAMA, f"Like this: {BODY}", f"Like this: {BODY}", []),
        (LLAMA, "{x} is a set", "{x} is a set", []),
        (MISTRAL, f"[TOOL_CALLS] [{BODY}, {BODY}]", "", [ROME, ROME]),
        (MISTRAL, f"Well. [TOOL_CALLS]{BODY}", "Well.", [ROME]),
        (MISTRAL, "[1] a list", "[1] a list", []),
        (V11, '[TOOL_CALLS]weather[ARGS]{"city": "Rome"}[TOOL_CALLS]time[ARGS]{}', "", [ROME, ("time", {})]),
        (V11, '[TOOL_CALLS]weather[CALL_ID]abc123XYZ[ARGS]{"city": "Rome"}', "", [ROME]),
        (V11, 'Hm.[TOOL_CALLS]weather{"city": "Rome"}', "Hm.", [ROME]),
    ],
)
def test_a_call_is_found_and_the_rest_is_text(form: ToolFormat, answer: str, text: str, calls: list[Any]) -> None:
    assert split(form, answer) == (text, calls)


WRONG = [
    *("{", "{}", '{"name": "weather"', '{"name": "weather", "arguments": {"city": }}', "[]", "x", "", "{}}"),
    *('{"name": "delete_everything", "arguments": {}}', '{"name": ["weather"], "arguments": {}}', '{"name": 1}'),
    *('{"name": "weather", "arguments": [1]}', '{"name": "weather", "arguments": "no json"}', '"weather"', "null"),
    *('{"name": "weather", "arguments": {"n": NaN}}', '{"name": "weather", "arguments": {"n": 1e}}'),
    *('{"a":' * 50_000, '{"name": "weather", "arguments": {"n": ' + "1" * 5000 + "}}", '{"function": 3}'),
]


@pytest.mark.parametrize("body", WRONG, ids=lambda body: body[:40])
@pytest.mark.parametrize("form", ToolFormat)
def test_what_is_no_call_of_an_offered_tool_stays_text(form: ToolFormat, body: str) -> None:
    around = {HERMES: ("<tool_call>", "</tool_call>"), LLAMA: ("<|python_tag|>", "")}
    before, after = around.get(form, ("[TOOL_CALLS]", ""))
    assert split(form, f"a{before}{body}{after}") == (f"a{before}{body}{after}", [])
    if form is V11:
        assert split(form, f"[TOOL_CALLS]weather[ARGS]{body}x")[0] in (f"[TOOL_CALLS]weather[ARGS]{body}x", "x", "}x")


def test_a_call_follows_a_malformed_one() -> None:
    bad = '<tool_call>{"name": weather}</tool_call>'
    assert split(HERMES, f"{bad}\n<tool_call>{BODY}</tool_call>") == (bad, [ROME])


def test_half_of_a_surrogate_pair_can_be_sent() -> None:
    """It is valid as an escape in JSON, but has no UTF-8: the process that wrote it as such would end."""
    parser = ToolCallParser(HERMES, NAMES)
    _, [call] = parser.feed('<tool_call>{"name": "time", "arguments": {"a": "\\ud83d"}}</tool_call>')
    assert call.arguments.encode() == b'{"a": "\\ud83d"}'


def test_text_is_shown_as_soon_as_it_cannot_be_a_call() -> None:
    for form in (HERMES, MISTRAL):
        parser, marker = ToolCallParser(form, NAMES), {HERMES: "<tool_call>", MISTRAL: "[TOOL_CALLS]"}[form]
        assert parser.feed("Hello ") == ("Hello", ())
        assert parser.feed("you" + marker[:3]) == (" you", ())
        assert parser.feed("!") == (marker[:3] + "!", ())
    parser = ToolCallParser(LLAMA, NAMES)
    assert parser.feed("  ") == ("", ())
    assert parser.feed("Hello {") == ("  Hello {", ())


PIECES = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<tool", "_call>", "</", "<", "[TOOL_CALLS]", "[TOOL", "[ARGS]", "[CALL_ID]"),
        *("<|python_tag|>", "<|py", "weather", "time", BODY, '{"name": "time"}', '{"name": "x"}', "{", "}", "[", "]"),
        *(",", ";", '"', "\\", " ", "\n", "é", "text", '"name": "weather"', '"parameters": {"city": "</tool_call>"}'),
    ]
)


@pytest.mark.parametrize("form", ToolFormat)
@given(pieces=st.lists(PIECES, max_size=12), cuts=st.lists(st.integers(0, 200), max_size=12))
@example(pieces=["<tool_call>", BODY, "</tool_call>"] * 2, cuts=list(range(0, 200, 7)))
@example(pieces=["<|python_tag|>", BODY, ";", " ", BODY, "\n", "text"], cuts=[3, 60, 66, 67, 68])
def test_the_result_does_not_depend_on_how_the_answer_is_split(
    form: ToolFormat, pieces: list[str], cuts: list[int]
) -> None:
    answer = "".join(pieces)
    ends = [0, *sorted(cut for cut in cuts if cut < len(answer)), len(answer)]
    whole = split(form, answer)
    assert split(form, *(answer[start:end] for start, end in itertools.pairwise(ends))) == whole
    assert split(form, *answer) == whole
    if not whole[1]:
        assert whole[0] == answer
