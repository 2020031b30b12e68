"""One job as a process that can be killed at any moment and started again: `python -m slmops.optimizer.job`.

Stdout is one JSON object per line, `{"step", "done", "of"}` when a step begins and a `Problem` if the job fails; then
the exit code is 1. The work folder belongs to one source. What is finished in it is not done again: each step's output
appears under its final name complete, by a rename.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from slmops.contracts.errors import DiskFull, Problem
from slmops.contracts.evaluation import Evaluation
from slmops.contracts.profile import EDGE_SMALL, DeviceProfile
from slmops.kit.modelfile import inspect
from slmops.optimizer.domain import Candidate, choose, judge
from slmops.optimizer.evaluate import Reference, evaluate, reference
from slmops.optimizer.intake import materialize
from slmops.optimizer.quantize import Recipe, quantize, recipe_named
from slmops.optimizer.result import RESULT_FILE, JobResult, ReferenceFigures, Variant

Tell = Callable[[dict[str, object]], None]
_TOOLS = ("torch", "transformers", "gguf", "onnxruntime", "onnxruntime-genai")


class Job:
    """The steps, each of which does nothing if its output exists."""

    def __init__(self, source: Path, work: Path, recipes: Sequence[Recipe], profile: DeviceProfile, tell: Tell) -> None:
        self.source, self.work, self.recipes, self.profile, self.tell = source, work, recipes, profile, tell
        self.timings_s: dict[str, float] = {}

    def run(self) -> JobResult:
        facts = inspect(self.source)
        self._claim(facts.size_bytes)
        full = self.work / "reference"
        with self._step("read"):
            if not full.exists():
                materialize(self.source, full)
        with self._step("reference"):
            against = reference(full)
        candidates = [self._candidate(recipe, full, against) for recipe in self.recipes]
        figures = ReferenceFigures(
            architecture=facts.architecture,
            parameters=facts.parameters,
            ppl=against.ppl,
            windows=len(against.tokens),
            window_tokens=against.tokens.shape[1],
        )
        return JobResult(
            reference=figures,
            variants=tuple(Variant(**dict(c), path=f"variants/{c.recipe}") for c in candidates),
            choice=choose(candidates, self.profile),
            timings_s=self.timings_s,
        )

    def _candidate(self, recipe: Recipe, full: Path, against: Reference) -> Candidate:
        variant, measured = self.work / "variants" / recipe.name, self.work / "evaluations" / f"{recipe.name}.json"
        with self._step(f"quantize {recipe.name}"):
            if not variant.exists():
                variant.parent.mkdir(exist_ok=True)
                quantize(full, variant, recipe)
        with self._step(f"evaluate {recipe.name}"):
            if not measured.exists():
                measured.parent.mkdir(exist_ok=True)
                write_atomically(measured, evaluate(variant, against).model_dump_json())
        evaluation = Evaluation.model_validate_json(measured.read_bytes())
        return Candidate(recipe=recipe.name, evaluation=evaluation, verdict=judge(evaluation, self.profile))

    def _claim(self, size_bytes: int) -> None:
        """Empty the folder if what lies there was made from something else, by other recipes or by other tools."""
        key = {"size_bytes": size_bytes, "tools": {tool: version(tool) for tool in _TOOLS}}
        key |= {"recipes": {r.name: [r.precision, dict(r.options)] for r in self.recipes}}
        claim, text = self.work / "job.json", json.dumps(key, sort_keys=True)
        if claim.exists() and claim.read_text() == text:
            return
        for name in ("reference", "variants", "evaluations"):
            shutil.rmtree(self.work / name, ignore_errors=True)
        self.work.mkdir(parents=True, exist_ok=True)
        write_atomically(claim, text)

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        self.tell({"step": name, "done": len(self.timings_s), "of": 2 + 2 * len(self.recipes)})
        start = time.perf_counter()
        yield
        self.timings_s[name] = round(time.perf_counter() - start, 2)


def write_atomically(path: Path, text: str) -> None:
    scratch = path.with_name(path.name + ".part")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def main() -> int:
    arguments = _arguments()
    if arguments.die_with_stdin:
        threading.Thread(target=_die_with_stdin, daemon=True).start()
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # torch's threads spin otherwise: on a busy machine 64 s instead of 15
    tell = _private_stdout()
    try:
        profile_file = arguments.profile_json
        profile = DeviceProfile.model_validate_json(profile_file.read_bytes()) if profile_file else EDGE_SMALL
        recipes = [recipe_named(name) for name in arguments.recipes.split(",")]
        result = Job(arguments.source, arguments.work, recipes, profile, tell).run()
        write_atomically(arguments.work / RESULT_FILE, result.model_dump_json(indent=2))
    except Exception as error:  # the process's edge: everything becomes a Problem for the parent
        return _fail(error, tell)
    return 0


def _fail(error: Exception, tell: Tell) -> int:
    import traceback

    traceback.print_exception(error)
    if isinstance(error, OSError) and error.errno in (28, 122):  # ENOSPC, EDQUOT
        error = DiskFull("the disk is full", where=error.filename, fix="Free space in the optimizer's work folder.")
    tell(Problem.of(error).model_dump())
    return 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m slmops.optimizer.job", description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="a GGUF file or a Hugging Face directory")
    parser.add_argument("--work", type=Path, required=True, help="folder of this job alone")
    parser.add_argument("--recipes", default="int8,int4", help="names, separated by commas")
    parser.add_argument("--die-with-stdin", action="store_true", help="kill this process group when stdin ends")
    parser.add_argument("--profile-json", type=Path, help="a DeviceProfile; default: edge-small")
    return parser.parse_args()


def _die_with_stdin() -> None:
    """The parent holds the other end and never writes. Without this a killed service would leave us at work in the
    folder in which its successor starts the same job."""
    os.read(0, 1)  # not sys.stdin: its lock, held here, is fatal when the interpreter ends
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _private_stdout() -> Tell:
    """Keep stdout for us: the builder and native code print to descriptor 1, which from now on is stderr."""
    stream = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    return lambda line: print(json.dumps(line), file=stream, flush=True)


if __name__ == "__main__":
    sys.exit(main())
