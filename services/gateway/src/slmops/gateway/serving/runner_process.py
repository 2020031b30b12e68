"""The process that runs a model. It reads JSON lines from stdin and writes JSON lines to stdout until stdin ends.

In:  {"id", …the fields of `InferenceRequest`}   {"cancel": id}
Out: {"event": "ready", …`Ready`}                first; on failure {"event": "error", "problem"}, then the process ends
     {"id", "event": "token", …`Token`}          only for a request with `stream`
     {"id", "event": "done", …`Done`}
     {"id", "event": "error", "problem"}         this request failed; the process continues

Answers are generated in turns of one token, so that a short answer never waits for a long one.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from slmops.contracts.errors import InferenceFailed, Problem
from slmops.gateway.serving.generation import Generation, LoadedModel
from slmops.gateway.serving.inference import InferenceRequest, Ready
from slmops.gateway.serving.memory import rss_bytes
from slmops.kit.lifeline import die_with

_log = logging.getLogger(__name__)

Answer = Callable[[dict[str, Any]], None]


class TurnTaker:
    """Steps the running answers in turn. At most `parallel` answers run, which bounds memory; others wait in order."""

    def __init__(self, model: LoadedModel, answer: Answer, parallel: int) -> None:
        self._model, self._answer, self._parallel = model, answer, parallel
        self._waiting: deque[tuple[str, InferenceRequest, float]] = deque()
        self._running: dict[str, tuple[Generation, bool]] = {}

    @property
    def idle(self) -> bool:
        return not (self._running or self._waiting)

    def take(self, message: dict[str, Any]) -> None:
        if "cancel" in message:
            self._running.pop(message["cancel"], None)
            self._waiting = deque(entry for entry in self._waiting if entry[0] != message["cancel"])
        else:
            self._waiting.append((message["id"], InferenceRequest.model_validate(message), time.perf_counter()))

    def turn(self) -> None:
        """Starts waiting requests while there is room, then runs one step of every running answer."""
        while self._waiting and len(self._running) < self._parallel:
            request_id, request, received = self._waiting.popleft()
            self._run_guarded(request_id, partial(self._begin, request_id, request, received))
        for request_id in list(self._running):
            self._run_guarded(request_id, partial(self._step, request_id))

    def _begin(self, request_id: str, request: InferenceRequest, received: float) -> None:
        self._running[request_id] = Generation(self._model, request, received), request.stream

    def _step(self, request_id: str) -> None:
        generation, stream = self._running[request_id]
        piece = generation.step()
        if stream and (piece.text or piece.logprobs or piece.calls):
            self._answer({"id": request_id, "event": "token", **asdict(piece)})
        if done := generation.done():
            del self._running[request_id]
            self._answer({"id": request_id, "event": "done", **asdict(done)})

    def _run_guarded(self, request_id: str, work: Callable[[], None]) -> None:
        """Runs `work`. If it fails, answers the request with the error and drops it; other requests continue."""
        try:
            work()
        except (InferenceFailed, RuntimeError, MemoryError) as error:
            self._running.pop(request_id, None)
            if not isinstance(error, InferenceFailed):
                _log.error("generation failed: %s", type(error).__name__)  # the text may quote the prompt
                error = InferenceFailed(f"the runtime failed with {type(error).__name__}")
            self._answer({"id": request_id, "event": "error", "problem": Problem.of(error).model_dump()})


def _own_stdout() -> Answer:
    """Reserves the real stdout for answers. Output of native code goes to stderr and cannot corrupt a line."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        out.write(json.dumps(message, ensure_ascii=False) + "\n")
        out.flush()

    return answer


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve one onnxruntime-genai model over stdin and stdout.")
    parser.add_argument("--model", type=Path, required=True, help="folder with genai_config.json")
    parser.add_argument("--context-tokens", type=int, default=2048, help="limit for prompt and answer together")
    parser.add_argument("--parallel", type=int, default=4, help="answers that are generated in turns; others wait")
    parser.add_argument("--threads", type=int, default=None, help="default: one per processor that it may use")
    parser.add_argument("--nice", type=int, default=0)
    parser.add_argument("--parent", type=int, default=None, help="process id; exit when this process ends")
    return parser.parse_args()


def _messages(lines: Iterable[str], queue: SimpleQueue[dict[str, Any] | None]) -> None:
    for line in lines:
        queue.put(json.loads(line))
    queue.put(None)


def _serve(turns: TurnTaker, queue: SimpleQueue[dict[str, Any] | None]) -> None:
    while True:
        while turns.idle or not queue.empty():
            message = queue.get()
            if message is None:
                return
            turns.take(message)
        turns.turn()


def main() -> int:
    options = _arguments()
    answer = _own_stdout()
    if options.parent is not None:
        die_with(options.parent)
    os.nice(options.nice)
    started = time.perf_counter()
    try:
        model = LoadedModel(options.model, context_tokens=options.context_tokens, threads=options.threads)
    except InferenceFailed as error:
        answer({"event": "error", "problem": Problem.of(error).model_dump()})
        return 1
    ready = Ready(
        load_s=time.perf_counter() - started,
        rss_bytes=rss_bytes(os.getpid()),
        model=str(model.model.type),
        context_tokens=model.context_tokens,
        tool_format=model.tool_format,
    )
    answer({"event": "ready", **asdict(ready)})
    queue: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
    threading.Thread(target=_messages, args=(sys.stdin, queue), daemon=True).start()
    _serve(TurnTaker(model, answer, options.parallel), queue)
    return 0


if __name__ == "__main__":
    # Skips the interpreter's teardown: the thread may still be reading stdin, and there is nothing to save.
    os._exit(main())
