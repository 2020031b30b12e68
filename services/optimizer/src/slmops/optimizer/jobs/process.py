"""Starts a job's process, forwards its progress, and always stops it with us."""

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
"""Step, steps done before it, steps in all."""

_LOG_LINES = 20
# glibc gives large tensors back to the kernel at once and asks for them again: kept, training takes half the time.
_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 33), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}


async def run_job(
    source: Path,
    work: Path,
    spec: JobSpec,
    on_progress: OnProgress,
    timeout: timedelta,
    held: Sequence[int] = (),
) -> JobResult:
    """Optimize `source` in `work`, continuing what an earlier run left there.

    The process and all its children die when this coroutine is cancelled, `timeout` passes, its memory exceeds the
    spec's limit, or we are killed; until they are dead they hold the descriptors `held`. Raises the job's own typed
    error, `NotEnoughMemory`, or `OptimizationFailed` with the end of its log if it died without one.
    """
    work.mkdir(parents=True, exist_ok=True)
    spec_file = work / SPEC_FILE
    spec_file.write_text(spec.model_dump_json(by_alias=True), encoding="utf-8")
    process = await _started(source, work, spec_file, held)
    memory = MemoryWatch(process.pid, spec.memory_limit_bytes)
    watching = asyncio.create_task(memory.run())
    try:
        async with asyncio.timeout(timeout.total_seconds()):
            problem, log = await asyncio.gather(_follow(process, on_progress), _tail(process))
            code = await process.wait()
    except TimeoutError as error:
        raise OptimizationFailed(
            f"the job took longer than {timeout}", where=str(source), fix="Raise the optimizer's job timeout."
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
    return JobResult.model_validate_json((work / RESULT_FILE).read_bytes())


async def _started(source: Path, work: Path, spec_file: Path, held: Sequence[int]) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "slmops.optimizer.jobs.main", "--source", str(source), "--work", str(work)),
        *("--spec", str(spec_file), "--die-with-stdin"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # a process group of its own, so that its benchmark dies with it
        env=os.environ | _MEMORY,
        pass_fds=held,
    )


async def _follow(process: asyncio.subprocess.Process, on_progress: OnProgress) -> Problem | None:
    assert process.stdout
    problem = None
    async for line in process.stdout:
        told = json.loads(line)
        if "code" in told:
            problem = Problem.model_validate(told)
        else:
            await on_progress(told["step"], told["done"], told["of"])
    return problem


async def _tail(process: asyncio.subprocess.Process) -> str:
    """The last lines of stderr. Read in pieces: a progress bar may be longer than a line may."""
    assert process.stderr
    kept: deque[str] = deque(maxlen=_LOG_LINES)
    while piece := await process.stderr.read(65536):
        kept.extend(line for line in piece.decode(errors="replace").replace("\r", "\n").splitlines() if line.strip())
    return "\n".join(kept)


async def _kill(process: asyncio.subprocess.Process) -> None:
    """Also after it ended: a child may have outlived it."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
