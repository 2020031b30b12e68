"""Measures speed, memory, energy and answers of a genai folder, in a separate process so that its memory is its own."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from threading import Timer
from typing import IO, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from slmops.contracts.errors import OptimizationFailed
from slmops.contracts.prompts.golden import GoldenPrompt
from slmops.contracts.prompts.prompt_format import PromptFormat
from slmops.contracts.prompts.tasks import Task
from slmops.optimizer.measure.energy import EnergyMeter
from slmops.optimizer.measure.genai import GenaiModel
from slmops.optimizer.measure.golden import golden_passed
from slmops.optimizer.measure.tasks import accuracy

PROMPTS = (
    "The keeper of the lighthouse wrote in his book every evening: the wind, the ships and the birds. One night",
    "To repair a dripping tap you need a new washer and a wrench. First turn off the water, then open the tap and",
    "A thermometer measures how warm it is. When the liquid inside becomes warmer it needs more room, and therefore",
)
NEW_TOKENS = 64
_GRAM = 4
_TIMEOUT_S = 600
_Part = TypeVar("_Part", "Speed", "Answers")


class Questions(BaseModel):
    """The questions that a variant answers after its speed was measured."""

    model_config = ConfigDict(frozen=True)

    golden: tuple[GoldenPrompt, ...] = ()
    tasks: tuple[Task, ...] = ()
    prompt_format: PromptFormat = PromptFormat.CHAT


class Speed(BaseModel):
    """Medians of one greedy run of `NEW_TOKENS` per prompt of `PROMPTS`, after a warm-up. See `Evaluation`."""

    model_config = ConfigDict(frozen=True)

    tokens_per_s: float
    ttft_s: float
    peak_rss_bytes: int
    repetition: float
    joules_per_token: float
    joules_source: Literal["measured", "modelled"]


class Answers(BaseModel):
    """The results of a variant on `Questions`."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    golden_passed: int = 0
    tasks: dict[str, float] = Field(default_factory=dict)


class Benchmark:
    """A running benchmark process.

    It first measures speed; nothing else should compute meanwhile. Then it answers questions; other work may run. Both
    methods raise `OptimizationFailed` if the process died or ran for more than ten minutes.
    """

    def __init__(self, process: subprocess.Popen[str], log: IO[str], folder: Path) -> None:
        self._process, self._log, self._folder = process, log, folder

    def speed(self) -> Speed:
        return self._next(Speed)

    def answers(self) -> Answers:
        """Returns the answers. Call it after `speed`."""
        return self._next(Answers)

    def _next(self, kind: type[_Part]) -> _Part:
        assert self._process.stdout
        line = next((line for line in self._process.stdout if line.startswith("{")), None)  # native code prints too
        if line is None:
            code = self._process.wait()
            self._log.seek(0)
            lines = self._log.read().strip().splitlines() or ["no output"]
            what = f"the variant does not generate: {lines[-1][-400:]} (code {code})"
            raise OptimizationFailed(what, where=str(self._folder))
        return kind.model_validate_json(line)


@contextmanager
def benchmark(folder: Path, questions: Questions | None = None) -> Iterator[Benchmark]:
    """Starts a benchmark process and kills it at the end of the block."""
    command = [sys.executable, "-m", "slmops.optimizer.measure.benchmark", str(folder)]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as log,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        timer = Timer(_TIMEOUT_S, process.kill)
        timer.start()
        try:
            assert process.stdin
            process.stdin.write((questions or Questions()).model_dump_json())
            process.stdin.close()
            yield Benchmark(process, log, folder)
        finally:
            timer.cancel()
            process.kill()


def measure(model: GenaiModel) -> Speed:
    """Measures speed, memory and energy in this process."""
    for _ in model.tokens(model.encode(PROMPTS[0]), 2):  # warm-up: the first run includes lazy initialization
        pass
    meter = EnergyMeter()
    runs = [_run(model, prompt) for prompt in PROMPTS]
    energy = meter.read()
    return Speed(
        tokens_per_s=median((NEW_TOKENS - 1) / rest_s for _, rest_s, _ in runs),
        ttft_s=median(ttft_s for ttft_s, _, _ in runs),
        peak_rss_bytes=peak_rss_bytes(),
        repetition=sum(repetition(tokens) for _, _, tokens in runs) / len(runs),
        joules_per_token=energy.joules / (NEW_TOKENS * len(runs)),
        joules_source=energy.source,
    )


def answer(model: GenaiModel, questions: Questions) -> Answers:
    """Answers the questions in this process."""
    return Answers(
        golden_passed=golden_passed(model, questions.golden, questions.prompt_format),
        tasks={task.name: accuracy(model, task) for task in questions.tasks},
    )


def _run(model: GenaiModel, prompt: str) -> tuple[float, float, list[int]]:
    """Returns the seconds to the first token, the seconds for the rest, and the tokens."""
    encoded = model.encode(prompt)
    start = time.perf_counter()
    generated = model.tokens(encoded, NEW_TOKENS)
    tokens = [next(generated)]
    first = time.perf_counter()
    tokens.extend(generated)
    return first - start, time.perf_counter() - first, tokens


def repetition(tokens: Sequence[int]) -> float:
    """Returns the share of 4-grams that occurred before: 0 for a text without repetition, near 1 for a loop.

    This is seq-rep-4 of Welleck et al., Neural Text Generation with Unlikelihood Training, 2019.
    """
    grams = list(zip(*(tokens[start:] for start in range(_GRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams)


def peak_rss_bytes() -> int:
    """Returns the peak of this program. Linux's `ru_maxrss` survives exec and could be that of our parent."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    questions = Questions.model_validate_json(sys.stdin.read())
    model = GenaiModel(Path(sys.argv[1]))
    print(measure(model).model_dump_json(), flush=True)
    print(answer(model, questions).model_dump_json(), flush=True)


if __name__ == "__main__":
    main()
