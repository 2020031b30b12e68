"""Runs onnxruntime-genai in one process as its examples do, without API and gateway.

The process reads JSON lines `{"prompt", "max_tokens", "clients"}` from stdin and answers each with
`{"tokens", "seconds", "ttft_s": […]}`. Several clients are several generators that take turns.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ADAPTER = "adapter.onnx_adapter"


@dataclass(frozen=True)
class Answered:
    """The answer: `tokens` and `seconds` of all clients together, and the time to first token of each."""

    tokens: int
    seconds: float
    ttft_s: list[float]


class BareRuntime:
    """The process, which loads the model at start."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def answer(self, prompt: str, max_tokens: int, clients: int = 1) -> Answered:
        assert self._process.stdin and self._process.stdout
        order = {"prompt": prompt, "max_tokens": max_tokens, "clients": clients}
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        return Answered(**json.loads(await self._process.stdout.readline()))


@asynccontextmanager
async def bare_runtime(model: Path, *, library_defaults: bool = False) -> AsyncIterator[BareRuntime]:
    """Starts the process. `library_defaults`: use the library's thread settings instead of the gateway's."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, __file__, str(model), "defaults" if library_defaults else "as the gateway"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield BareRuntime(process)
    finally:
        process.kill()
        await process.wait()


def main(folder: str, settings: str) -> None:
    import onnxruntime_genai as og

    og.disable_telemetry_events()
    config = og.Config(folder)
    if settings != "defaults":
        threads = {"intra_op_num_threads": len(os.sched_getaffinity(0)), "session.intra_op.allow_spinning": "0"}
        threads["log_severity_level"] = 3  # the runtime warns about an adapter's inputs
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
    model = og.Model(config)
    tokenizer = og.Tokenizer(model)
    adapters = og.Adapters(model) if os.path.exists(f"{folder}/{_ADAPTER}") else None
    if adapters:
        adapters.load(f"{folder}/{_ADAPTER}", _ADAPTER)
    for line in sys.stdin:
        print(json.dumps(_answer(og, model, tokenizer, adapters, **json.loads(line))), flush=True)


def _answer(
    og: Any, model: Any, tokenizer: Any, adapters: Any, prompt: str, max_tokens: int, clients: int
) -> dict[str, Any]:
    start = time.perf_counter()
    messages = json.dumps([{"role": "user", "content": prompt}])
    running, tokens = [], 0
    first: dict[int, float] = {}
    for client in range(clients):
        ids = tokenizer.encode(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(ids) + max_tokens, do_sample=False)
        generator = og.Generator(model, params)
        if adapters:
            generator.set_active_adapter(adapters, _ADAPTER)
        generator.append_tokens(ids)
        running.append((client, generator, tokenizer.create_stream()))
    while running:
        for turn in list(running):
            client, generator, stream = turn
            generator.generate_next_token()
            stream.decode(generator.get_next_tokens()[0])
            first.setdefault(client, time.perf_counter() - start)
            tokens += 1
            if generator.is_done():
                running.remove(turn)
    return {"tokens": tokens, "seconds": time.perf_counter() - start, "ttft_s": list(first.values())}


if __name__ == "__main__":
    main(*sys.argv[1:])
