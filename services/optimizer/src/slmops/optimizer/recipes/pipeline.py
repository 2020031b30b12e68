"""Makes the reference and the variants of one version in one work folder.

The output of each pass is in a folder named by the digest of all its inputs. Recipes that start with the same passes
share these folders, and a process that was killed continues with the first unfinished pass.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

from slmops.contracts.descriptor import digest_of
from slmops.contracts.prompts.prompt_format import PromptFormat
from slmops.contracts.recipe import Recipe
from slmops.kit.atomic_write import atomic_write
from slmops.kit.modelfile import adapter_base, chat_template, inspect
from slmops.optimizer.intake import materialize
from slmops.optimizer.intake.export import check_parity, export
from slmops.optimizer.measure.texts import Texts, calibration, read_texts
from slmops.optimizer.passes import Context, Tokens
from slmops.optimizer.recipes.library import Step, check
from slmops.optimizer.recipes.spec import JobSpec

TOOLS = ("slmops-optimizer", "torch", "transformers", "gguf", "onnxruntime", "onnxruntime-genai", "onnx-ir")
"""Tools whose versions are part of every cache key."""

OnPass = Callable[[str, float], None]
CALIBRATION_WINDOWS, CALIBRATION_TOKENS = 1024, 256
MIN_CALIBRATION_WINDOWS = 16


class Pipeline:
    """Runs recipes in a work folder. `tell` receives the progress of a pass: a text and the share that is done."""

    def __init__(self, source: Path, work: Path, spec: JobSpec, tell: OnPass) -> None:
        self.source, self.work, self.spec, self.tell = source, work, spec, tell
        self.facts = inspect(source)
        self._claim()

    def _claim(self) -> None:
        """Empties the folder if its contents were made from another source or with other tools."""
        claim, text = self.work / "claim.json", json.dumps(self._root, sort_keys=True)
        if claim.exists() and claim.read_text() == text:
            return
        for name in ("reference", "base", "exports", "passes", "evaluations"):
            shutil.rmtree(self.work / name, ignore_errors=True)
        self.work.mkdir(parents=True, exist_ok=True)
        write_atomically(claim, text)

    @cached_property
    def _root(self) -> Mapping[str, object]:
        tools = {tool: version(tool) for tool in TOOLS}
        return {"size_bytes": self.facts.size_bytes, "tools": tools, "seed": self.spec.seed}

    def read(self) -> Path:
        """Returns the version as a float32 Hugging Face directory. Raises `InvalidModel` and its subclasses."""
        full = self.work / "reference"
        if not full.exists():
            materialize(self.source, full)
        return full

    def _base(self) -> Path:
        """Returns the base model of an adapter version, also as a float32 Hugging Face directory."""
        base = self.work / "base"
        if not base.exists():
            materialize(adapter_base(self.source), base)
        return base

    def export(self, model: Path) -> Path:
        """Exports a float directory as a float32 graph and checks that both give the same tokens and results.

        Raises `OptimizationFailed`, `InvalidModel`.
        """
        model = model.resolve()
        out = self.work / "exports" / digest_of(str(model.relative_to(self.work.resolve())).encode())[7:23]
        if not out.exists():
            out.parent.mkdir(exist_ok=True)
            unchecked = out.with_name(f"{out.name}.unchecked")
            shutil.rmtree(unchecked, ignore_errors=True)
            export(model, unchecked)
            check_parity(model, unchecked)
            unchecked.rename(out)
        return out

    @property
    def prompt_format(self) -> PromptFormat:
        """How the version is asked by us and by gateways. `export` has checked that its chat template works."""
        return PromptFormat.CHAT if chat_template(self.read()) is not None else PromptFormat.TEXT

    def variant(self, recipe: Recipe, on_pass: Callable[[str], None]) -> Path:
        """Runs the recipe and returns its genai folder. Raises `InvalidRecipe`, and what its passes raise.

        If the version is an adapter, it is merged into its base first. If the recipe takes adapters, it is not merged:
        the passes run on the base, and the adapter is added beside the result.
        """
        beside = recipe.takes_adapters and self._adapter is not None
        model = self._base() if beside else self.read()
        key = digest_of((json.dumps(self._root, sort_keys=True) + (" base" if beside else "")).encode())
        for step in check(recipe):
            on_pass(step.name)
            text = self._texts.calibration.digest if step.params.calibrated else ""
            key = digest_of(f"{key} {step.name} {step.params.model_dump_json()} {text}".encode())
            model = self._run_pass(step, model, self.work / "passes" / f"{step.name}-{key[7:23]}")
        return model

    def _run_pass(self, step: Step, model: Path, out: Path) -> Path:
        if not out.exists():
            out.parent.mkdir(exist_ok=True)
            part = out.with_name(f"{out.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            step.kind.run(model, part, step.params, self._context)
            part.rename(out)
        return out

    @cached_property
    def _context(self) -> Context:
        return Context(
            reference=self.read(),
            export=self.export,
            calibration=lambda: self._calibration,
            seed=self.spec.seed,
            tell=self.tell,
            predecessor=self.spec.predecessor,
            adapter=self._adapter,
        )

    @property
    def _adapter(self) -> Path | None:
        return self.source if self.facts.format == "adapter" else None

    @cached_property
    def _texts(self) -> Texts:
        return read_texts(self.spec.evaluation_texts, self.spec.calibration_texts)

    @cached_property
    def _calibration(self) -> Tokens:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.read(), local_files_only=True)
        windows, fewest = CALIBRATION_WINDOWS, MIN_CALIBRATION_WINDOWS
        return calibration(tokenizer, windows, CALIBRATION_TOKENS, self.spec.seed, self._texts, fewest)


def write_atomically(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())
