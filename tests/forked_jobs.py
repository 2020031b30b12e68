"""Lets an optimizer fork its jobs from a process that has imported torch, transformers and the builder: 6 s less each.

Everything else is as in `slmops.optimizer.jobs.process`: a process group of its own, a standard input whose end ends
it, and the descriptors that it holds. `test_optimizer_job` starts jobs as the service does.
"""

from __future__ import annotations

import asyncio
import os
from asyncio import StreamReader
from collections.abc import Sequence
from pathlib import Path

import forked

_HEAVY = (
    *("torch", "transformers", "transformers.models.llama.modeling_llama", "onnxruntime_genai.models.builder"),
    *("onnxruntime", "onnx_ir", "matplotlib.figure", "matplotlib.backends.backend_agg", forked.JOBS),
)


def environment() -> dict[str, str]:
    """Returns the environment by which an optimizer that `forked.start` runs forks its jobs."""
    return {forked.JOBS_PARENT: forked.parent_of(_HEAVY)}


def fork_jobs(parent: str) -> None:
    """From now on, jobs of this process are forked from the process at the socket `parent`."""
    from slmops.optimizer.jobs import process

    async def start(source: Path, work: Path, spec_file: Path, held: Sequence[int]) -> _Job:
        flags = ["--source", str(source), "--work", str(work), "--spec", str(spec_file), "--die-with-stdin"]
        (input_end, kept), (out, out_end), (err, err_end) = os.pipe(), os.pipe(), os.pipe()
        ends = (input_end, out_end, err_end)
        env = {name: value for name, value in os.environ.items() if name != forked.JOBS_PARENT} | process._MEMORY
        try:
            job = await asyncio.to_thread(forked.fork, parent, forked.JOBS, flags, env, ends, held, work)
        finally:
            for end in ends:
                os.close(end)
        return _Job(job, kept, await _reader(out), await _reader(err))

    process._start = start


class _Job:
    """What the optimizer uses of `asyncio.subprocess.Process`."""

    def __init__(self, job: forked.Forked, kept: int, out: StreamReader, err: StreamReader) -> None:
        self.pid, self.stdout, self.stderr = job.pid, out, err
        self._job = job
        self._stdin = os.fdopen(kept, "wb")  # open as long as we are

    async def wait(self) -> int:
        while (code := self._job.poll()) is None:  # noqa: ASYNC110 - no event of this process signals its end
            await asyncio.sleep(0.02)
        return code


async def _reader(pipe: int) -> StreamReader:
    reader = StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(pipe, "rb")
    )
    return reader
