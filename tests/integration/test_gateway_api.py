"""The OpenAI-compatible API over a real socket, a real runner and a real (tiny) model."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import httpx
import pytest
import pytest_asyncio

from slmops.gateway.api.listen import ApiServer, listen
from slmops.gateway.api.server import ApiLimits, create_api
from slmops.gateway.serving.releases import Serving, ServingLimits
from slmops.gateway.serving.runner import ProcessRunner

MakeRunner = Callable[..., ProcessRunner]
URL = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "Capital of France?"}], "max_tokens": 12, "temperature": 0}


@asynccontextmanager
async def api(serving: Serving) -> AsyncIterator[httpx.AsyncClient]:
    server, socket = ApiServer(create_api(serving, limits=ApiLimits(max_body_bytes=10_000))), listen()
    host, port = socket.getsockname()
    running = asyncio.create_task(server.serve([socket]))
    try:
        async with httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=30) as client:
            yield client
    finally:
        server.should_exit = True
        await running


@asynccontextmanager
async def serving_api(runner: ProcessRunner) -> AsyncIterator[httpx.AsyncClient]:
    """Yields a client of the API of a gateway that serves this runner."""
    serving = Serving(ServingLimits(drain=timedelta(seconds=5)))
    await runner.start()
    await serving.swap(runner)
    try:
        async with api(serving) as client:
            yield client
    finally:
        await serving.stop()


@pytest_asyncio.fixture
async def serving(make_runner: MakeRunner) -> AsyncIterator[Serving]:
    serving, runner = Serving(ServingLimits(drain=timedelta(seconds=5))), make_runner(parallel=1, context_tokens=512)
    await runner.start()
    await serving.swap(runner)
    yield serving
    await serving.stop()


@pytest_asyncio.fixture
async def client(serving: Serving) -> AsyncIterator[httpx.AsyncClient]:
    async with api(serving) as client:
        yield client


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def test_a_chat_completion_has_the_fields_of_the_openai_api(client: httpx.AsyncClient) -> None:
    body = (await client.post(URL, json={**ASK, "model": "tiny"})).raise_for_status().json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny"
    assert body["system_fingerprint"].startswith("sha256:")
    [choice] = body["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] in ("stop", "length")
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 0 < usage["completion_tokens"] <= 12


async def test_a_streamed_answer_equals_the_whole_answer(client: httpx.AsyncClient) -> None:
    whole = (await client.post(URL, json=ASK)).json()
    response = await client.post(URL, json={**ASK, "stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response.text)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], whole["usage"])
    assert len({chunk["id"] for chunk in chunks}) == 1


async def test_a_stream_without_the_option_has_no_usage(client: httpx.AsyncClient) -> None:
    chunks = events((await client.post(URL, json={**ASK, "stream": True})).text)
    assert all("usage" not in chunk for chunk in chunks)


async def test_content_may_be_a_list_of_parts_and_stop_a_single_string(client: httpx.AsyncClient) -> None:
    parts = [{"type": "text", "text": "Capital "}, {"type": "text", "text": "of France?"}]
    asked = {**ASK, "messages": [{"role": "user", "content": parts}], "stop": "\0"}
    assert (await client.post(URL, json=asked)).json()["choices"] == (await client.post(URL, json=ASK)).json()[
        "choices"
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"messages": []},
        {"messages": "hello"},
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        {"max_tokens": 0},
        {"temperature": 3},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"stop": ["1", "2", "3", "4", "5"]},
        {"n": 2},
        {"tools": [{}]},
        {"top_logprobs": 2},
        {"logit_bias": {"x": 1}},
        {"response_format": {"type": "json_schema"}},
        {"stream": "perhaps"},
    ],
    ids=str,
)
async def test_an_unsupported_request_is_a_400_in_the_openai_format(
    client: httpx.AsyncClient, change: dict[str, Any]
) -> None:
    response = await client.post(URL, content=json.dumps({**ASK, **change}))
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_a_body_that_is_not_json_is_a_400_whose_message_does_not_quote_it(client: httpx.AsyncClient) -> None:
    response = await client.post(URL, content=b"secret not json")
    assert response.status_code == 400
    assert "secret" not in response.text


async def test_a_prompt_longer_than_the_context_is_a_400_streamed_or_not(client: httpx.AsyncClient) -> None:
    long = {**ASK, "messages": [{"role": "user", "content": "word " * 1000}]}
    for stream in (False, True):
        response = await client.post(URL, json={**long, "stream": stream})
        assert (response.status_code, response.json()["error"]["code"]) == (
            400,
            "context_length_exceeded",
        )
        assert "maximum context length is 512 tokens" in response.json()["error"]["message"]
    assert (await client.post(URL, json=ASK)).status_code == 200


async def test_a_request_for_more_tokens_than_the_limit_is_refused_and_not_truncated(make_runner: MakeRunner) -> None:
    async with serving_api(make_runner(max_tokens=20)) as client:
        for name in ("max_tokens", "max_completion_tokens"):
            asked = {"messages": ASK["messages"], "temperature": 0, name: 21}
            error = (await client.post(URL, json=asked)).json()["error"]
            assert (error["code"], error["param"]) == ("invalid_value", name)
            assert "at most 20 completion tokens" in error["message"]
            assert (await client.post(URL, json={**asked, name: 20})).status_code == 200


async def test_without_max_tokens_an_answer_may_have_the_length_that_the_release_allows(
    make_runner: MakeRunner,
) -> None:
    async with serving_api(make_runner(context_tokens=512, max_tokens=300)) as client:
        asked = {"messages": ASK["messages"], "temperature": 0, "logit_bias": None}
        body = (await client.post(URL, json=asked)).raise_for_status().json()
        assert body["choices"][0]["finish_reason"] == "length"
        assert body["usage"]["completion_tokens"] == 300


async def test_an_answer_cut_by_the_context_has_finish_reason_length(make_runner: MakeRunner) -> None:
    async with serving_api(make_runner(context_tokens=64, max_tokens=60)) as client:
        body = (await client.post(URL, json={**ASK, "max_tokens": 60})).raise_for_status().json()
        assert body["choices"][0]["finish_reason"] == "length"
        assert body["usage"]["total_tokens"] == 64


async def test_the_model_card_has_the_context_and_token_limits(make_runner: MakeRunner) -> None:
    for configured, expected in ((512, 512), (10_000, 2048)):  # the tiny model was trained for 2048
        async with serving_api(make_runner(context_tokens=configured, max_tokens=100)) as client:
            [card] = (await client.get("/v1/models")).json()["data"]
            assert (card["max_model_len"], card["max_completion_tokens"]) == (expected, 100)


async def test_null_fields_and_tool_messages_of_official_clients_are_accepted(
    client: httpx.AsyncClient,
) -> None:
    plain = (await client.post(URL, json=ASK)).json()["choices"]
    unset = {"model": None, "stop": None, "seed": None, "tools": None, "response_format": None, "stream_options": None}
    assert (await client.post(URL, json={**ASK, **unset})).json()["choices"] == plain
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        *ASK["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "Paris"},
    ]
    assert (await client.post(URL, json={**ASK, "messages": messages})).status_code == 200


async def test_tools_are_refused_by_name_if_the_models_template_does_not_know_them(client: httpx.AsyncClient) -> None:
    asked = {**ASK, "tools": [{"type": "function", "function": {"name": "f"}}]}
    error = (await client.post(URL, json=asked)).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", "tools")
    assert (await client.post(URL, json={**asked, "tool_choice": "none"})).status_code == 200
    assert (await client.get("/v1/models/tiny")).json()["tool_call_format"] is None


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "maximum": 99, "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def of_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": schema}}


@pytest.mark.parametrize("temperature", [0, 1.5])
async def test_an_answer_fits_the_schema_of_response_format(client: httpx.AsyncClient, temperature: float) -> None:
    """The model's weights are random: only constrained decoding can make the answer fit the schema."""
    asked = {**ASK, "max_tokens": 120, "temperature": temperature, "seed": 1, "response_format": of_schema(PERSON)}
    choice = (await client.post(URL, json=asked)).raise_for_status().json()["choices"][0]
    person = json.loads(choice["message"]["content"])
    assert choice["finish_reason"] == "stop"
    assert person.keys() == {"name", "age"}
    assert len(person["name"]) <= 5
    assert 0 <= person["age"] <= 99
    chunks = events((await client.post(URL, json={**asked, "stream": True})).text)
    streamed = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert streamed == choice["message"]["content"]


async def test_response_format_json_object_makes_a_random_model_answer_with_an_object(
    client: httpx.AsyncClient,
) -> None:
    asked = {**ASK, "max_tokens": 30, "response_format": {"type": "json_object"}}
    assert (await client.post(URL, json=asked)).json()["choices"][0]["message"]["content"].lstrip().startswith("{")


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"$ref": "http://x/y"}, {"type": "string", "pattern": "("}])
async def test_a_schema_that_the_runtime_does_not_support_is_a_client_error(
    client: httpx.AsyncClient, serving: Serving, schema: dict[str, Any]
) -> None:
    response = await client.post(URL, json={**ASK, "response_format": of_schema(schema)})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "prompt_refused")
    assert "response_format" in response.json()["error"]["message"]
    assert serving.take_measurements() == {}, "a client error is not counted as a measurement of the release"


async def text(client: httpx.AsyncClient, **fields: Any) -> str:
    asked = {**ASK, "max_tokens": 40, **fields}
    return str((await client.post(URL, json=asked)).raise_for_status().json()["choices"][0]["message"]["content"])


def letters(allowed: str) -> dict[str, int]:
    """Returns a logit bias that allows only these letters. The byte alphabet starts with "!" after 3 control tokens."""
    return {str(ord(letter) - ord("!") + 3): 100 for letter in allowed}


async def test_penalties_and_logit_bias_change_the_answer(client: httpx.AsyncClient) -> None:
    plain = await text(client)
    assert await text(client, frequency_penalty=0, presence_penalty=0, logit_bias={}, repetition_penalty=1) == plain
    for penalty in ({"frequency_penalty": 2}, {"presence_penalty": 2}, {"repetition_penalty": 2}):
        assert await text(client, **penalty) != plain, penalty
    assert await text(client, logit_bias=letters("x")) == "x" * 40
    refused = await client.post(URL, json={**ASK, "logit_bias": {"100000": 1}})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "prompt_refused")


async def test_top_k_limits_the_sampled_tokens(client: httpx.AsyncClient) -> None:
    greedy = await text(client)
    assert await text(client, temperature=2, top_k=1, seed=3) == greedy
    for everything in (0, -1, 100_000):
        assert await text(client, temperature=2, top_k=everything, seed=3) != greedy


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_describe_each_token_of_the_answer(client: httpx.AsyncClient, stream: bool) -> None:
    asked = {**ASK, "logprobs": True, "top_logprobs": 3, "stream": stream}
    response = (await client.post(URL, json=asked)).raise_for_status()
    if stream:
        choices = [chunk["choices"][0] for chunk in events(response.text)]
        content = [one for choice in choices if choice["logprobs"] for one in choice["logprobs"]["content"]]
    else:
        [choice] = response.json()["choices"]
        content = choice["logprobs"]["content"]
        plain = [one["token"] for one in content if one["bytes"]]
        assert [one for one in plain if one not in choice["message"]["content"]] == []
    assert len(content) == 12
    for one in content:
        assert [other["logprob"] for other in one["top_logprobs"]] == sorted(
            (other["logprob"] for other in one["top_logprobs"]), reverse=True
        )
        assert one["logprob"] == one["top_logprobs"][0]["logprob"] <= 0, "greedy decoding takes the most likely token"
    assert (await client.post(URL, json=ASK)).json()["choices"][0]["logprobs"] is None


async def test_logprobs_of_a_stop_string_are_left_out(client: httpx.AsyncClient) -> None:
    sampled = {"temperature": 1, "seed": 5, "logit_bias": letters("abcd")}
    whole = await text(client, **sampled)
    stop = whole[20:24]
    asked = {**ASK, **sampled, "max_tokens": 40, "logprobs": True, "stop": stop}
    [choice] = (await client.post(URL, json=asked)).json()["choices"]
    assert choice["message"]["content"] == whole[: whole.index(stop)]
    assert "".join(one["token"] for one in choice["logprobs"]["content"]) == choice["message"]["content"]


async def test_an_unknown_model_or_version_is_a_404(client: httpx.AsyncClient) -> None:
    assert (await client.post(URL, json={**ASK, "model": "gpt-x"})).status_code == 404
    assert (await client.post(URL, json={**ASK, "model": "tiny:9.9.9"})).status_code == 404
    assert (await client.post(URL, json={**ASK, "model": "tiny:1.0.0"})).status_code == 200
    assert (await client.get("/nothing")).json()["error"]["code"] == "no_such_route"
    assert (await client.get(URL)).status_code == 405


async def test_a_body_above_the_size_limit_is_a_413_with_and_without_content_length(client: httpx.AsyncClient) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 1000

    assert (await client.post(URL, content=b"x" * 10_001)).status_code == 413
    assert (await client.post(URL, content=endless())).status_code == 413


async def test_without_a_model_the_api_is_alive_but_not_ready_and_sends_retry_after() -> None:
    async with api(Serving()) as client:
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).status_code == 503
        assert (await client.get("/v1/models")).json()["data"] == []
        response = await client.post(URL, json=ASK)
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        assert response.json()["error"]["code"] == "not_ready"


async def test_a_serving_gateway_is_ready_and_lists_its_model(client: httpx.AsyncClient) -> None:
    assert (await client.get("/readyz")).json() == {"ready": True}
    assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["tiny"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_disconnects_before_the_first_token_cancels_its_answer(
    make_runner: MakeRunner, stream: bool
) -> None:
    """The runner is stopped meanwhile: an answer that is not cancelled would be completed later and counted."""
    serving, runner = Serving(), make_runner()
    await runner.start()
    await serving.swap(runner)
    assert runner.pid
    async with api(serving) as client:
        os.kill(runner.pid, signal.SIGSTOP)
        with pytest.raises(httpx.ReadTimeout):
            await client.post(URL, json={**ASK, "stream": stream}, timeout=httpx.Timeout(5, read=0.1))
        await asyncio.sleep(0.6)  # twice the interval at which the gateway checks the connection
        os.kill(runner.pid, signal.SIGCONT)
        assert (await client.post(URL, json=ASK)).status_code == 200
    assert serving.take_measurements()[runner.release.digest].requests == 1
    await serving.stop()


async def test_a_client_that_disconnects_during_a_stream_cancels_the_rest(make_runner: MakeRunner) -> None:
    serving, runner = Serving(), make_runner(context_tokens=2048, max_tokens=2000)
    await runner.start()
    await serving.swap(runner)
    assert runner.pid
    async with api(serving) as client:
        asked = {**ASK, "max_tokens": 2000, "stream": True}
        async with client.stream("POST", URL, json=asked) as response:
            await anext(response.aiter_bytes())
            os.kill(runner.pid, signal.SIGSTOP)
        await asyncio.sleep(0.3)
        os.kill(runner.pid, signal.SIGCONT)
        assert (await client.post(URL, json=ASK)).status_code == 200
    assert serving.take_measurements()[runner.release.digest].requests == 1
    await serving.stop()


async def test_metrics_use_the_opentelemetry_genai_names_and_no_text_of_clients(client: httpx.AsyncClient) -> None:
    await client.post(URL, json={**ASK, "model": "tiny:1.0.0"})
    await client.post(URL, json={**ASK, "model": "invented-by-a-client"})
    text = (await client.get("/metrics")).text
    for name in (
        "gen_ai_server_time_to_first_token_seconds",
        "gen_ai_server_time_per_output_token_seconds",
        "gen_ai_server_request_duration_seconds",
        "gen_ai_client_token_usage",
    ):
        assert f"{name}_count{{" in text
    assert 'gen_ai_request_model="tiny"' in text
    assert "invented" not in text


async def test_no_prompt_and_no_answer_reaches_a_log(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "a-word-that-must-not-be-logged"
    asked = {**ASK, "messages": [{"role": "user", "content": secret}]}
    answers = [(await client.post(URL, json=asked)).json()["choices"][0]["message"]["content"]]
    await client.post(URL, json={**asked, "temperature": 9})
    await client.post(URL, json={**asked, "messages": [{"role": "user", "content": secret * 400}]})
    await client.post(URL, json={**asked, "stream": True})
    captured = capfd.readouterr()
    logged = "\n".join(record.getMessage() for record in caplog.records) + captured.out + captured.err
    assert secret not in logged
    assert answers[0] not in logged


async def test_a_model_card_is_found_by_name_with_and_without_a_version(client: httpx.AsyncClient) -> None:
    [card] = (await client.get("/v1/models")).json()["data"]
    for name in ("tiny", "tiny:1.0.0"):
        assert (await client.get(f"/v1/models/{name}")).json() == card
    for name in ("other", "tiny:9.9.9", "a/b"):
        assert (await client.get(f"/v1/models/{name}")).status_code == 404
    async with api(Serving()) as empty:
        assert (await empty.get("/v1/models/tiny")).status_code == 404


async def test_a_text_completion_does_not_use_the_chat_template(client: httpx.AsyncClient) -> None:
    asked = {"model": "tiny", "prompt": "Capital of France?", "max_tokens": 12, "temperature": 0}
    body = (await client.post("/v1/completions", json=asked)).raise_for_status().json()
    assert (body["object"], body["id"][:5]) == ("text_completion", "cmpl-")
    [choice] = body["choices"]
    assert choice["finish_reason"] in ("stop", "length")
    chat = (await client.post(URL, json=ASK)).json()
    assert body["usage"]["prompt_tokens"] < chat["usage"]["prompt_tokens"]
    streamed = {**asked, "prompt": ["Capital of France?"], "stream": True, "stream_options": {"include_usage": True}}
    chunks = events((await client.post("/v1/completions", json=streamed)).text)
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == choice["text"]
    assert chunks[-2]["choices"][0]["finish_reason"] == choice["finish_reason"]
    assert chunks[-1]["usage"] == body["usage"]


async def test_a_text_completion_has_the_openai_default_of_16_tokens(client: httpx.AsyncClient) -> None:
    asked = {"prompt": "Capital of France?", "temperature": 0, "logit_bias": letters("x")}
    assert (await client.post("/v1/completions", json=asked)).json()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    "change",
    [
        *({"prompt": prompt} for prompt in (None, "", [], ["a", "b"], [1, 2], [[1, 2]])),
        *({"echo": True}, {"suffix": "x"}, {"logprobs": 1}, {"logprobs": 0}, {"best_of": 2}, {"messages": []}),
    ],
    ids=str,
)
async def test_an_unsupported_text_completion_is_a_400(client: httpx.AsyncClient, change: dict[str, Any]) -> None:
    response = await client.post("/v1/completions", json={"prompt": "x", **change})
    assert response.status_code == 400
    assert response.json()["error"]["param"] in change


async def test_every_response_has_a_request_id_that_the_client_may_set(client: httpx.AsyncClient) -> None:
    for path, method in ((URL, "POST"), ("/v1/models", "GET"), ("/nothing", "GET"), ("/healthz", "GET")):
        own = (await client.request(method, path, json=ASK)).headers["x-request-id"]
        assert own.startswith("req_")
        assert own != (await client.request(method, path, json=ASK)).headers["x-request-id"]
        chosen = await client.request(method, path, json=ASK, headers={"X-Request-Id": "trace-7.a_b"})
        assert chosen.headers["x-request-id"] == "trace-7.a_b"
    refused = await client.get("/v1/models", headers={"Host": "evil.example"})
    assert (refused.status_code, refused.headers["x-request-id"][:4]) == (403, "req_")
    for strange in ("x" * 129, "a b", "<script>"):
        assert (await client.get("/healthz", headers={"X-Request-Id": strange})).headers["x-request-id"][:4] == "req_"
