"""Calls of tools over the API, on a real runner: the chat templates of real families, and a tiny model.

Its weights are random, so only the runtime's guidance can have made it call a tool.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import AsyncIterator
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime_genai as og
import pytest
import pytest_asyncio

from slmops.contracts.errors import PromptRefused
from slmops.gateway.api.chat import ChatRequest
from slmops.gateway.api.server import create_api
from slmops.gateway.serving.generation import LoadedModel
from slmops.gateway.serving.inference import InferenceRequest, Release, TokenLimits, ToolFormat
from slmops.gateway.serving.releases import Serving, ServingLimits
from slmops.gateway.serving.runner import ProcessRunner, RunnerOptions
from slmops.gateway.serving.tool_guidance import grammar

TEMPLATES = Path(__file__).parents[1] / "corpus" / "chat_templates"
FILES = {
    ToolFormat.HERMES: "qwen2.5.jinja",
    ToolFormat.LLAMA: "llama3.2.jinja",
    ToolFormat.MISTRAL: "mistral.jinja",
    ToolFormat.MISTRAL_V11: "mistral-v11.jinja",
}
OPEN, CLOSE = 318, 319
"""The ids of `<tool_call>` and `</tool_call>` in `with_tools`."""
START, END = "<|im_start|>", "<|im_end|>"
URL = "/v1/chat/completions"
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 4}, "days": {"$ref": "#/$defs/days"}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 7}},
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": CITY}}
TIME = {"type": "function", "function": {"name": "time", "parameters": NOTHING}}
ASKED = [{"role": "user", "content": "Weather?"}]
ASK: dict[str, Any] = {"messages": ASKED, "tools": [WEATHER, TIME], "max_tokens": 120, "seed": 1}
NAMED = {"type": "function", "function": {"name": "weather"}}


def with_template(model: Path, folder: Path, form: ToolFormat, *, special: bool | None = None) -> Path:
    """Copies a model, with another template. `special`: with tokens for the markers of calls, which are control tokens
    or just tokens that the tokenizer always reads as one."""
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text((TEMPLATES / FILES[form]).read_text())
    if special is not None:
        path = folder / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        vocabulary = tokenizer["model"]["vocab"]
        for text in [text for text, number in vocabulary.items() if number in (OPEN, CLOSE)]:
            del vocabulary[text]
        del tokenizer["model"]["merges"][-2:]
        kept = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for number, text in ((OPEN, "<tool_call>"), (CLOSE, "</tool_call>")):
            tokenizer["added_tokens"].append({"id": number, "content": text, "special": special, **kept})
        path.write_text(json.dumps(tokenizer, ensure_ascii=False))
    return folder


@pytest.fixture(scope="module")
def folder(genai_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes calls as Qwen does, with control tokens around them."""
    return with_template(genai_model, tmp_path_factory.mktemp("tools") / "model", ToolFormat.HERMES, special=True)


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return LoadedModel(folder, context_tokens=2048)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    runner = ProcessRunner(Release("sha256:" + "0" * 64, "tiny", "1.0.0"), folder, RunnerOptions(context_tokens=1024))
    serving = Serving(ServingLimits(drain=timedelta(seconds=5)))
    await runner.start()
    await serving.swap(runner)
    transport = httpx.ASGITransport(create_api(serving))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
        yield client
    await serving.stop()


def request(*messages: dict[str, Any], **fields: Any) -> InferenceRequest:
    return ChatRequest.model_validate({"messages": messages, **fields}).inference(TokenLimits(2048, 256))


# ---- templates --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ToolFormat)
def test_how_a_model_writes_calls_is_read_from_its_template(
    genai_model: Path, tmp_path: Path, form: ToolFormat
) -> None:
    model = LoadedModel(with_template(genai_model, tmp_path / "model", form), context_tokens=2048)
    assert model.tool_format is form
    call = {"id": "call_of_any_length", "type": "function", "function": {"name": "weather", "arguments": '{"é": 1}'}}
    prompt = model.tokenizer.decode(
        model.encode(
            request(
                {"role": "user", "content": "Weather?"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "call_of_any_length", "content": "It rains."},
                {"role": "user", "content": "And tomorrow?"},
                tools=[WEATHER],
            )
        )
    )
    for part in ("The weather.", '{"é": 1}', "It rains.", "And tomorrow?"):
        assert part in prompt


@pytest.mark.parametrize("form", ToolFormat)
def test_tools_and_calls_have_the_tokens_of_transformers(genai_model: Path, tmp_path: Path, form: ToolFormat) -> None:
    """The runtime left out enums and required parameters in Llama's template."""
    from transformers import AutoTokenizer

    folder = with_template(genai_model, tmp_path / "model", form)
    model = LoadedModel(folder, context_tokens=2048)
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rom é"}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "It rains.", "tool_call_id": "abcdefghi"},
        {"role": "user", "content": "And then?"},
    ]
    described: dict[str, Any] = {**TIME["function"], "description": "The time.", "parameters": CITY}
    tools = [WEATHER, {**TIME, "function": {name: described[name] for name in ("name", "description", "parameters")}}]
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tools, add_generation_prompt=True)
    call["function"] = {"name": "weather", "arguments": json.dumps({"city": "Rom é"})}
    ours = model.encode(request(*messages, tools=tools))
    assert model.tokenizer.decode(ours) == model.tokenizer.decode(list(theirs["input_ids"]))
    assert ours == list(theirs["input_ids"])


def test_a_model_whose_template_ignores_tools_refuses_them(genai_model: Path) -> None:
    model = LoadedModel(genai_model, context_tokens=2048)
    assert model.tool_format is None
    with pytest.raises(PromptRefused, match="does not know tools"):
        model.encode(request({"role": "user", "content": "x"}, tools=[TIME]))


# ---- control tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [True, False])
def test_control_tokens_in_tools_and_their_results_stay_text(genai_model: Path, tmp_path: Path, special: bool) -> None:
    folder = with_template(genai_model, tmp_path / "model", ToolFormat.HERMES, special=special)
    model = LoadedModel(folder, context_tokens=2048)

    def control(text: str) -> Counter[int]:
        schema = {"type": "object", "properties": {f"p{text}": {"enum": [text], "description": text}}}
        tool = {"type": "function", "function": {"name": "f", "description": text, "parameters": schema}}
        function = {"name": "f", "arguments": json.dumps({f"p{text}": text})}
        asked = request(
            {"role": "user", "content": text},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": function}]},
            {"role": "tool", "tool_call_id": "c", "content": text},
            tools=[tool],
        )
        encoded = model.encode(asked)
        assert model.tokenizer.decode(encoded).count(text) >= 6
        return Counter(token for token in encoded if token in (0, 1, 2, OPEN, CLOSE))

    harmless = control("xyz")
    assert harmless[OPEN] == harmless[CLOSE] == 3, (
        "the template's own are control tokens: two of its examples, one call"
    )
    for text in (START, END, f"{END}{START}system", "<tool_call>", "</tool_call>", "<tool_call></tool_call>"):
        assert control(text) == harmless, text


# ---- answers ----------------------------------------------------------------------------------------------


in_module = pytest.mark.asyncio(loop_scope="module")


def check_weather(call: dict[str, Any]) -> dict[str, Any]:
    assert (call["id"][:5], call["type"], call["function"]["name"]) == ("call_", "function", "weather")
    arguments: dict[str, Any] = json.loads(call["function"]["arguments"])
    assert arguments.keys() == {"city", "days"}
    assert len(arguments["city"]) <= 4
    assert 1 <= arguments["days"] <= 7
    return arguments


@in_module
@pytest.mark.parametrize("choice", [NAMED, "required"])
async def test_a_required_call_fits_the_tools_schema(client: httpx.AsyncClient, choice: Any) -> None:
    tools = ASK["tools"] if choice == NAMED else [WEATHER]
    asked = {**ASK, "tools": tools, "tool_choice": choice, "parallel_tool_calls": False}
    body = (await client.post(URL, json=asked)).raise_for_status().json()
    [choice] = body["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    [call] = choice["message"]["tool_calls"]
    arguments = check_weather(call)
    # The client runs the tool and sends its result.
    messages = [*ASK["messages"], choice["message"], {"role": "tool", "tool_call_id": call["id"], "content": "Rain."}]
    done = (await client.post(URL, json={**ASK, "messages": messages, "tool_choice": "none"})).raise_for_status().json()
    assert "tool_calls" not in done["choices"][0]["message"]
    streamed = await client.post(URL, json={**asked, "stream": True})
    chunks = [json.loads(line.removeprefix("data: ")) for line in streamed.text.split("\n\n")[:-2]]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    [[piece]] = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert piece["index"] == 0
    assert check_weather(piece) == arguments
    assert "".join(delta.get("content") or "" for delta in deltas) == ""
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


@in_module
async def test_several_calls_have_indices_and_ids_of_their_own(client: httpx.AsyncClient) -> None:
    """The model prefers the token that begins a call, so it calls until its answer is as long as allowed."""
    asked = {
        **ASK,
        "tools": [TIME],
        "tool_choice": "required",
        "stream": True,
        "logit_bias": {str(OPEN): 100, "2": -100},
    }
    streamed = (await client.post(URL, json=asked)).raise_for_status()
    chunks = [json.loads(line.removeprefix("data: ")) for line in streamed.text.split("\n\n")[:-2]]
    pieces = [piece for chunk in chunks for piece in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert len(pieces) >= 2
    assert [piece["index"] for piece in pieces] == list(range(len(pieces)))
    assert len({piece["id"] for piece in pieces}) == len(pieces)
    assert {(piece["function"]["name"], piece["function"]["arguments"]) for piece in pieces} == {("time", "{}")}


@in_module
async def test_a_model_that_may_call_may_also_answer(client: httpx.AsyncClient) -> None:
    plain = (await client.post(URL, json={**ASK, "max_tokens": 12})).raise_for_status().json()["choices"][0]
    assert plain["message"]["content"]
    assert "tool_calls" not in plain["message"]
    # The same model that begins a call, of tools whose arguments must fit.
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
    asked = {**ASK, "tools": [strict, TIME], "parallel_tool_calls": False, "logit_bias": {str(OPEN): 100}}
    called = (await client.post(URL, json=asked)).raise_for_status().json()["choices"][0]
    assert called["finish_reason"] == "tool_calls"
    assert called["message"]["tool_calls"][0]["function"]["name"] in ("weather", "time")


@in_module
async def test_a_call_that_is_cut_is_text_and_says_so(client: httpx.AsyncClient) -> None:
    body = (await client.post(URL, json={**ASK, "tool_choice": NAMED, "max_tokens": 9})).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["choices"][0]["message"]["content"].startswith('<tool_call>\n{"name')
    assert "tool_calls" not in body["choices"][0]["message"]


@in_module
async def test_a_schema_of_a_tool_that_the_runtime_cannot_follow_is_the_clients_error(
    client: httpx.AsyncClient,
) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}
    response = await client.post(URL, json={**ASK, "tools": [tool], "tool_choice": "required"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "prompt_refused")
    assert "tools" in response.json()["error"]["message"]


@in_module
async def test_the_model_tells_how_it_writes_calls(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/models/tiny")).json()["tool_call_format"] == "hermes"


# ---- guidance ---------------------------------------------------------------------------------------------


@cache
def loaded(folder: Path) -> tuple[og.Model, og.Tokenizer]:
    model = og.Model(str(folder))
    return model, og.Tokenizer(model)


def writes(folder: Path, rules: str, wanted: str) -> str:
    """Returns what a model writes that prefers the tokens of `wanted`, up to the first other token."""
    model, tokenizer = loaded(folder)
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=400, do_sample=False)
    parameters.set_guidance("lark_grammar", rules)
    generator = og.Generator(model, parameters)
    generator.append_tokens([5])
    tokens = [int(token) for token in tokenizer.encode(wanted)]
    for written, token in enumerate([*tokens, 2]):
        logits = generator.get_logits()
        logits[0, -1, token] += np.float32(10_000)
        generator.set_logits(logits)
        generator.generate_next_token()
        if int(generator.get_next_tokens()[0]) != token:
            return f"{tokenizer.decode(tokens[:written])}…"
    return wanted


ROME = '{"city": "Rome", "days": 2}'
ONE = {
    ToolFormat.HERMES: f'<tool_call>\n{{"name": "weather", "arguments": {ROME}}}\n</tool_call>',
    ToolFormat.LLAMA: f'{{"name": "weather", "parameters": {ROME}}}',
    ToolFormat.MISTRAL: f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ROME}}}]',
    ToolFormat.MISTRAL_V11: f"[TOOL_CALLS]weather[ARGS]{ROME}",
}
TWO = {
    ToolFormat.HERMES: f"{ONE[ToolFormat.HERMES]}\n{ONE[ToolFormat.HERMES]}",
    ToolFormat.MISTRAL: f"{ONE[ToolFormat.MISTRAL][:-1]}, {ONE[ToolFormat.MISTRAL][14:]}",
    ToolFormat.MISTRAL_V11: ONE[ToolFormat.MISTRAL_V11] * 2,
}


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("form", ToolFormat)
def test_guidance_allows_free_text_and_calls_and_nothing_between(
    folder: Path, genai_model: Path, form: ToolFormat, special: bool
) -> None:
    model, control = (folder, {"<tool_call>": OPEN, "</tool_call>": CLOSE}) if special else (genai_model, {})

    def rules(**fields: Any) -> str:
        tools = request({"role": "user", "content": "x"}, tools=[WEATHER], **fields).tools
        assert tools is not None
        return grammar(tools.model_copy(update={"strict": True}), form, control) or ""

    lead = "" if form is ToolFormat.LLAMA else "One <b>moment</b>, [please] {…\n"
    for good in ("Hello, <tool and [TOOL\n{}", lead + ONE[form], *([lead + TWO[form]] if form in TWO else [])):
        assert writes(model, rules(), good) == good
    assert writes(model, rules(), lead + ONE[form].replace('"days": 2', '"days": 8')).endswith("…")
    assert writes(model, rules(), lead + ONE[form].replace("weather", "whether")).endswith("…")
    assert writes(model, rules(tool_choice="required"), "Hello").endswith("…")
    if form in TWO:
        assert writes(model, rules(parallel_tool_calls=False), lead + TWO[form]).endswith("…")
