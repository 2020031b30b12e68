"""The model runner, its router and its probe, on a real onnxruntime-genai model in real processes."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import aclosing
from datetime import timedelta
from math import inf
from pathlib import Path
from typing import Any

import psutil
import pytest

from slmops.contracts.errors import ContextLengthExceeded, InferenceFailed, NotReady, PromptRefused, RunnerDied
from slmops.contracts.prompts.golden import GoldenPrompt
from slmops.gateway.install.golden import GoldenPrompts
from slmops.gateway.install.probe import ProbeBudget, probe
from slmops.gateway.serving.generation import LoadedModel
from slmops.gateway.serving.inference import ChatMessage, Done, InferenceRequest, Token
from slmops.gateway.serving.releases import Serving, ServingLimits
from slmops.gateway.serving.runner import ProcessRunner, Runner
from slmops.gateway.serving.runner_process import TurnTaker

MakeRunner = Callable[..., ProcessRunner]
QUICK = ServingLimits(backoff=timedelta(milliseconds=20), drain=timedelta(seconds=20), patience=timedelta(seconds=20))
NO_LIMITS = ProbeBudget(min_tokens_per_s=0, max_ttft_s=inf, max_rss_bytes=10**12)


def ask(text: str = "Capital of France?", **fields: object) -> InferenceRequest:
    return InferenceRequest.model_validate({"messages": [{"role": "user", "content": text}], "max_tokens": 8, **fields})


async def answer(runner: Runner, request: InferenceRequest) -> tuple[str, Done]:
    """Returns the streamed text and the final item."""
    async with aclosing(runner.generate(request)) as items:
        pieces = [item async for item in items]
    assert isinstance(pieces[-1], Done)
    return "".join(piece.text for piece in pieces[:-1]), pieces[-1]


async def ask_serving(serving: Serving, request: InferenceRequest) -> tuple[str, Done]:
    """Returns the version that answered and the final item."""
    async with aclosing(serving.generate(request)) as items:
        pieces = [item async for item in items]
    release, done = pieces[-1]
    assert isinstance(done, Done)
    return release.version, done


async def test_a_runner_answers_with_its_figures_and_greedy_answers_are_repeatable(make_runner: MakeRunner) -> None:
    runner = make_runner()
    ready = await runner.start()
    assert ready.rss_bytes > 10**7
    streamed, done = await answer(runner, ask(max_tokens=20))
    assert streamed == done.text
    assert 0 < done.completion_tokens <= 20
    assert done.prompt_tokens > 10
    assert done.ttft_s > 0
    assert done.tokens_per_s is None or done.tokens_per_s > 0
    assert (await answer(runner, ask(max_tokens=20)))[1].text == done.text
    assert (await answer(runner, ask(max_tokens=20, stream=False)))[0] == ""
    assert runner.peak_rss_bytes() >= ready.rss_bytes * 0.9


async def test_a_chat_message_has_a_longer_prompt_than_raw_text(make_runner: MakeRunner) -> None:
    runner = make_runner()
    await runner.start()
    _, chat = await answer(runner, ask("hello"))
    _, raw = await answer(runner, InferenceRequest(prompt="hello", max_tokens=8))
    assert chat.prompt_tokens > raw.prompt_tokens


async def test_a_sampled_answer_is_the_same_for_the_same_seed_only(make_runner: MakeRunner) -> None:
    runner = make_runner()
    await runner.start()

    async def sampled(seed: int) -> str:
        return (await answer(runner, ask(max_tokens=40, temperature=1.5, seed=seed)))[1].text

    assert await sampled(7) == await sampled(7)
    assert len({await sampled(seed) for seed in (7, 8, 9)}) > 1


async def test_a_stop_string_ends_the_answer_before_it(make_runner: MakeRunner) -> None:
    runner = make_runner()
    await runner.start()
    _, whole = await answer(runner, ask(max_tokens=60))
    word = whole.text[2:4]
    streamed, done = await answer(runner, ask(max_tokens=60, stop=[word]))
    assert streamed == done.text == whole.text[: whole.text.index(word)]
    assert done.finish_reason == "stop"


async def test_a_prompt_longer_than_the_context_is_refused_and_the_runner_keeps_running(
    make_runner: MakeRunner,
) -> None:
    runner = make_runner(context_tokens=100)
    await runner.start()
    with pytest.raises(ContextLengthExceeded, match="maximum context length is 100 tokens"):
        await answer(runner, ask("word " * 300))
    with pytest.raises(PromptRefused, match="empty"):
        await answer(runner, InferenceRequest(prompt=""))
    _, done = await answer(runner, ask(max_tokens=100_000))
    assert done.prompt_tokens + done.completion_tokens <= 100


async def test_concurrent_prompts_get_the_same_answers_as_single_ones(make_runner: MakeRunner) -> None:
    """Long prompts are processed in pieces between the tokens of other answers; neither may change the other."""
    runner = make_runner()
    await runner.start()
    requests = [ask("long " * 60), ask("short"), ask("middle " * 20)]
    alone = [(await answer(runner, request))[1].text for request in requests]
    together = await asyncio.gather(*(answer(runner, request) for request in requests))
    assert [done.text for _, done in together] == alone


async def test_closing_a_stream_sends_a_cancellation_to_the_process(
    make_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, sent = make_runner(context_tokens=512), []
    await runner.start()
    send = runner._send
    monkeypatch.setattr(runner, "_send", lambda message: (sent.append(message), send(message)))
    async with aclosing(runner.generate(ask(max_tokens=400))) as items:
        assert isinstance(await anext(items), Token)
    assert sent[1:] == [{"cancel": sent[0]["id"]}]
    _, done = await answer(runner, ask(max_tokens=1))
    assert done.completion_tokens == 1
    assert len(sent) == 3, "a finished answer is not cancelled"


def test_a_cancelled_answer_takes_no_more_turns_running_or_waiting(genai_model: Path) -> None:
    answers: list[dict[str, Any]] = []
    turns = TurnTaker(LoadedModel(genai_model, context_tokens=512), answers.append, parallel=1)
    for name in ("running", "waiting"):
        turns.take({"id": name, **ask(max_tokens=400).model_dump(mode="json")})
    for _ in range(5):
        turns.turn()
    turns.take({"cancel": "waiting"})
    turns.take({"cancel": "running"})
    turns.take({"cancel": "unknown"})
    assert turns.idle
    assert all(answer["event"] == "token" for answer in answers)


def test_answers_take_turns_token_by_token(genai_model: Path) -> None:
    answers: list[dict[str, Any]] = []
    turns = TurnTaker(LoadedModel(genai_model, context_tokens=512), answers.append, parallel=4)
    turns.take({"id": "long", **ask("x", max_tokens=400).model_dump(mode="json")})
    for _ in range(10):
        turns.turn()
    turns.take({"id": "short", **ask("y", max_tokens=2).model_dump(mode="json")})
    while not any(answer["event"] == "done" for answer in answers):
        turns.turn()
    assert [answer["id"] for answer in answers if answer["event"] == "done"] == ["short"]


async def test_a_folder_without_a_model_is_a_typed_error(make_runner: MakeRunner, tmp_path: Path) -> None:
    with pytest.raises(InferenceFailed, match="could not be loaded"):
        await make_runner(model_dir=tmp_path).start()


async def test_a_truncated_model_is_a_typed_error(make_runner: MakeRunner, genai_model: Path, tmp_path: Path) -> None:
    shutil.copytree(genai_model, tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "model.onnx", 1000)
    runner = make_runner(model_dir=tmp_path / "cut")
    with pytest.raises(InferenceFailed):
        await runner.start()
    assert not runner.alive


async def test_a_model_that_loads_too_slowly_is_killed(make_runner: MakeRunner) -> None:
    runner = make_runner(load_timeout=timedelta(milliseconds=10))
    with pytest.raises(InferenceFailed, match=r"within 0\.01 s"):
        await runner.start()
    assert runner.pid is not None
    assert not psutil.pid_exists(runner.pid)


async def test_a_killed_runner_fails_its_requests_and_can_be_restarted(make_runner: MakeRunner) -> None:
    runner = make_runner()
    await runner.start()
    assert runner.pid
    os.kill(runner.pid, signal.SIGSTOP)  # so that it is killed before the answer is complete
    waiting = asyncio.create_task(answer(runner, ask(max_tokens=400)))
    await asyncio.sleep(0)
    os.kill(runner.pid, signal.SIGKILL)
    with pytest.raises(RunnerDied, match="SIGKILL"):
        await waiting
    await runner.dead()
    with pytest.raises(RunnerDied):
        await answer(runner, ask())
    await runner.start()
    await answer(runner, ask())


async def test_stop_waits_for_a_running_answer(make_runner: MakeRunner) -> None:
    runner = make_runner()
    await runner.start()
    waiting = asyncio.create_task(answer(runner, ask(max_tokens=100)))
    await asyncio.sleep(0)
    await runner.stop(timedelta(seconds=20))
    assert (await waiting)[1].completion_tokens > 0
    assert not runner.alive
    await runner.stop()


def test_a_runner_exits_when_its_agent_is_killed(genai_model: Path) -> None:
    code = f"""
import asyncio; from pathlib import Path
from slmops.gateway.serving.inference import Release; from slmops.gateway.serving.runner import ProcessRunner
async def main():
    runner = ProcessRunner(Release("sha256:" + "0" * 64, "tiny", "1.0.0"), Path({str(genai_model)!r}))
    await runner.start()
    print(runner.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    agent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert agent.stdout
    pid = int(agent.stdout.readline())
    assert psutil.pid_exists(pid)
    os.kill(pid, signal.SIGSTOP)  # as if busy in native code, where it cannot see that stdin was closed
    agent.kill()
    agent.wait()
    deadline = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_output_of_native_code_does_not_reach_the_protocol_on_stdout(genai_model: Path) -> None:
    """The process keeps the real stdout for itself; a print to descriptor 1 goes to stderr."""
    code = """
import os, sys
from slmops.gateway.serving.runner_process import _own_stdout
answer = _own_stdout()
os.write(1, b"noise from C++\\n")
answer({"event": "ready"})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ('{"event": "ready"}\n', "noise from C++\n")


async def test_a_swap_under_load_fails_no_request_and_measures_both_releases(make_runner: MakeRunner) -> None:
    serving, versions, stop = Serving(QUICK), [], False
    old, new = make_runner("1.0.0"), make_runner("2.0.0")
    await old.start()
    await serving.swap(old)

    async def client() -> None:
        while not stop:
            versions.append((await ask_serving(serving, ask(max_tokens=30)))[0])

    clients = [asyncio.create_task(client()) for _ in range(3)]
    await new.start()
    await serving.swap(new)
    assert not old.alive
    versions.append((await ask_serving(serving, ask()))[0])
    stop = True
    await asyncio.gather(*clients)
    assert set(versions) == {"1.0.0", "2.0.0"}
    assert versions[-1] == "2.0.0"
    taken = serving.take_measurements()
    assert {taken[r.digest].failed for r in (old.release, new.release)} == {0}
    assert sum(figures.requests for figures in taken.values()) == len(versions)
    assert taken[new.release.digest].ttft_sum_s == pytest.approx(sum(taken[new.release.digest].ttft_s))
    assert serving.take_measurements() == {}
    await serving.stop()


async def test_a_request_is_retried_when_its_runner_is_killed_before_the_first_token(make_runner: MakeRunner) -> None:
    serving, runner = Serving(QUICK), make_runner()
    await runner.start()
    await serving.swap(runner)
    assert runner.pid
    os.kill(runner.pid, signal.SIGSTOP)
    waiting = asyncio.create_task(ask_serving(serving, ask()))
    await asyncio.sleep(0.05)
    os.kill(runner.pid, signal.SIGKILL)
    await waiting
    figures = serving.take_measurements()[runner.release.digest]
    assert (figures.requests, figures.failed) == (1, 0)
    await serving.stop()


async def test_a_runner_killed_after_the_first_token_fails_the_request_and_the_next_one_is_answered(
    make_runner: MakeRunner,
) -> None:
    serving, runner = Serving(QUICK), make_runner(context_tokens=512)
    await runner.start()
    await serving.swap(runner)
    requests = 1
    while not await killed_in_the_middle(serving, runner):
        requests += 1
    await ask_serving(serving, ask())
    figures = serving.take_measurements()[runner.release.digest]
    assert (figures.requests, figures.failed) == (requests + 1, 1)
    await serving.stop()


async def killed_in_the_middle(serving: Serving, runner: ProcessRunner) -> bool:
    """Kills the runner after the first token of an answer. Returns False if it was quicker: the answer was complete."""
    async with aclosing(serving.generate(ask(max_tokens=450))) as items:
        await anext(items)
        assert runner.pid
        os.kill(runner.pid, signal.SIGKILL)
        try:
            async for _ in items:
                pass
        except RunnerDied:
            return True
    await runner.dead()
    return False


async def test_a_refused_prompt_is_not_counted_as_a_failure(make_runner: MakeRunner) -> None:
    serving, runner = Serving(QUICK), make_runner(context_tokens=64)
    await runner.start()
    await serving.swap(runner)
    with pytest.raises(PromptRefused):
        await ask_serving(serving, ask("word " * 300))
    assert serving.take_measurements() == {}
    await serving.stop()


async def test_requests_without_a_model_or_above_the_limit_are_refused_at_once(make_runner: MakeRunner) -> None:
    serving = Serving(ServingLimits(max_requests=1))
    with pytest.raises(NotReady, match="does not serve a model yet"):
        await ask_serving(serving, ask())
    runner = make_runner(context_tokens=512)
    await runner.start()
    await serving.swap(runner)
    async with aclosing(serving.generate(ask(max_tokens=400))) as items:
        await anext(items)
        with pytest.raises(NotReady, match="too many"):
            await ask_serving(serving, ask())
    await ask_serving(serving, ask())
    await serving.stop()
    with pytest.raises(NotReady):
        await ask_serving(serving, ask())


async def test_the_probe_passes_right_answers_and_fails_wrong_ones(make_runner: MakeRunner) -> None:
    runner = make_runner()
    await runner.start()
    _, done = await answer(runner, InferenceRequest(messages=(ChatMessage(role="user", content="?"),), max_tokens=32))
    right = GoldenPrompt(prompt="?", expect=(done.text[:10],))
    wrong = GoldenPrompt(prompt="?", expect=("Paris",))
    report = await probe(runner, GoldenPrompts((right,)), NO_LIMITS)
    assert (report.passed, report.reasons) == (True, ())
    assert report.peak_rss_bytes > 10**7
    report = await probe(runner, GoldenPrompts((right, wrong)), NO_LIMITS)
    assert not report.passed
    assert [result.passed for result in report.results] == [True, False]


async def test_a_runner_that_is_killed_or_hangs_during_the_probe_fails_it_with_a_reason(
    make_runner: MakeRunner,
) -> None:
    runner = make_runner()
    await runner.start()
    assert runner.pid
    golden = GoldenPrompts((GoldenPrompt(prompt="?", expect=("x",)),))
    os.kill(runner.pid, signal.SIGSTOP)
    budget = ProbeBudget(min_tokens_per_s=0, max_ttft_s=9, max_rss_bytes=10**12, timeout=timedelta(seconds=0.3))
    report = await probe(runner, golden, budget)
    assert not report.passed
    assert any("not answered within" in reason for reason in report.reasons)
    os.kill(runner.pid, signal.SIGKILL)
    report = await probe(runner, golden, budget)
    assert not report.passed
    assert any("failed" in reason for reason in report.reasons)
