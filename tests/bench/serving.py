"""Compares a deployed gateway's streaming HTTP API with a bare generation loop on the same int4 model."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from statistics import median

import httpx
from bench.bare_runtime import Answered, BareRuntime, bare_runtime
from bench.comparison import Comparison, Measured, Place
from bench.deployment import deployment
from bench.variant import int4

PROMPT, MAX_TOKENS, ROUNDS = "Write a long story about a fisherman and the sea.", 64, 4
Ask = Callable[[int], Awaitable[Answered]]


async def measure(place: Place) -> Measured:
    model = await int4(place)
    async with deployment(place) as deployed:
        place.step.progress("packaging and installing the model")
        await deployed.install(await deployed.publish("1.0.0", model))
        async with (
            bare_runtime(model) as bare,
            bare_runtime(model, library_defaults=True) as defaults,
            httpx.AsyncClient(base_url=deployed.api_url, timeout=120) as http,
        ):
            return Measured(await _compare(place, _loop(bare), _loop(defaults), lambda n: _api(http, n)))


async def _compare(place: Place, bare: Ask, defaults: Ask, api: Ask) -> list[Comparison]:
    rows = []
    for what, clients, loop, bare_is in (
        ("1 client", 1, bare, "generate loop, the gateway's thread settings"),
        ("1 client", 1, defaults, "generate loop, the library's thread settings"),
        ("3 clients", 3, bare, "3 generators in turn, the gateway's thread settings"),
    ):
        sides = _Side(loop, clients), _Side(api, clients)
        for side in sides:
            await side.ask(clients)  # warm-up: the first answers include lazy initialization
        rows.append(await place.side_by_side(what, "tokens/s", bare_is, sides[0].rate, sides[1].rate, ROUNDS))
        rows.append(Comparison(f"{what}, time to first token", bare_is, "s", *(side.ttft_s for side in sides)))
    return rows


@dataclass
class _Side:
    ask: Ask
    clients: int
    ttft_s: list[float] = field(default_factory=list)

    async def rate(self) -> float:
        """Returns tokens/s of all clients together, including prompts; stores their median time to first token."""
        answer = await self.ask(self.clients)
        self.ttft_s.append(median(answer.ttft_s))
        return answer.tokens / answer.seconds


def _loop(runtime: BareRuntime) -> Ask:
    return lambda clients: runtime.answer(PROMPT, MAX_TOKENS, clients)


async def _api(http: httpx.AsyncClient, clients: int) -> Answered:
    start = time.perf_counter()
    answers = await asyncio.gather(*(_stream(http) for _ in range(clients)))
    seconds = time.perf_counter() - start
    return Answered(sum(tokens for tokens, _ in answers), seconds, [first for _, first in answers])


async def _stream(http: httpx.AsyncClient) -> tuple[int, float]:
    """Requests one answer as a client does; returns its tokens and the seconds until the first text."""
    body = {
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start, first, tokens = time.perf_counter(), 0.0, 0
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if not first and any(choice["delta"].get("content") for choice in chunk["choices"]):
                first = time.perf_counter() - start
            if usage := chunk.get("usage"):
                tokens = usage["completion_tokens"]
    return tokens, first
