"""Coverage-guided fuzzing of readers: `make fuzz`. A reader may reject a file only with a typed error.

A target turns the fuzzer's bytes into a file and passes it to the reader. One file for each new error text is kept in
tests/corpus, where the unit tests use it. A file that crashes the reader is kept, too.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import atheris

from slmops.contracts.errors import SlmopsError

CORPUS = Path(__file__).parents[1] / "corpus"


@dataclass(frozen=True)
class Target:
    """`build` turns the fuzzer's bytes into the file's bytes; `read` reads such a file in an empty folder."""

    build: Callable[[bytes], bytes]
    read: Callable[[bytes, Path], None]
    seeds: Callable[[], list[bytes]]


class Answers:
    """The error texts of a reader so far. Texts that differ only in numbers and digests count as the same."""

    def __init__(self, name: str) -> None:
        self._folder = CORPUS / name
        self._folder.mkdir(parents=True, exist_ok=True)
        self._known: set[str] = set()
        self.count = self.kinds = 0

    def keep(self, error: SlmopsError, data: bytes) -> None:
        answer = re.sub(r"sha256:\w+|\d+|'[^']*'", "#", f"{error.code} {error.what}")[:80]
        if answer in self._known:
            return
        self._known.add(answer)
        self.kinds += 1
        if len(data) <= 4096:
            self.put(data, "refused")

    def put(self, data: bytes, kind: str) -> None:
        (self._folder / f"{kind}-{sha256(data).hexdigest()[:12]}").write_bytes(data)


def fuzz(name: str, target: Target, seconds: int) -> None:
    """Runs the fuzzer, which ends the process, with an error if the reader failed. Does not return."""
    answers, scratch = Answers(name), Path(tempfile.mkdtemp())
    inputs = Path(tempfile.mkdtemp())
    for number, seed in enumerate(target.seeds()):
        (inputs / str(number)).write_bytes(seed)
    started = time.monotonic()

    def one(raw: bytes) -> None:
        if time.monotonic() - started > seconds:
            print(f"{name}: {answers.count} files, {answers.kinds} kinds of refusal, no crash", flush=True)
            os._exit(0)  # libFuzzer treats every other exit as a crash
        data = target.build(raw)
        answers.count += 1
        try:
            target.read(data, scratch)
        except SlmopsError as error:
            answers.keep(error, data)
        except BaseException:
            answers.put(data, "crash")
            raise

    options = [f"-max_total_time={seconds + 30}", "-max_len=4096", "-rss_limit_mb=1500", "-timeout=20", "-verbosity=0"]
    atheris.Setup([name, *options, str(inputs)], one)
    atheris.Fuzz()


def main(targets: Mapping[str, Callable[[], Target]]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=sorted(targets))
    parser.add_argument("--seconds", type=int, default=60)
    arguments = parser.parse_args()
    fuzz(arguments.target, targets[arguments.target](), arguments.seconds)
