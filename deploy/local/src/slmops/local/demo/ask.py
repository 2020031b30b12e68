"""Sends questions to a gateway over its OpenAI-compatible API, as any client would."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import httpx

from slmops.kit.cancellation import cancel_and_wait
from slmops.kit.tracing import span, traceparent

QUESTION = "What is the capital of France?"


@dataclass(frozen=True)
class Answer:
    text: str
    tokens_per_s: float
    """Completion tokens divided by the client's wall time of the whole request."""
    model: str


async def ask(client: httpx.AsyncClient, url: str, question: str = QUESTION, max_tokens: int = 32) -> Answer:
    """Asks a gateway one question. Raises `httpx.HTTPError` if the request fails."""
    with span("ask"):
        headers = {"traceparent": parent} if (parent := traceparent()) else {}
        body = {
            "messages": [{"role": "user", "content": question}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        started = time.monotonic()
        response = await client.post(f"{url}/v1/chat/completions", json=body, headers=headers)
        seconds = time.monotonic() - started
        response.raise_for_status()
        data = response.json()
    text = str(data["choices"][0]["message"]["content"]).strip()
    return Answer(text, round(data["usage"]["completion_tokens"] / seconds, 1), str(data["model"]))


class Traffic:
    """Sends requests to one gateway, one after the other, and counts the failed ones."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._task: asyncio.Task[None] | None = None
        self.requests = 0
        self.failed = 0
        self.wrong = 0
        self.last_error = ""

    async def __aenter__(self) -> Traffic:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            await cancel_and_wait([self._task])

    async def _run(self) -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            while True:
                try:
                    answer = await ask(client, self._url, max_tokens=12)
                    self.wrong += "Paris" not in answer.text
                except httpx.HTTPError as error:
                    self.failed += 1
                    self.last_error = f"{type(error).__name__}: {error}"
                self.requests += 1
                await asyncio.sleep(0.2)  # as users do; a busy loop would measure contention
