"""Verifying a report: an honest report agrees; otherwise the differences are listed."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import make_tiny_llama

from slmops.contracts.errors import NotFound
from slmops.contracts.evaluation import Verification
from slmops.contracts.recipe import PassSpec, Recipe
from slmops.optimizer.intake import materialize
from slmops.optimizer.intake.export import build
from slmops.optimizer.jobs.report import Report, files_of, report
from slmops.optimizer.jobs.verify import main, verify
from slmops.optimizer.measure.evaluate import evaluate, reference
from slmops.optimizer.measure.texts import Text, evaluation_text

RECIPE = Recipe(name="mine", passes=(PassSpec(pass_="build", params={"precision": "int4"}),))
FIGURES = {"kl", "top1", "ppl"} | {f"{name}_{end}" for name in ("kl", "top1", "ppl") for end in ("low", "high")}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def variant(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, tmp_path_factory.mktemp("variants") / "int4", "int4", {})


@pytest.fixture(scope="module")
def honest(source: Path, variant: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    full = materialize(source, tmp_path_factory.mktemp("work") / "reference")
    against = reference(full, windows=3, window_tokens=128)
    return report(
        RECIPE,
        evaluate(variant, against, tasks=[], seed=5),
        variant,
        against,
        reference_files=files_of(source),
        calibration=None,
        tasks=[],
        golden=[],
        seed=5,
    )


def claiming(honest: Report, **figures: float | None) -> Report:
    return honest.model_copy(update={"evaluation": honest.evaluation.model_copy(update=figures)})


def disagreeing(found: Verification) -> set[str]:
    return {figure.name for figure in found.figures if not figure.agrees}


def test_an_honest_report_agrees_from_a_shell(honest: Report, variant: Path, source: Path, tmp_path: Path) -> None:
    written = tmp_path / "report.json"
    written.write_text(honest.model_dump_json())
    command = [
        sys.executable,
        "-m",
        "slmops.optimizer.jobs.verify",
        str(written),
        "--variant",
        str(variant),
        "--reference",
    ]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = Verification.model_validate_json(done.stdout)
    assert found.agrees
    assert FIGURES | {"reference_ppl"} == {figure.name for figure in found.figures}
    assert (found.differing, found.tools) == ((), ())


def test_a_disagreement_and_an_unreadable_report_have_their_own_exit_codes(
    honest: Report, variant: Path, source: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    written = tmp_path / "report.json"
    written.write_text(claiming(honest, kl=0.0).model_dump_json())
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    for reference_path, code in ((source, 1), (tmp_path / "absent", NotFound.exit_code)):
        arguments = ["verify", str(written), "--variant", str(variant), "--reference", str(reference_path)]
        monkeypatch.setattr(sys, "argv", arguments)
        assert main() == code
        output = capsys.readouterr().out
        if reference_path == source:
            assert disagreeing(Verification.model_validate_json(output)) == {"kl"}
        else:
            assert json.loads(output)["code"] == "not_found"


def test_figures_may_differ_by_at_most_one_percent(honest: Report, variant: Path, source: Path) -> None:
    figures = {"ppl": honest.evaluation.ppl * 1.009, "top1": honest.evaluation.top1 * 1.02, "kl_low": None}
    found = verify(claiming(honest, **figures), variant, source, evaluation_text())
    assert not found.agrees
    assert disagreeing(found) == {"top1", "kl_low"}
    assert {f.name: f.reported for f in found.figures}["ppl"] == figures["ppl"]


def test_a_changed_file_is_named_and_an_additional_file_is_ignored(
    honest: Report, variant: Path, source: Path, tmp_path: Path
) -> None:
    package = Path(shutil.copytree(variant, tmp_path / "package"))
    (package / "README.md").write_text("The package's own.")
    assert verify(honest, package, source, evaluation_text()).agrees
    settings = package / "tokenizer_config.json"
    settings.write_text(settings.read_text() + "\n")
    found = verify(honest, package, source, evaluation_text())
    assert (found.agrees, found.differing, disagreeing(found)) == (False, ("variant/tokenizer_config.json",), set())


def test_another_reference_or_text_is_named(honest: Report, variant: Path, tmp_path: Path) -> None:
    other = make_tiny_llama(tmp_path / "other", seed=1)
    found = verify(honest, variant, other, Text("mine.txt", "A lazy dog answers the small fox. " * 90))
    assert set(found.differing) == {"reference/model.safetensors", "text/mine.txt"}
    assert {"kl", "top1", "ppl", "reference_ppl"} <= disagreeing(found)


def test_another_tool_version_is_reported_and_allowed(honest: Report, variant: Path, source: Path) -> None:
    old = honest.model_copy(update={"tools": honest.tools | {"torch": "1.0"}})
    found = verify(old, variant, source, evaluation_text())
    assert found.agrees
    assert [line.split(" →")[0] for line in found.tools] == ["torch 1.0"]


def test_nan_agrees_with_nan(honest: Report, variant: Path, source: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(variant, tmp_path / "broken"))
    data = broken / "model.onnx.data"
    data.write_bytes(b"\xff" * data.stat().st_size)
    nan = claiming(honest, **dict.fromkeys(FIGURES, math.nan)).model_copy(update={"variant_files": files_of(broken)})
    assert verify(nan, broken, source, evaluation_text()).agrees
    assert disagreeing(verify(honest, broken, source, evaluation_text())) == FIGURES


def test_a_missing_folder_is_a_typed_error(honest: Report, source: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        verify(honest, tmp_path / "absent", source, evaluation_text())
