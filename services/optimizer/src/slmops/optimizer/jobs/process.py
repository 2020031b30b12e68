"""Starts a job's process, forwards its progress, and makes sure that it stops when we stop."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from slmops.contracts.errors import OptimizationFailed, Problem
from slmops.optimizer.domain.result import RESULT_FILE, JobResult
from slmops.optimizer.jobs.memory_watch import MemoryWatch
from slmops.optimizer.recipes.spec import SPEC_FILE, JobSpec

OnProgress = Callable[[str, int, int], Awaitable[None]]
"""Called with the step, the number of steps done before it, and the total number of steps."""

_LOG_LINES = 20
# By default glibc returns large tensors to the kernel at once and requests them again. Keeping them halves the training
# time.
_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 33), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}


async def run_job(
    source: Path,
    work: Path,
    spec: JobSpec,
    on_progress: OnProgress,
    timeout: timedelta,
    held: Sequence[int] = (),
) -> JobResult:
    """Optimizes `source` in `work`, continuing from what an earlier run left there.

    The process and all its children are killed when this coroutine is cancelled, when `timeout` passes, when its memory
    exceeds the spec's limit, or when we are killed. Until they are dead they hold the descriptors `held`. Raises the
    job's own error, `NotEnoughMemory`, or, if the process died without an error, `OptimizationFailed` with the end of
    its log.
    """
    spec_file = await asyncio.to_thread(_write_spec, work, spec)
    process = await _start(source, work, spec_file, held)
    memory = MemoryWatch(process.pid, spec.memory_limit_bytes)
    watching = asyncio.create_task(memory.run())
    try:
        async with asyncio.timeout(timeout.total_seconds()):
            problem, log = await asyncio.gather(_follow(process, on_progress), _tail(process))
            code = await process.wait()
    except TimeoutError as error:
        raise OptimizationFailed(
            f"the job took longer than {timeout}", where=str(source), fix="Raise SLMOPS_JOB_TIMEOUT."
        ) from error
    finally:
        watching.cancel()
        await _kill(process)
    if problem:
        raise problem.error()
    memory.check(code)
    if code:
        raise OptimizationFailed(
            f"the job died with code {code}: {log}", where=str(source), fix="See the optimizer's log."
        )
    return JobResult.model_validate_json(await asyncio.to_thread((work / RESULT_FILE).read_bytes))


def _write_spec(work: Path, spec: JobSpec) -> Path:
    work.mkdir(parents=True, exist_ok=True)
    path = work / SPEC_FILE
    path.write_text(spec.model_dump_json(by_alias=True), encoding="utf-8")
    return path


async def _start(source: Path, work: Path, spec_file: Path, held: Sequence[int]) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "slmops.optimizer.jobs.main", "--source", str(source), "--work", str(work)),
        *("--spec", str(spec_file), "--die-with-stdin"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # its own process group, so that we can kill its benchmark with it
        env=os.environ | _MEMORY,
        pass_fds=held,
    )


async def _follow(process: asyncio.subprocess.Process, on_progress: OnProgress) -> Problem | None:
    assert process.stdout
    problem = None
    async for line in process.stdout:
        message = json.loads(line)
        if "code" in message:
            problem = Problem.model_validate(message)
        else:
            await on_progress(message["step"], message["done"], message["of"])
    return problem


async def _tail(process: asyncio.subprocess.Process) -> str:
    """Returns the last lines of stderr. Reads in pieces, because a progress bar may exceed the line limit."""
    assert process.stderr
    kept: deque[str] = deque(maxlen=_LOG_LINES)
    while piece := await process.stderr.read(65536):
        kept.extend(line for line in piece.decode(errors="replace").replace("\r", "\n").splitlines() if line.strip())
    return "\n".join(kept)


async def _kill(process: asyncio.subprocess.Process) -> None:
    """Kills the process group. Needed even after the process has ended, because a child may still run."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
