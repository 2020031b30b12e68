"""Verifies an evaluation report: downloads its files and measures them again in a separate process."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import ValidationError

from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import NotFound, OptimizationFailed, Problem
from slmops.contracts.evaluation import Verification
from slmops.contracts.model import ModelFile
from slmops.contracts.permissions import ANSWER_WITHIN
from slmops.kit.objects.store import Objects
from slmops.optimizer.jobs.report import read_report

_MARGIN_S = 10  # time to send the answer


async def verify_report(digest: Digest, objects: Objects, home: Path) -> Verification:
    """Downloads a report with its version and variant, and measures the variant again.

    Raises `NotFound` if one of them is not in the store, and what `verify` raises.
    """
    async with _folder(home) as folder:
        await objects.get_file(digest, folder / "report.json")
        report = await asyncio.to_thread(read_report, folder / "report.json")
        version = await _fetch(report.reference_files, folder / "version", objects)
        await _fetch(report.variant_files, folder / "variant", objects)
        own = report.evaluation_text.files
        if own:
            await _fetch(own, folder / "data", objects)
        return await _measure(folder, version, [folder / "data" / file.path for file in own])


@asynccontextmanager
async def _folder(home: Path) -> AsyncIterator[Path]:
    """Yields a new folder. Threads make and remove it, because it may hold gigabytes."""

    def make() -> TemporaryDirectory[str]:
        home.mkdir(parents=True, exist_ok=True)
        return TemporaryDirectory(prefix="verify-", dir=home)

    made = await asyncio.to_thread(make)
    try:
        yield Path(made.name)
    finally:
        await asyncio.to_thread(made.cleanup)


async def _fetch(files: Sequence[ModelFile], folder: Path, objects: Objects) -> Path:
    """Returns the folder with the files, or the path of the file if there is only one, such as a GGUF."""
    for file in files:
        try:
            await objects.get_file(file.digest, folder / file.path)
        except NotFound as error:
            raise NotFound(
                f"{file.path} is not in the store",
                where=file.digest,
                fix="Verify another variant: files are stored only if it passed and, in a search, was not dominated.",
            ) from error
    return folder / files[0].path if len(files) == 1 else folder


async def _measure(folder: Path, version: Path, texts: Sequence[Path]) -> Verification:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "slmops.optimizer.jobs.verify", str(folder / "report.json")),
        *("--variant", str(folder / "variant"), "--reference", str(version)),
        *(argument for text in texts for argument in ("--text", str(text))),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
        env=os.environ | {"TMPDIR": str(folder)},
    )
    try:
        async with asyncio.timeout(ANSWER_WITHIN.total_seconds() - _MARGIN_S):
            out, log = await process.communicate()
    except TimeoutError as error:
        raise OptimizationFailed(
            "the verification took too long", fix="Run it by hand: python -m slmops.optimizer.jobs.verify."
        ) from error
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    return _read(out, log)


def _read(out: bytes, log: bytes) -> Verification:
    text = out[out.find(b"{") :]  # native code may have printed something before
    with suppress(ValidationError):
        return Verification.model_validate_json(text)
    with suppress(ValidationError):
        raise Problem.model_validate_json(text).error()
    raise OptimizationFailed(f"the verification failed: {log[-500:].decode(errors='replace')}")
