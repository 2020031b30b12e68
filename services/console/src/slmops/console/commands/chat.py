"""`slmops chat`: send a prompt to one gateway over its OpenAI-compatible API."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from pydantic import BaseModel, ConfigDict

from slmops.console.render import fleet as render
from slmops.console.render.tables import printable
from slmops.console.session import Session, command
from slmops.contracts.errors import InvalidMessage, NotFound, Problem, Unreachable
from slmops.kit.tls import untrusted

_TIMEOUT = httpx.Timeout(300, connect=5)  # on a slow gateway, the first token may take minutes


class Answer(BaseModel):
    """A gateway's answer. `tokens_per_s` is measured from the first token to the last; None for fewer than two."""

    model_config = ConfigDict(frozen=True)

    text: str
    model: str = ""
    release: str | None = None
    completion_tokens: int = 0
    ttft_s: float | None = None
    tokens_per_s: float | None = None


async def ask(
    url: str,
    prompt: str,
    *,
    max_tokens: int | None = None,
    temperature: float = 0,
    key: str | None = None,
    verify: ssl.SSLContext | bool = True,
    on_text: Callable[[str], None] = lambda text: None,
) -> Answer:
    """Sends one prompt to the gateway at `url` and returns the answer. `on_text` gets the text as it arrives.

    `key` is for an API that requires one; `verify` is httpx's.
    Raises `Unreachable`, `ServerUntrusted`, the gateway's own error, and `InvalidMessage` if the
    URL is not a chat API.
    """
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "temperature": temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    } | ({"max_tokens": max_tokens} if max_tokens else {})
    texts, times, last, tokens = [], [time.monotonic()], {}, 0
    async for chunk in _chunks(f"{url.rstrip('/')}/v1/chat/completions", body, key, verify):
        last = chunk
        tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
        for choice in chunk.get("choices", []):
            if text := (choice.get("delta") or {}).get("content"):
                times.append(time.monotonic())
                texts.append(text)
                on_text(text)
    return Answer(
        text="".join(texts),
        model=last.get("model") or "",
        release=last.get("system_fingerprint"),
        completion_tokens=tokens,
        ttft_s=times[1] - times[0] if texts else None,
        tokens_per_s=(tokens - 1) / (times[-1] - times[1]) if tokens > 1 and times[-1] > times[1] else None,
    )


async def _chunks(
    url: str, body: Mapping[str, Any], key: str | None, verify: ssl.SSLContext | bool
) -> AsyncIterator[dict[str, Any]]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        async with (
            httpx.AsyncClient(timeout=_TIMEOUT, headers=headers, verify=verify) as http,
            http.stream("POST", url, json=body) as answer,
        ):
            if not answer.is_success:
                raise _refusal(url, answer.status_code, await answer.aread())
            async for line in _lines(answer.aiter_text()):
                if line.startswith("data:") and (data := line[5:].strip()) != "[DONE]":
                    yield _chunk(url, data)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise untrusted(error, url) or Unreachable(
            f"the gateway does not answer: {type(error).__name__}", where=url, fix="See slmops gateway ls."
        ) from error


async def _lines(pieces: AsyncIterator[str]) -> AsyncIterator[str]:
    """Yields the lines of a stream of events. httpx's own lines also end at U+2028, which an answer may contain."""
    rest = ""
    async for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        for line in lines:
            yield line
    yield rest


def _chunk(url: str, data: str) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except ValueError:
        chunk = None
    if not isinstance(chunk, dict):
        raise InvalidMessage(
            "the answer is not a chat completion", where=url, fix="Use the URL of an OpenAI-compatible API."
        )
    if error := chunk.get("error"):
        raise Problem(code=str(error.get("code")), what=str(error.get("message")), where=url).error()
    return chunk


def _refusal(url: str, status: int, body: bytes) -> Exception:
    try:
        error = json.loads(body)["error"]
        return Problem(code=str(error["code"]), what=str(error["message"]), where=url).error()
    except (ValueError, KeyError, TypeError):
        return InvalidMessage(
            f"the server answered with status {status} and no chat completion", where=url, fix="Check the URL."
        )


def address(gateways: Mapping[str, str], gateway_id: str | None, url: str | None) -> str:
    """Returns the URL to use: `url`, or that of the named gateway, or that of the first gateway.

    Raises `NotFound`, `InvalidMessage`.
    """
    if url:
        if gateway_id:
            raise InvalidMessage("both a gateway and --url were given", fix="Give only one of them.")
        return url if "://" in url else f"http://{url}"
    known = ", ".join(gateways)
    if not known:
        raise NotFound("no gateway address is known", fix="Give an address with --url, or start a system: slmops up.")
    if gateway_id is None:
        return next(iter(gateways.values()))
    if gateway_id not in gateways:
        raise NotFound(f"the address of gateway {gateway_id} is not known", fix=f"Use one of: {known}; or use --url.")
    return gateways[gateway_id]


def _key(path: Path) -> str:
    """Returns the first line of the file: the gateway's own file may list several keys."""
    try:
        return path.read_text().split("\n", 1)[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidMessage(f"cannot read the key: {type(error).__name__}", where=str(path)) from None


def declare(app: typer.Typer) -> None:
    """Adds the command to `app` itself, because it has no group."""
    command(
        app,
        "chat",
        'slmops chat gw-1 "What is the capital of France?"',
        'slmops chat --url http://127.0.0.1:8080 "Tell me a joke." --stream',
    )(chat)


async def chat(
    session: Session,
    words: Annotated[list[str], typer.Argument(metavar="[GATEWAY_ID] PROMPT", help="Default gateway: the first one.")],
    url: Annotated[str | None, typer.Option(help="Use this OpenAI-compatible API instead.", show_default=False)] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Show the answer as it arrives.")] = False,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum length of the answer in tokens.", show_default=False)
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="With 0, the answer is always the same.")] = 0,
    key_file: Annotated[
        Path | None, typer.Option(help="File with the key of an API that requires one.", show_default=False)
    ] = None,
) -> None:
    """Ask a gateway a question. The prompt is sent to that gateway only."""
    if len(words) > 2:
        raise InvalidMessage(
            "too many arguments were given", fix='Put the prompt in quotes: slmops chat gw-1 "Who are you?"'
        )
    where = address(session.settings.gateways, words[0] if len(words) == 2 else None, url)

    def show(text: str) -> None:
        session.out.print(printable(text), end="", markup=False, soft_wrap=True)

    live = stream and not session.as_json
    answer = await ask(
        where,
        words[-1],
        max_tokens=max_tokens,
        temperature=temperature,
        key=_key(key_file) if key_file else None,
        verify=session.verify,
        on_text=show if live else lambda text: None,
    )
    session.show(answer, "" if live else render.answer(answer.text))
    speed = f", {answer.tokens_per_s:.0f} tokens/s" if answer.tokens_per_s else ""
    first = f", first token after {answer.ttft_s:.2f} s" if answer.ttft_s is not None else ""
    session.remark(f"{answer.completion_tokens} tokens{speed}{first}")
