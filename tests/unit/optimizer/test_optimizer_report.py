"""A report contains what others need to measure again, and can be written and read."""

from __future__ import annotations

import hashlib
import math
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from slmops.contracts.errors import InvalidMessage, NotFound
from slmops.contracts.evaluation import Evaluation
from slmops.contracts.prompts.golden import GoldenPrompt
from slmops.contracts.recipe import PassSpec, Recipe
from slmops.optimizer.jobs.report import Report, files_of, read_report, report
from slmops.optimizer.measure.evaluate import Reference
from slmops.optimizer.measure.tasks import bundled_tasks
from slmops.optimizer.measure.texts import read_texts

RECIPE = Recipe(name="mine", passes=(PassSpec(pass_="build", params={"precision": "int4"}),))


@pytest.fixture
def made(tmp_path: Path) -> Report:
    variant = tmp_path / "variant"
    (variant / "deep").mkdir(parents=True)
    (variant / "model.onnx").write_bytes(b"graph")
    (variant / "deep" / "data").write_bytes(b"weights")
    source = tmp_path / "model.gguf"
    source.write_bytes(b"gguf")
    texts = read_texts()
    against = Reference(np.zeros((3, 32), np.int64), np.zeros((3, 32, 4), np.float32), 2.0, texts.evaluation, 400)
    return report(
        RECIPE,
        Evaluation(bytes=12, kl=math.nan, tasks={"everyday": math.nan}),
        variant,
        against,
        reference_files=files_of(source),
        calibration=texts.calibration,
        tasks=bundled_tasks(),
        golden=[GoldenPrompt(prompt="?", expect=("!",))],
        seed=7,
    )


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def test_a_report_names_all_inputs_by_digest(made: Report) -> None:
    assert {file.path: file.digest for file in made.variant_files} == {
        "deep/data": sha256(b"weights"),
        "model.onnx": sha256(b"graph"),
    }
    assert [(file.path, file.digest, file.size_bytes) for file in made.reference_files] == [
        ("model.gguf", sha256(b"gguf"), 4)
    ]
    texts = read_texts()
    assert made.evaluation_text.digest == sha256(texts.evaluation.content.encode())
    assert made.calibration_text is not None
    assert made.calibration_text.digest == sha256(texts.calibration.content.encode())
    assert [(task.name, task.digest) for task in made.tasks] == [(t.name, t.digest) for t in bundled_tasks()]
    assert (made.windows, made.window_tokens, made.seed, made.recipe) == (3, 32, 7, RECIPE)
    assert made.tools["onnxruntime-genai"] == version("onnxruntime-genai")
    assert made.golden is not None


def test_a_report_with_nan_survives_writing_and_reading(made: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(made.model_dump_json())
    again = read_report(path)
    assert again.model_dump_json() == made.model_dump_json()
    assert math.isnan(again.evaluation.tasks["everyday"])
    assert math.isnan(again.evaluation.kl or 0)


def test_a_file_that_is_not_a_report_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read_report(tmp_path / "absent.json")
    path = tmp_path / "report.json"
    for content in ("{", "{}", "[]"):
        path.write_text(content)
        with pytest.raises(InvalidMessage, match="not an evaluation report"):
            read_report(path)
