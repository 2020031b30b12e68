"""Coverage-guided fuzzing of a reader: `make fuzz` (a reader may refuse with a typed error, and may do nothing else).

A target turns the fuzzer's bytes into a file and hands it to the reader. One file for each new answer is kept in
tests/corpus, where the unit tests find it again; so is one that brings the reader down.
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
    """`build` makes the file's bytes of the fuzzer's, `read` reads such a file in an empty folder."""

    build: Callable[[bytes], bytes]
    read: Callable[[bytes, Path], None]
    seeds: Callable[[], list[bytes]]


class Answers:
    """What the reader said so far; numbers and digests in it make no new answer."""

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
    """Does not return: the fuzzer ends the process, with an error if the reader failed."""
    answers, scratch = Answers(name), Path(tempfile.mkdtemp())
    inputs = Path(tempfile.mkdtemp())
    for number, seed in enumerate(target.seeds()):
        (inputs / str(number)).write_bytes(seed)
    started = time.monotonic()

    def one(raw: bytes) -> None:
        if time.monotonic() - started > seconds:
            print(f"{name}: {answers.count} files, {answers.kinds} kinds of refusal, nothing else", flush=True)
            os._exit(0)  # libFuzzer takes every other end for a crash
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
