"""A model runner in its own process, so that a crash in native code or a runaway model cannot stop the agent."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from slmops.contracts.errors import InferenceFailed, NotReady, Problem, RunnerDied
from slmops.gateway.serving.inference import (
    Done,
    InferenceRequest,
    Ready,
    Release,
    Token,
    TokenLimits,
    TokenLogprob,
    ToolCall,
    ToolFormat,
)
from slmops.gateway.serving.memory import peak_rss_bytes

log = logging.getLogger(__name__)
_LINE_LIMIT_BYTES = 16 * 2**20  # a `done` line repeats the whole answer


class Runner(Protocol):
    """Answers requests with one release."""

    @property
    def release(self) -> Release: ...

    @property
    def alive(self) -> bool: ...

    @property
    def limits(self) -> TokenLimits:
        """The limits of one request. Known after the first start."""

    @property
    def tool_format(self) -> ToolFormat | None:
        """How the model writes calls of tools; None if it does not know tools. Known after the first start."""

    async def start(self) -> Ready:
        """Loads the model; may be called again after the runner died.

        Raises `InferenceFailed`, and `NotReady` if this device cannot start a process now.
        """

    def generate(self, request: InferenceRequest) -> AsyncGenerator[Token | Done, None]:
        """Yields tokens (none without `stream`), then one `Done`. Closing the generator cancels the work.

        Raises `PromptRefused`, `RunnerDied`, `InferenceFailed`.
        """

    async def dead(self) -> None:
        """Waits until the runner has ended. Returns at once if it does not run."""

    async def stop(self, drain: timedelta = ...) -> None:
        """Lets running answers finish for at most `drain`, then kills the runner. Idempotent."""

    def peak_rss_bytes(self) -> int:
        """Returns the peak resident memory; 0 before the first start."""


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    context_tokens: int = 2048
    """Prompt and answer together; bounds the key-value cache of one request."""
    max_tokens: int = 256
    """Upper limit for one answer, whatever the request asks for. The API refuses a request for more."""
    parallel: int = 4
    """Answers that are generated in turns; further requests wait. Bounds the number of key-value caches."""
    threads: int | None = None
    """Threads of one step. None: one per processor that the process may use."""
    nice: int = 0
    load_timeout: timedelta = timedelta(minutes=2)


class ProcessRunner:
    """A `Runner` that starts `serving.runner_process`. The process never outlives the one that started it."""

    def __init__(self, release: Release, model_dir: Path, options: RunnerOptions | None = None) -> None:
        self.release = release
        self._model_dir = model_dir
        self._options = options or RunnerOptions()
        self._ids = itertools.count(1)
        self._answers: dict[str, asyncio.Queue[dict[str, Any]]] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._context_tokens = self._options.context_tokens
        self.tool_format: ToolFormat | None = None
        self._peak = 0

    @property
    def alive(self) -> bool:
        return self._reading is not None and not self._reading.done()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def limits(self) -> TokenLimits:
        return TokenLimits(self._context_tokens, min(self._options.max_tokens, self._context_tokens))

    async def start(self) -> Ready:
        self._process = await self._spawned()
        try:
            ready = await self._loaded(self._process)
        except BaseException:
            await self.kill()
            raise
        self._context_tokens, self.tool_format = ready.context_tokens, ready.tool_format
        self._reading = asyncio.create_task(self._dispatch(self._process), name=f"runner {self._process.pid}")
        return ready

    async def _spawned(self) -> asyncio.subprocess.Process:
        try:
            return await asyncio.create_subprocess_exec(
                *self._command(),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=_LINE_LIMIT_BYTES,
                start_new_session=True,  # Ctrl-C in a terminal must reach only the agent, which drains
            )
        except OSError as error:  # no memory, too many processes or files: the device's state, not the model's fault
            raise NotReady(
                f"the model runner cannot be started: {error.strerror or error}", where=self._model_dir.name
            ) from error

    async def generate(self, request: InferenceRequest) -> AsyncGenerator[Token | Done, None]:
        if not self.alive:
            raise self._death()
        request_id = str(next(self._ids))
        answers = self._answers[request_id] = asyncio.Queue()
        self._idle.clear()
        finished = False
        try:
            self._send({"id": request_id, **self._bounded(request).model_dump(mode="json")})
            while not finished:
                answer = await answers.get()
                finished = answer["event"] != "token"
                yield _item(answer)
        finally:
            del self._answers[request_id]
            if not self._answers:
                self._idle.set()
            if not finished and self.alive:
                self._send({"cancel": request_id})

    def _bounded(self, request: InferenceRequest) -> InferenceRequest:
        return request.model_copy(update={"max_tokens": min(request.max_tokens, self._options.max_tokens)})

    async def dead(self) -> None:
        if self._reading:
            await asyncio.wait([self._reading])

    async def stop(self, drain: timedelta = timedelta(seconds=60)) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(drain.total_seconds()):
                await self._idle.wait()
        self.peak_rss_bytes()
        await self.kill()
        if self._reading:
            await asyncio.wait([self._reading])

    def peak_rss_bytes(self) -> int:
        if self._process and self._process.returncode is None:
            self._peak = max(self._peak, peak_rss_bytes(self._process.pid) or 0)
        return self._peak

    def _command(self) -> list[str]:
        options = {
            "--model": self._model_dir,
            "--context-tokens": self._options.context_tokens,
            "--parallel": self._options.parallel,
            "--threads": self._options.threads,
            "--nice": self._options.nice,
            "--parent": os.getpid(),
        }
        flags = [f"{name}={value}" for name, value in options.items() if value is not None]
        return [sys.executable, "-m", "slmops.gateway.serving.runner_process", *flags]

    async def _loaded(self, process: asyncio.subprocess.Process) -> Ready:
        allowed_s = self._options.load_timeout.total_seconds()
        try:
            first = await asyncio.wait_for(_read(process), allowed_s)
        except TimeoutError:
            raise InferenceFailed(
                f"the model did not load within {allowed_s:g} s", where=self._model_dir.name
            ) from None
        if first is None:
            with suppress(TimeoutError):  # its own exit code is more useful than that of our kill
                await asyncio.wait_for(process.wait(), timeout=5)
            raise self._death()
        if first.pop("event") == "error":
            raise Problem.model_validate(first["problem"]).error()
        form = first.pop("tool_format", None)
        return Ready(**first, tool_format=ToolFormat(form) if form else None)

    async def _dispatch(self, process: asyncio.subprocess.Process) -> None:
        """Passes each message to its request until the process ends, then fails all requests that still wait."""
        try:
            while message := await _read(process):
                if waiting := self._answers.get(message["id"]):
                    waiting.put_nowait(message)
                if message["event"] == "done":
                    self.peak_rss_bytes()
        except Exception:
            log.exception("the model runner sent a message that cannot be read; killing it")
            await self.kill()
        await process.wait()
        problem = Problem.of(self._death()).model_dump()
        for waiting in self._answers.values():
            waiting.put_nowait({"event": "error", "problem": problem})

    def _send(self, message: dict[str, Any]) -> None:
        # A broken pipe means that the process died, which `_dispatch` reports.
        if self._process and self._process.stdin:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def kill(self) -> None:
        """Kills the process at once."""
        if self._process and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()  # the process has no state to save
            await self._process.wait()

    def _death(self) -> RunnerDied:
        code = self._process.returncode if self._process else None
        how = "is not running" if code is None else f"ended with {_exit(code)}"
        return RunnerDied(f"the model runner {how}", where=f"{self.release.model}:{self.release.version}")


async def _read(process: asyncio.subprocess.Process) -> dict[str, Any] | None:
    line = await process.stdout.readline() if process.stdout else b""
    # A line that was cut off when the process died is not a message.
    return dict(json.loads(line)) if line.endswith(b"\n") else None


def _item(answer: dict[str, Any]) -> Token | Done:
    fields = {name: value for name, value in answer.items() if name not in ("id", "event")}
    if answer["event"] == "error":
        raise Problem.model_validate(fields["problem"]).error()
    calls = tuple(ToolCall(**call) for call in fields.pop("calls"))
    if answer["event"] == "done":
        return Done(**fields, calls=calls)
    return Token(fields["text"], tuple(TokenLogprob(**one) for one in fields["logprobs"]), calls)


def _exit(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
