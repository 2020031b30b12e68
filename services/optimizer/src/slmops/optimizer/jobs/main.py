"""Runs one job in a process that can be killed and restarted at any time: `python -m slmops.optimizer.jobs.main`.

Stdout has one JSON object per line: `{"step", "done", "of"}` when a step begins or makes progress, and a `Problem` if
the job fails; then the exit code is 1. The work folder belongs to one source. Finished steps are not repeated: the
output of a step is renamed to its final name when it is complete.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from slmops.contracts.descriptor import digest_of
from slmops.contracts.errors import DiskFull, NotEnoughMemory, OptimizationFailed, Problem, UnsupportedArchitecture
from slmops.contracts.evaluation import Evaluation, Verdict
from slmops.contracts.recipe import Recipe
from slmops.contracts.search import SearchSpec
from slmops.kit.modelfile.facts import folder_bytes
from slmops.optimizer.domain.choice import choose
from slmops.optimizer.domain.front import front
from slmops.optimizer.domain.gate import judge, max_bytes, shown
from slmops.optimizer.domain.quantized import least_bytes
from slmops.optimizer.domain.result import PICTURES, RESULT_FILE, JobResult, ReferenceFigures, Variant
from slmops.optimizer.jobs.capacity import COPIES_PER_VARIANT, check_disk, check_memory, copies, memory
from slmops.optimizer.measure.evaluate import Reference, evaluate, reference
from slmops.optimizer.measure.plot import draw
from slmops.optimizer.measure.tasks import bundled_tasks, read_tasks
from slmops.optimizer.measure.texts import evaluation_text, read_texts
from slmops.optimizer.recipes.library import recipe_named
from slmops.optimizer.recipes.pipeline import Pipeline, write_atomically
from slmops.optimizer.recipes.progress import Progress, Tell
from slmops.optimizer.recipes.search import Search, explicit
from slmops.optimizer.recipes.spec import JobSpec

_BEFORE_RECIPES = 3  # read, export, reference


class Job:
    """The steps of a job. A step does nothing if its output exists."""

    def __init__(self, source: Path, work: Path, spec: JobSpec, tell: Tell) -> None:
        """Checks that the job can succeed before any work starts.

        Raises `InvalidRecipe`, `InvalidMessage`, `NotEnoughMemory`, `DiskFull`, `OptimizationFailed` if no variant can
        be small enough, and what `inspect` raises.
        """
        self.spec, self.work = spec, work
        self.recipes = tuple(map(explicit, spec.recipes))
        self.text = evaluation_text(spec.evaluation_texts)
        if spec.calibration_texts:
            read_texts(spec.evaluation_texts, spec.calibration_texts)  # raises if they overlap
        self.tasks = read_tasks(spec.tasks) if spec.tasks else bundled_tasks()
        self.timings_s: dict[str, float] = {}
        variants = spec.search.max_trials if spec.search else len(self.recipes)
        self.progress = Progress(_BEFORE_RECIPES + variants, tell)
        self.pipeline = Pipeline(source, work, spec, self.progress.within)
        self._check_size()
        self.memory = memory(spec.memory_limit_bytes)  # measured before we use some of it ourselves
        check_memory(self.pipeline.facts, self.memory)
        left_behind = COPIES_PER_VARIANT * variants if spec.search else sum(map(copies, self.recipes))
        check_disk(self.pipeline.facts, work, left_behind)

    def _check_size(self) -> None:
        """Refuses a model that is too large for every recipe. A search may prune it."""
        sizes = [least_bytes(recipe, self.pipeline.facts.parameters) for recipe in self.recipes]
        limit = max_bytes(self.spec.profile)
        if self.spec.search is None and min(sizes) > limit:
            raise OptimizationFailed(
                f"the model is too large for {self.spec.profile.name}: each variant has at least "
                f"{shown('bytes', min(sizes))}, {shown('bytes', limit)} are allowed",
                where=str(self.pipeline.source),
                fix="Use a smaller model, a recipe that prunes it, or a profile of larger devices.",
            )

    def run(self) -> JobResult:
        """Makes and judges all variants. A recipe that fails is a refused variant, not a failed job.

        Raises what `Pipeline` and `reference` raise.
        """
        with self._part("read"):
            full = self.pipeline.read()
        with self._part("export"):
            self.pipeline.export(full)
        with self._part("reference"):
            self.against = reference(full, self.text)
        search = self.spec.search
        variants = self._search(search) if search else tuple(map(self._variant, self.recipes))
        result = JobResult(
            reference=self._figures(self.against),
            variants=variants,
            front=front(variants),
            choice=choose(variants, self.spec.profile, search.prefer if search else "smallest", self._anchored),
            timings_s=self.timings_s,
        )
        if search:
            draw(result, self.spec.profile, [self.work / name for name in PICTURES])
        return result

    def _search(self, search: SearchSpec) -> tuple[Variant, ...]:
        log = self._evaluations / "trials.jsonl"
        return Search(search, self.spec.profile, self.recipes, log, self.progress).run(self._variant)

    @property
    def _anchored(self) -> frozenset[str]:
        """Recipes that keep a predecessor's grids."""
        return frozenset(r.name for r in self.recipes if r.anchored_on)

    def _figures(self, against: Reference) -> ReferenceFigures:
        return ReferenceFigures(
            architecture=self.pipeline.facts.architecture,
            parameters=self.pipeline.facts.parameters,
            ppl=against.ppl,
            windows=len(against.tokens),
            window_tokens=against.tokens.shape[1],
            text=against.text.name,
            texts=against.text.count,
            text_tokens=against.text_tokens,
            prompt_format=self.pipeline.prompt_format,
        )

    def _variant(self, recipe: Recipe) -> Variant:
        start, path, evaluation = time.perf_counter(), None, None
        try:
            self._check_least_bytes(recipe)
            check_memory(self.pipeline.facts, self.memory, recipe)
            with self._timed(recipe.name):
                folder = self.pipeline.variant(recipe, lambda name: self.progress.begin(f"{recipe.name}: {name}"))
            self.progress.begin(f"{recipe.name}: evaluate")
            with self._timed(f"evaluate {recipe.name}"):
                evaluation = self._evaluate(folder)
            path = folder.relative_to(self.work).as_posix()
            verdict = judge(evaluation, self.spec.profile)
        except (OptimizationFailed, UnsupportedArchitecture, NotEnoughMemory) as error:
            verdict = Verdict(passed=False, reasons=(str(error),))
        self.progress.part_done()
        return Variant(
            recipe=recipe.name,
            definition=recipe,
            evaluation=evaluation,
            verdict=verdict,
            path=path,
            seconds=round(time.perf_counter() - start, 2),
        )

    def _check_least_bytes(self, recipe: Recipe) -> None:
        """Refuses a recipe whose variant is certainly too large. A search makes it, to learn its size."""
        least, limit = least_bytes(recipe, self.pipeline.facts.parameters), max_bytes(self.spec.profile)
        if self.spec.search is None and least > limit:
            raise OptimizationFailed(f"bytes at least {shown('bytes', least)} > {shown('bytes', limit)}")

    def _evaluate(self, folder: Path) -> Evaluation:
        """Measures a variant. Of a variant with too many bytes, only the bytes are counted."""
        measured = self._evaluations / f"{folder.name}.json"
        if not measured.exists():
            size_bytes = folder_bytes(folder)
            if size_bytes > max_bytes(self.spec.profile):
                return Evaluation(bytes=size_bytes)
            measured.parent.mkdir(parents=True, exist_ok=True)
            found = evaluate(
                folder,
                self.against,
                golden=self.spec.golden,
                tasks=self.tasks,
                seed=self.spec.seed,
                prompt_format=self.pipeline.prompt_format,
            )
            write_atomically(measured, found.model_dump_json())
        return Evaluation.model_validate_json(measured.read_bytes())

    @cached_property
    def _evaluations(self) -> Path:
        """The folder for measurements; its name is a digest of what they depend on besides variant and tools."""
        questions = [prompt.model_dump_json() for prompt in self.spec.golden] + [task.digest for task in self.tasks]
        text = [self.text.digest, self.text.own]  # the digest alone does not say which windows are used
        key = digest_of(json.dumps([*text, self.spec.seed, *questions]).encode())
        return self.work / "evaluations" / key[7:23]

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        self.progress.begin(name)
        with self._timed(name):
            yield
        self.progress.part_done()

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.timings_s[name] = round(time.perf_counter() - start, 2)


def main() -> int:
    arguments = _arguments()
    if arguments.die_with_stdin:
        threading.Thread(target=_die_with_stdin, daemon=True).start()
    # By default torch's threads spin, which takes 64 s instead of 15 s on a busy machine.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    tell = _private_stdout()
    try:
        result = Job(arguments.source, arguments.work, _spec(arguments), tell).run()
        write_atomically(arguments.work / RESULT_FILE, result.model_dump_json(indent=2))
    except Exception as error:  # the process boundary: report every error to the parent as a Problem
        return _fail(error, tell)
    return 0


def _spec(arguments: argparse.Namespace) -> JobSpec:
    if arguments.spec:
        return JobSpec.model_validate_json(arguments.spec.read_bytes())
    return JobSpec(recipes=tuple(map(recipe_named, arguments.recipes.split(","))))


def _fail(error: Exception, tell: Tell) -> int:
    import traceback

    traceback.print_exception(error)
    if isinstance(error, OSError) and error.errno in (28, 122):  # ENOSPC, EDQUOT
        error = DiskFull("the disk is full", where=error.filename, fix="Free space in the optimizer's work folder.")
    tell(Problem.of(error).model_dump())
    return 1


def _arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m slmops.optimizer.jobs.main", description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="a model file or directory")
    parser.add_argument("--work", type=Path, required=True, help="work folder that only this job uses")
    parser.add_argument("--recipes", default="int8,int4", help="names, separated by commas")
    parser.add_argument("--die-with-stdin", action="store_true", help="kill this process group when stdin is closed")
    parser.add_argument("--spec", type=Path, help="a JobSpec as JSON, instead of --recipes")
    return parser.parse_args(argv)


def _die_with_stdin() -> None:
    """Kills this process group when the parent dies: the parent holds the other end of stdin and never writes.

    Otherwise, after the service is killed, this process would keep working in the folder where a new service starts the
    same job.
    """
    os.read(0, 1)  # not sys.stdin: holding its lock here would crash the interpreter at exit
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _private_stdout() -> Tell:
    """Reserves stdout for our JSON lines: descriptor 1, to which native code prints, becomes a copy of stderr."""
    stream = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    return lambda line: print(json.dumps(line), file=stream, flush=True)


if __name__ == "__main__":
    sys.exit(main())
