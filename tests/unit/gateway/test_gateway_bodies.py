"""The request bodies of the OpenAI-compatible API: what official clients send is read, what changes nothing is
accepted, and what would change the answer and is not supported is refused by name."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from slmops.gateway.api.chat import ChatRequest
from slmops.gateway.api.refusals import invalid_request
from slmops.gateway.serving.inference import TokenLimits

LIMITS = TokenLimits(context=2048, answer=256)
USER = {"role": "user", "content": "hi"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def parsed(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate_json(json.dumps({"messages": [USER], **fields}))


def refused(**fields: Any) -> dict[str, Any]:
    """The error in the response's body."""
    with pytest.raises(ValidationError) as caught:
        parsed(**fields)
    error: dict[str, Any] = json.loads(bytes(invalid_request(caught.value).body))["error"]
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize(
    "name",
    [
        *("model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "stream"),
        *("stream_options", "n", "tools", "tool_choice", "functions", "function_call", "logprobs", "top_logprobs"),
        *("response_format", "logit_bias", "frequency_penalty", "presence_penalty", "user", "store", "metadata"),
        *("service_tier", "modalities", "audio", "prediction", "reasoning_effort", "parallel_tool_calls"),
        *("safety_identifier", "prompt_cache_key", "verbosity", "web_search_options", "a_field_of_next_year"),
    ],
)
def test_null_is_the_same_as_leaving_a_parameter_out(name: str) -> None:
    assert parsed(**{name: None}).inference(LIMITS) == parsed().inference(LIMITS)


def test_null_within_a_parameter_is_the_same_as_leaving_it_out() -> None:
    assert not parsed(stream_options={"include_usage": None}).include_usage


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1},
        {"tools": [], "tool_choice": "none"},
        {"functions": [], "function_call": "auto"},
        {"logprobs": False, "top_logprobs": 0},
        {"logit_bias": {}},
        {"frequency_penalty": 0.0, "presence_penalty": 0},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"], "store": False, "reasoning_effort": "none"},
        {"user": "u", "metadata": {"a": "b"}, "service_tier": "auto", "parallel_tool_calls": True},
        {"stream_options": {"include_usage": False, "include_obfuscation": False}},
    ],
    ids=str,
)
def test_a_value_that_changes_nothing_is_accepted(fields: dict[str, Any]) -> None:
    assert parsed(**fields).inference(LIMITS) == parsed().inference(LIMITS)


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2},
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
        {"functions": [{"name": "f"}]},
        {"function_call": {"name": "f"}},
        {"modalities": ["text", "audio"]},
        {"audio": {"voice": "alloy"}},
        {"web_search_options": {}},
        {"store": True},
        {"reasoning_effort": "high"},
        {"min_p": 0.1},
    ],
    ids=str,
)
def test_what_would_change_the_answer_and_is_not_supported_is_refused_by_name(fields: dict[str, Any]) -> None:
    [name] = fields
    error = refused(**fields)
    assert (error["code"], error["param"]) == ("unsupported_parameter", name)
    assert f"'{name}'" in error["message"]


def test_an_unknown_parameter_is_refused_by_name_as_openai_does() -> None:
    error = refused(guided_json={"type": "object"})
    assert (error["code"], error["param"]) == ("unknown_parameter", "guided_json")
    assert error["message"] == "Unrecognized request argument supplied: guided_json"


def test_an_error_names_the_field_as_openai_does_and_never_its_value() -> None:
    error = refused(messages=[USER, {"role": "wizard", "content": "secret"}])
    assert error["param"] == "messages[1].role"
    assert "secret" not in str(error)
    assert "secret" not in str(refused(temperature="secret"))


def test_the_messages_of_a_conversation_with_tools_are_read() -> None:
    asked = parsed(
        messages=[
            {"role": "developer", "content": "be brief"},
            USER,
            {"role": "assistant", "content": None, "refusal": None, "annotations": [], "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "3"}]},
            {"role": "function", "name": "add", "content": "3"},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "audio": None},
        ]
    )
    messages = asked.inference(LIMITS).messages
    assert messages is not None
    assert [message.role for message in messages] == ["system", "user", "assistant", "tool", "tool", "assistant"]
    assert [message.content for message in messages] == ["be brief", "hi", "", "3", "3", "no"]
    assert messages[2].tool_calls
    assert messages[2].tool_calls[0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert messages[3].tool_call_id == "call_1"
    assert messages[4].name == "add"


@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_only_an_assistants_message_may_have_no_content(role: str) -> None:
    assert refused(messages=[{"role": role, "content": None}])["param"] == "messages[0]"
    parsed(messages=[{"role": "assistant", "content": None}])


def test_a_picture_in_a_message_is_refused() -> None:
    error = refused(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
    assert error["param"] == "messages[0].content"
    assert "'text'" in error["message"]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_answer_may_be_as_long_as_asked_for_up_to_the_limit(name: str) -> None:
    assert parsed().inference(LIMITS).max_tokens == 256
    assert parsed(**{name: 256}).inference(LIMITS).max_tokens == 256
    assert parsed(**{name: 256}).beyond(LIMITS) is None
    assert parsed(**{name: 257}).beyond(LIMITS) == (name, 257)


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


NAMED = {"type": "function", "function": {"name": "time"}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (("add", "time"), False, True, False)),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, (("add", "time"), False, False, False)),
        ({"tool_choice": "required"}, (("add", "time"), True, True, False)),
        ({"tool_choice": NAMED}, (("time",), True, False, False)),
        ({"tools": [tool("add", strict=True), tool("time")]}, (("add", "time"), False, True, True)),
    ],
    ids=str,
)
def test_the_choice_of_tools_is_read(fields: dict[str, Any], expected: Any) -> None:
    tools = (
        parsed(**{"tools": [tool("add"), tool("time", description="d", strict=None)], **fields}).inference(LIMITS).tools
    )
    assert tools is not None
    assert (tools.callable, tools.required, tools.parallel, tools.strict) == expected
    assert [one.name for one in tools.offered] == ["add", "time"], "the model sees all of them"
    assert tools.offered[0].parameters == {"type": "object", "properties": {}}


def test_without_tools_to_choose_from_the_model_is_shown_none() -> None:
    for fields in ({"tools": [tool("add")], "tool_choice": "none"}, {"tools": []}, {"tool_choice": "auto"}):
        asked = parsed(**fields)
        assert (asked.needs_tools, asked.inference(LIMITS).tools) == (False, None)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [tool("add")], "tool_choice": NAMED}, "tool_choice"),
        ({"tools": [tool("add")], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [tool("add"), tool("add")]}, "tools"),
        ({"tools": [tool("a b")]}, "tools[0].function.name"),
        ({"tools": [tool("add", parameters="{}")]}, "tools[0].function.parameters"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [tool(f"t{number}") for number in range(129)]}, "tools"),
        ({"tools": [tool("add")], "response_format": {"type": "json_object"}}, "response_format"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_tools_that_cannot_be_offered_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    assert refused(**fields)["param"] == param
